"""`vase-sgl worker` with timers (`benchmarks.timers`): `python -m benchmarks.timed_worker`.

A spawned child imports this module first, as `__mp_main__`, so the timers are in place before
SGLang loads the plugin there. A child of the fork server would come too late, so there is none.
"""

# ruff: noqa: E402  # SGLang is imported below, and not without the workaround
from __future__ import annotations

from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators  # isort: skip

declare_torchvision_operators()

import dataclasses
import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from vase_kernels.reference import evict as reference_evict
from vase_kernels.reference import select as reference_select

from benchmarks.timers import Timers
from vase_sgl.engine import (
    compaction,
    fork_server,
    lifecycle,
    output,
    plugin,
    query_ring,
    server,
    server_info,
)

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_ATTENTION = "sglang.srt.layers.radix_attention.RadixAttention.forward"
#: Hooks of the CPU platform that are no scheduling.
_GROUPS = {
    "tiled_linear_apply": "linear",
    "tiled_lm_head": "linear",
    "carry_seeds": "sampling.carry_seeds",
    "sample_with_seeds": "sampling.sample_with_seeds",
}


def install() -> Timers:
    """Put timers around the plugin's functions, before SGLang loads the plugin."""
    timers = Timers()
    fork_server.start = lambda model_path: None
    plugin.HOOKS = tuple(_timed(timers, hook) for hook in plugin.HOOKS)
    plugin._CPU_HOOKS = tuple(_timed(timers, hook) for hook in plugin._CPU_HOOKS)
    timers.method("scheduler.alloc_for_decode", lifecycle, "alloc_for_decode")
    for name in ("alloc_for_decode_default", "alloc_token_slots"):
        timers.method("stock", lifecycle, name)
    streamer = output.BudgetOutputStreamer
    timers.method("scheduler.statistics", streamer, "build_additional_customized_info")
    timers.method("scheduler.map_rings", query_ring.QueryRing, "map_new")
    timers.method("ring", query_ring.QueryRing, "write")
    timers.method("round", compaction.Compaction, "run")
    timers.method("round.score", reference_select, "retention_keys")
    parts = {
        "victims": "select_victims",
        "plan": "move_plan",
        "move": "_move",
        "digest": "round_sum",
        "positions": "_positions",
    }
    for part, name in parts.items():
        timers.method(f"round.{part}", reference_evict, name)
    _report(timers)
    _time_upstream(timers)
    return timers


def _timed(timers: Timers, hook: plugin.Hook) -> plugin.Hook:
    function = hook.function
    name = _GROUPS.get(function.__name__, f"scheduler.{function.__name__}")
    wrap = timers.around if hook.kind == HookType.AROUND else timers.wrap
    return dataclasses.replace(hook, function=wrap(name, function))


def _report(timers: Timers) -> None:
    describe = server_info.describe

    def with_timers(scheduler: Any) -> dict[str, Any]:
        return describe(scheduler) | {"timers": timers.totals}

    server_info.describe = with_timers


def _time_upstream(timers: Timers) -> None:
    """With the plugin's own hooks, register timers around the scheduler's steps and attention."""
    register = plugin.register

    def prepare(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        def name(plan: Any) -> str:
            batch = plan.batch_to_run
            if batch is None:
                return "idle"
            return "step.prepare" if batch.forward_mode.is_decode() else "prefill.step.prepare"

        return timers.call_named(name, original, scheduler, *args, **kwargs)

    def run(original: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        decode = batch.forward_mode.is_decode()
        if decode:
            timers.count("decode.requests", len(batch.reqs))
        timers.prefix = "" if decode else "prefill."
        try:
            return timers.call("step.run", original, scheduler, batch, *args, **kwargs)
        finally:
            timers.prefix = ""

    def result(original: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        name = "step.result" if batch.forward_mode.is_decode() else "prefill.step.result"
        return timers.call(name, original, scheduler, batch, *args, **kwargs)

    def attend(original: Any, *args: Any, **kwargs: Any) -> Any:
        return timers.call("attention", original, *args, **kwargs)

    def register_all() -> None:
        register()
        around = {
            f"{_SCHEDULER}.get_next_batch_to_run": prepare,
            f"{_SCHEDULER}.run_batch": run,
            f"{_SCHEDULER}.process_batch_result": result,
            _ATTENTION: attend,
        }
        for target, hook in around.items():
            HookRegistry.register(target, hook, HookType.AROUND)

    plugin.register = register_all


install()

if __name__ == "__main__":
    sys.exit(server.main())
