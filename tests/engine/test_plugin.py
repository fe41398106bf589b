"""The plugin fails loudly: signatures, missing hooks, flags, models."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import HTTPException
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqInput,
    CheckWeightsReqInput,
    EndWeightUpdateReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightFromDiskReqInput,
)
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import invariant_checker
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_exec
from sglang.srt.server_args import ServerArgs

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import (
    SGLANG_VERSION,
    admission,
    fingerprint,
    limits,
    plugin,
    prometheus,
    server_info,
)
from vase_sgl.engine.admission import ReservingPrefillAdder
from vase_sgl.engine.attention_cpu import BatchInvariantBackend
from vase_sgl.engine.output import BudgetOutputStreamer
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.prometheus import EngineMetrics


@pytest.mark.parametrize(
    "hook", plugin.active_hooks() + plugin.FORK_HOOKS, ids=lambda hook: hook.target
)
def test_upstream_signatures_are_the_ones_we_rely_on(hook: plugin.Hook) -> None:
    """The canary: fails with a clear text when SGLang moves."""
    plugin.check_signature(hook)


def test_a_changed_signature_is_named() -> None:
    hook = dataclasses.replace(plugin.HOOKS[0], parameters=("self", "old"))
    with pytest.raises(RuntimeError, match=r"_create_generation_req now takes .*expected .*old"):
        plugin.check_signature(hook)


@pytest.mark.parametrize("method", plugin.overridden(), ids=lambda method: method[0])
def test_upstream_has_what_is_extended_without_a_hook(
    method: tuple[str, tuple[str, ...], str],
) -> None:
    plugin._check_parameters(*method)


def test_what_our_classes_override_is_listed() -> None:
    listed = {path for path, _, _ in plugin.overridden()}
    ours = [
        found
        for name, module in sys.modules.items()
        if name.startswith("vase_sgl.engine.")
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == name
    ]
    overriding = set()
    for cls in ours:
        upstream = [base for base in cls.__mro__ if base.__module__.startswith("sglang.")]
        for name in [name for name, value in vars(cls).items() if isfunction(value)]:
            paths = {f"{base.__module__}.{base.__qualname__}.{name}" for base in upstream}
            if not name.startswith("__") and any(name in vars(base) for base in upstream):
                overriding.add(cls)
                assert paths & listed, f"{cls.__qualname__}.{name}"
    assert {ReservingPrefillAdder, BudgetOutputStreamer, BatchInvariantBackend} < overriding


def test_a_method_that_is_gone_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours would stay, and never be asked."""
    monkeypatch.delattr(PrefillAdder, "_get_running_request_total_token_offset")
    with pytest.raises(SystemExit, match=r"total_token_offset is gone .*upgrading-sglang"):
        plugin.register()


def test_a_hook_that_sglang_did_not_apply_is_named(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.verify_applied()
    lost = plugin.HOOKS[3].path
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {lost})
    with pytest.raises(RuntimeError, match=lost):
        plugin.verify_applied()


def test_another_sglang_version_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SGLANG_VERSION", "9.9.9")
    with pytest.raises(SystemExit, match=r"sglang 9\.9\.9, found 0\.5\.23.*SGLANG_PLUGINS=none"):
        plugin.register()


@pytest.mark.parametrize(
    "pins", ["pyproject.toml", "requirements-cpu.txt", "k8s/images/constraints-gpu.txt"]
)
def test_what_is_installed_is_the_release_that_the_plugin_extends(pins: str) -> None:
    text = (Path(__file__).parents[2] / pins).read_text(encoding="utf-8")
    assert re.findall(r"\bsglang==([^\s\",;]+)", text) == [SGLANG_VERSION]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"enable_mixed_chunk": True}, "leave out --enable-mixed-chunk"),
    ({"speculative_algorithm": "EAGLE"}, "leave out --speculative-algorithm"),
    ({"enable_lora": True}, "leave out --enable-lora"),
    ({"pp_size": 2}, "use --pp-size 1"),
    ({"disaggregation_mode": "decode"}, "leave out --disaggregation-mode"),
    ({"enable_hierarchical_cache": True}, "leave out --enable-hierarchical-cache"),
    ({"enable_flexkv": True}, "leave out --enable-flexkv"),
    (
        {"enable_unified_cache_external_linker": True},
        "leave out --enable-unified-cache-external-linker",
    ),
    (
        {"enable_priority_scheduling": True},
        "use --enable-priority-scheduling with --disable-priority-preemption",
    ),
    ({"radix_cache_backend": "flexkv"}, "leave out --radix-cache-backend"),
    ({"tokenizer_worker_num": 2}, "use --tokenizer-worker-num 1"),
    ({"allow_auto_truncate": True}, "leave out --allow-auto-truncate"),
    ({"prefill_decode_interval": 14}, "use --prefill-decode-interval 0"),
    ({"schedule_policy": "shortest-prefill-first"}, "use another --schedule-policy"),
    ({"use_ray": True}, "leave out --use-ray"),
    ({"smg_grpc_mode": True}, "leave out --smg-grpc-mode"),
]


@pytest.mark.parametrize(("flags", "cure"), REFUSED, ids=[next(iter(f)) for f, _ in REFUSED])
def test_unsupported_flags_are_refused_by_name(
    tiny_model: Path, flags: dict[str, Any], cure: str
) -> None:
    limits.refuse_unsupported_flags(ServerArgs(model_path=str(tiny_model)))
    with pytest.raises(limits.UnsupportedConfiguration, match=cure):
        limits.refuse_unsupported_flags(ServerArgs(model_path=str(tiny_model), **flags))


def test_a_server_without_hooks_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(limits.UnsupportedConfiguration, match="unset SGLANG_RUST_SERVER"):
        limits.refuse_unsupported_flags(ServerArgs(model_path=str(tiny_model)))


def test_priorities_without_preemption_are_not_refused(tiny_model: Path) -> None:
    flags = {"enable_priority_scheduling": True, "disable_priority_preemption": True}
    limits.refuse_unsupported_flags(ServerArgs(model_path=str(tiny_model), **flags))


def test_the_scheduler_itself_refuses(stepped: SteppedScheduler, tiny_model: Path) -> None:
    """Also without our command line: the hook runs before anything of the scheduler is built."""
    with pytest.raises(limits.UnsupportedConfiguration, match="leave out --enable-mixed-chunk"):
        Scheduler(ServerArgs(model_path=str(tiny_model), enable_mixed_chunk=True), None)


def test_a_foreign_kv_pool_is_refused(stepped: SteppedScheduler) -> None:
    class LatentPool:
        pass

    class Runner:
        token_to_kv_pool = LatentPool()
        token_to_kv_pool_allocator = stepped.scheduler.token_to_kv_pool_allocator
        req_to_token_pool = LatentPool()

    with pytest.raises(limits.UnsupportedConfiguration, match="KV pool is LatentPool"):
        limits.refuse_unsupported_pool(Runner())
    # The attention backend is the first to ask for our buffers, long before SGLang is up.
    with pytest.raises(limits.UnsupportedConfiguration, match="KV pool is LatentPool"):
        BudgetPool.of_runner(Runner())


def test_a_foreign_allocator_is_refused(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = stepped.scheduler.tp_worker.model_runner
    monkeypatch.setattr(runner, "token_to_kv_pool_allocator", object())
    with pytest.raises(limits.UnsupportedConfiguration, match="page allocator, not object"):
        limits.refuse_unsupported_pool(runner)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quant_method": SimpleNamespace(name="nvfp4")}, "not nvfp4 .* --kv-cache-dtype auto"),
        ({"kv_cache_layout": "hnd"}, "layout hnd: .* leave SGLANG_USE_HND_KVCACHE unset"),
    ],
    ids=["packed with scales", "by pages and heads"],
)
def test_entries_that_are_no_rows_of_slots_are_refused(
    stepped: SteppedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    text: str,
) -> None:
    """SGLang keeps them in a pool of the same class."""
    runner = stepped.scheduler.tp_worker.model_runner
    limits.refuse_unsupported_pool(runner)
    for name, value in change.items():
        monkeypatch.setattr(runner.token_to_kv_pool, name, value)
    with pytest.raises(limits.UnsupportedConfiguration, match=text):
        limits.refuse_unsupported_pool(runner)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sliding_window_size": 4096}, "has attention over a sliding window"),
        ({"layer.sliding_window_size": 4096}, "has attention over a sliding window"),
        ({"layer.xai_temperature_len": 1024}, "has a temperature of attention that grows"),
        ({"layer.scaling": 1 / 128}, "has scales of attention that differ by layer"),
        # Its layers are no modules there.
        ({"model": torch.nn.Module()}, "has attention that transformers' code calls"),
        ({"layer.logit_cap": 30.0}, "has a cap on attention's logits"),
        ({"model_config.model_is_mrope": True}, "has multimodal rotary positions"),
        ({"model_config.is_encoder_decoder": True}, "has an encoder"),
        ({"device": "xpu"}, "or a CPU, not xpu"),
        ({"decode_attention_backend_str": "trtllm_mha"}, "than trtllm_mha: use --attention-"),
    ],
)
def test_models_and_backends_that_go_by_columns_are_refused(
    stepped: SteppedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    text: str,
) -> None:
    runner = stepped.scheduler.tp_worker.model_runner
    limits.refuse_unsupported_model(runner, plugin._BACKENDS)
    layers = [part for part in runner.model.modules() if isinstance(part, RadixAttention)]
    owners = {"": runner, "model_config": runner.model_config, "layer": layers[-1]}
    for name, value in change.items():
        owner, _, attribute = name.rpartition(".")
        monkeypatch.setattr(owners[owner], attribute, value)
    with pytest.raises(limits.UnsupportedConfiguration, match=text):
        limits.refuse_unsupported_model(runner, plugin._BACKENDS)


def test_flags_that_others_turn_on_are_refused(tiny_model: Path) -> None:
    args = ServerArgs(model_path=str(tiny_model), lora_paths=["x=/nowhere"])
    declare_resolution(args, "as SGLang does for --lora-paths", enable_lora=True)
    with pytest.raises(limits.UnsupportedConfiguration, match="leave out --enable-lora"):
        limits.refuse_unsupported_flags(args)


def test_what_starts_the_schedulers_refuses(stepped: SteppedScheduler, tiny_model: Path) -> None:
    """Those of Ray load no plugins, so that none of them could."""
    with pytest.raises(limits.UnsupportedConfiguration, match="leave out --use-ray"):
        Engine._launch_subprocesses(
            server_args=ServerArgs(model_path=str(tiny_model), use_ray=True),
            init_tokenizer_manager_func=pytest.fail,
            run_scheduler_process_func=pytest.fail,
            run_detokenizer_process_func=pytest.fail,
        )


async def test_a_pause_that_restarts_requests_is_refused(stepped: SteppedScheduler) -> None:
    with pytest.raises(HTTPException, match="use mode in_place or abort"):
        await TokenizerManager.pause_generation(None, PauseGenerationReqInput(mode="retract"))
    for mode in ("in_place", "abort"):
        admission.refuse_retracting_pause(None, PauseGenerationReqInput(mode=mode))


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("session_params", "session_params"),
        ("return_routed_experts", "return_routed_experts"),
        ("return_indexer_topk", "return_indexer_topk"),
        ("input_embeds", "input_embeds"),
        # Their placeholders are expanded after the budget was given.
        ("mm_inputs", "images, audio or video"),
    ],
)
def test_what_a_budget_cannot_serve_is_named(field: str, named: str) -> None:
    others = ("session_params", "return_routed_experts", "return_indexer_topk", "input_embeds")
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(beam_width=None), **dict.fromkeys((*others, "mm_inputs"))
    )
    assert admission._obstacle(request) is None
    setattr(request, field, object())
    assert admission._obstacle(request) == named


def test_prompts_that_are_no_text() -> None:
    """Placeholders of images may lie beyond the vocabulary; a list of no embeddings has no ids."""

    def problem(ids: list[int], *, earlier: Sequence[int] = (), **given: object) -> str | None:
        received = SimpleNamespace(
            **{"input_ids": ids, "mm_inputs": None, "input_embeds": None, **given}
        )
        req = SimpleNamespace(origin_input_ids=[*earlier, *ids])
        return admission._prompt_problem(req, received, 256)

    assert problem([5, 10**6]) is not None
    assert problem([5, 10**6], mm_inputs=object()) is None
    assert problem([1, 1], input_embeds=[[0.5], [0.5]]) is None
    assert "the prompt is empty" in str(problem([], input_embeds=[]))
    assert problem([0, 255]) is None
    assert problem([5], earlier=[10**6]) is None  # a session's turn after an image
    assert problem([], earlier=[5]) is None
    assert problem([-1], earlier=[5]) is not None


def test_a_cpu_names_how_it_multiplies(stepped: SteppedScheduler) -> None:
    """CPUs of one `cpu_capability` may differ in it: bfloat16 rows, or tiles of 16."""
    assert fingerprint.fingerprint(stepped.scheduler)["linear_tiles"] == "16-64-float32"


def test_updated_weights_are_not_those_of_the_files(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_updated", None)
    scheduler = stepped.scheduler
    first = fingerprint.fingerprint(scheduler)["weights_digest"]
    assert fingerprint.fingerprint(scheduler)["weights_digest"] == first
    digests = {first}
    for succeeds in (True, False, True):  # one that fails may have loaded half of them
        load = SimpleNamespace(update_weights_from_disk=lambda *_, ok=succeeds, **__: (ok, "said"))
        runner = ("target", SimpleNamespace(weight_updater=load))
        monkeypatch.setattr(
            type(scheduler.weight_updater), "_select_runners", lambda _, r=runner: [r]
        )
        update = UpdateWeightFromDiskReqInput(model_path="elsewhere", weight_version="2")
        assert scheduler.weight_updater.update_weights_from_disk(update).success == succeeds
        digests.add(fingerprint.fingerprint(scheduler)["weights_digest"])
    assert len(digests) == 4


def test_weights_that_others_write_into_are_not_those_of_the_files(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a session; answers from before its end are those of neither."""
    monkeypatch.setattr(fingerprint, "_updated", None)
    updater = stepped.scheduler.weight_updater
    monkeypatch.setattr(type(updater), "_select_runners", lambda *_: [])
    digests = [fingerprint.fingerprint(stepped.scheduler)["weights_digest"]]
    assert updater.begin_weight_update(BeginWeightUpdateReqInput()).success
    digests.append(fingerprint.fingerprint(stepped.scheduler)["weights_digest"])
    assert updater.end_weight_update(EndWeightUpdateReqInput()).success
    digests.append(fingerprint.fingerprint(stepped.scheduler)["weights_digest"])
    assert len(set(digests)) == 3


@pytest.mark.parametrize(("action", "changes"), [("reset_tensors", True), ("checksum", False)])
def test_a_check_that_overwrites_the_weights_is_noticed(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, action: str, changes: bool
) -> None:
    monkeypatch.setattr(fingerprint, "_updated", None)
    updater = stepped.scheduler.weight_updater
    monkeypatch.setattr(type(updater), "_select_runners", lambda *_: [])
    assert updater.check_weights(CheckWeightsReqInput(action=action)).success
    assert (fingerprint._updated is not None) == changes


@pytest.mark.parametrize(
    ("tags", "saver", "backup", "changes"),
    [
        (["weights"], True, False, True),
        (None, True, False, True),  # all of them
        (["kv_cache"], True, False, False),
        (["weights"], True, True, False),
        (["weights"], False, False, False),  # their memory was never given back
    ],
)
def test_weights_whose_memory_was_given_back_are_others(
    stepped: SteppedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    tags: list[str] | None,
    saver: bool,
    backup: bool,
    changes: bool,
) -> None:
    monkeypatch.setattr(fingerprint, "_updated", None)
    updater = stepped.scheduler.weight_updater
    with get_exec().features.override(enable_memory_saver=saver, enable_weights_cpu_backup=backup):
        updater.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=tags))
        assert fingerprint._updated is None
        updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
    assert (fingerprint._updated is not None) == changes


def test_an_answer_bears_the_fingerprint_that_it_ends_with(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a budget or without; whoever knows the one of before sees that it was updated."""
    monkeypatch.setattr(fingerprint, "_updated", None)
    monkeypatch.setattr(fingerprint, "_told", None)
    assert fingerprint.stamp() is None
    told = server_info.describe(stepped.scheduler)["fingerprint_stamp"]
    stamps = []
    with torch.inference_mode():
        for update in (False, True):
            stepped.answers.clear()
            stepped.submit("stock", [5, 6, 7], max_new_tokens=8)
            stepped.submit("budget", [5, 6, 7], max_new_tokens=8, vase={"budget": 9, "window": 2})
            stepped.step()
            if update:
                fingerprint.note_updated_weights()
            stepped.run()
            assert stepped.answers["stock"].stamp == stepped.answers["budget"].stamp
            stamps.append(stepped.answers["stock"].stamp)
    assert stamps[0] == told
    assert stamps[1] == server_info.describe(stepped.scheduler)["fingerprint_stamp"] != told


def test_the_watchdogs_last_words_quote_no_request(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it logs of a scheduler that hangs, before it ends the worker."""
    scheduler = stepped.scheduler
    monkeypatch.setattr(invariant_checker, "WatchdogRaw", lambda **given: given["dump_info"])
    last_words = invariant_checker.create_scheduler_watchdog(scheduler, 1.0)
    monkeypatch.setattr(scheduler, "is_initializing", False, raising=False)
    vase = {"budget": 9, "window": 2, "seed": 717171}
    with torch.inference_mode():
        stepped.submit("hung", [211, 212, 213], max_new_tokens=8, vase=vase, sampling_seed=818181)
        stepped.step()
        stepped.step()
        monkeypatch.setattr(
            scheduler, "cur_batch_for_debug", scheduler.running_batch, raising=False
        )
        text = last_words()
        (req,) = stepped.running
        answer = list(req.output_ids)
        stepped.run()
    assert f"reqs=[Req(rid=hung, 3 prompt and {len(answer)} output tokens)]" in text and answer
    for secret in (str(req.origin_input_ids), str(answer), "211", "717171", "818181", "vase"):
        assert secret not in text


def test_sglang_itself_is_unmodified() -> None:
    """Every installed SGLang file that the wheel lists with a hash still has that hash."""
    script = (
        "import base64, hashlib, importlib.metadata as m\n"
        "files = [f for f in m.files('sglang') if f.hash and f.suffix == '.py']\n"
        "bad = [str(f) for f in files if base64.urlsafe_b64encode(hashlib.new(f.hash.mode, "
        "f.read_binary()).digest()).rstrip(b'=').decode() != f.hash.value]\n"
        "print(len(files), bad)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    count, changed = output.stdout.split(maxsplit=1)
    assert int(count) > 1000
    assert changed.strip() == "[]"


def test_the_table_of_refused_flags_is_complete() -> None:
    """docs/engine.md lists exactly what `limits` refuses."""
    text = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    section = text.split("## Refused at start-up")[1].split("##")[0]
    listed = re.findall(r"^\| `(\w+)` (?:`[\w-]+` |without `[\w-]+` )?\|", section, re.MULTILINE)
    assert sorted(listed) == sorted([*limits._REQUIRED, *limits._REFUSED, *limits._ONLY_WITH])


def test_retractions_are_counted_from_zero_on(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A series that is born with the first retraction did not increase, for Prometheus."""
    registry = CollectorRegistry()

    class Collector(SchedulerMetricsCollector):
        _counter_cls, _gauge_cls, _histogram_cls, _summary_cls = (
            staticmethod(partial(kind, registry=registry))
            for kind in (Counter, Gauge, Histogram, Summary)
        )

    labels = {"model_name": "m", "tp_rank": "1", "moe_ep_rank": "0"}
    collector = Collector(labels, stepped.scheduler.server_args)
    for name, value in {"enable_metrics": True, "metrics_collector": collector}.items():
        monkeypatch.setattr(stepped.scheduler.metrics_reporter, name, value)
    prometheus.start_metrics(stepped.scheduler)
    assert registry.get_sample_value("sglang:num_retracted_requests_total", labels) == 0


def test_the_documented_metrics_are_the_ones_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    listed = {name.removesuffix("_total") for name in re.findall(r"`(vase:\w+)`", text)}
    registry = CollectorRegistry()
    EngineMetrics({"model_name": "m", "dp_rank": "0"}, registry)
    assert listed == {family.name for family in registry.collect()}
