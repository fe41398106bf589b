"""What eviction costs when memory is no constraint, per window, and where the time goes.

    python -m benchmarks.overhead [--windows 16 32 64 128 256] [--rounds 2] [--prefix-cache]

One worker with timers (`benchmarks.timers`) and room for everything. For each window R, in turn:

    full      prompts of `--budget` tokens, R decode steps, full KV cache, several times over
    budget    the same prompts with that budget: a round every R steps

So both see the same context lengths, budget to budget + R, and the ratio of their decode steps, by
the worker's clock, is eviction with all that comes with it. (Clients see the first token late,
which weighs more in short answers.) Prefill is in neither. With `--prefix-cache` the prompts lie in
the prefix tree, and each request's first round copies its own. The parts are host times; on a GPU
kernels run behind them, so there only the hooks and the launching of rounds are shown, and the rest
comes from a trace of SGLang's profiler.

`floor` is the time in which the weights and the cached K and V of a step could be copied at the
copy bandwidth measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import load, options, plots, results, traces
from benchmarks.environment import machine_line
from benchmarks.options import Model
from benchmarks.results import Report, median, number
from benchmarks.timers import Totals, decode_seconds, difference, shares
from benchmarks.workers import Worker, WorkerSpec, running
from vase_sgl.eviction import EvictionLimits, EvictionParams
from vase_sgl.eviction.policies import POLICIES

#: Decode steps that a trace covers, about.
_TRACED_STEPS = 160


def main(argv: list[str] | None = None) -> int:
    chosen = _parser().parse_args(argv)
    options.check(chosen)
    chosen.batch = chosen.batch or (16 if chosen.gpu else 8)
    chosen.budget = chosen.budget or (2048 if chosen.gpu else 384)
    largest = max(chosen.budget, *chosen.windows)
    for window in chosen.windows:
        try:
            EvictionParams.parse(_vase(chosen, window, 0), EvictionLimits(largest, largest))
        except ValueError as error:
            raise SystemExit(f"--windows {window}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        model = options.the_model(chosen, Path(folder))
        spec = _spec(chosen)
        if chosen.dry_run:
            return options.dry_run("overhead", chosen, model, {"timed": spec}, markdown)
        report = results.new_report("overhead", options.settings(chosen, model))
        report["copy_bytes_per_second"] = bandwidth()
        report["samples"] = []
        with (
            results.until_cut(report),
            running([spec], model.path, dummy=model.dummy, gpu=chosen.gpu) as workers,
        ):
            asyncio.run(check_pool(workers[spec], chosen))
            asyncio.run(measure(report["samples"], workers[spec], chosen, model))
            if chosen.gpu:
                report |= kernels_of_a_trace(workers[spec], chosen, model, Path(folder))
    summarize(report, model)
    return results.finish(
        report, chosen.output, chosen.name, markdown=markdown, plot=plots.overhead
    )


def _parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__ or "", name="overhead")
    add = made.add_argument
    add("--windows", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    add("--budget", type=int, default=None, help="384; on a GPU 2048")
    add("--batch", type=int, default=None, help="requests at once: 8; on a GPU 16")
    add("--steps", type=int, default=256, help="decode steps of a run, about")
    add("--rounds", type=int, default=2, help="turns of all arms")
    add("--policy", choices=POLICIES, default="vase-attnv")
    add("--prefix-cache", action="store_true", help="leave SGLang's radix cache on")
    return made


def _slots(chosen: argparse.Namespace) -> int:
    """Of the pool: room for all requests at once, with what SGLang's admission wants beside."""
    copied = chosen.budget if chosen.prefix_cache else 0  # of a prompt, in the first round
    return int(chosen.batch * (chosen.budget + max(chosen.windows) + copied + 8) + 64)


def _spec(chosen: argparse.Namespace) -> WorkerSpec:
    prefill = chosen.batch * chosen.budget
    flags: tuple[str, ...] = (
        *("--vase-max-budget", str(chosen.budget), "--vase-max-window", str(max(chosen.windows))),
        *("--max-total-tokens", str(_slots(chosen)), "--max-running-requests", str(chosen.batch)),
        # One prefill for all prompts, or the first answers would wait for the last prompts.
        *("--chunked-prefill-size", str(prefill), "--max-prefill-tokens", str(prefill)),
    )
    if not chosen.prefix_cache:
        flags += ("--disable-radix-cache",)
    if chosen.gpu:
        # SGLang sets 1.5 MB aside for every token of a prefill: with one so long, hardly a slot is
        # left on an H100.
        flags += ("--mem-fraction-static", "0.6")
    flags += tuple(chosen.worker_arg)
    return WorkerSpec("timed", flags, (("VASE_CPU_DECODE", "batched"),))


async def check_pool(worker: Worker, chosen: argparse.Namespace) -> None:
    """`SystemExit` if the pool is too small: some requests would wait and the others be timed."""
    slots = (await load.state(worker.url))["memory_usage"]["token_capacity"]
    if slots < _slots(chosen):
        raise SystemExit(
            f"memory for {slots:,} of {_slots(chosen):,} slots: lower --batch or --budget, or give "
            "the pool more with --worker-arg=--mem-fraction-static=SHARE"
        )


def bandwidth() -> float:
    """Bytes read and written per second by a large copy on this device."""
    import torch

    from benchmarks.device_clock import copy_bandwidth

    found = copy_bandwidth(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.cuda.empty_cache()  # what torch kept of the copies would be missing in the worker's pool
    return found


async def measure(
    samples: list[dict[str, Any]], worker: Worker, chosen: argparse.Namespace, model: Model
) -> None:
    """Append the samples."""
    await _run(worker, chosen, model, min(chosen.windows), "budget", turn=-1)  # warms up
    for turn in range(chosen.rounds):
        for window in chosen.windows:
            # Each arm first in turn: a machine that slows down or speeds up favours neither.
            for arm in ("full", "budget") if turn % 2 == 0 else ("budget", "full"):
                sample = await _run(worker, chosen, model, window, arm, turn)
                samples.append(sample)
                per_step = number(1e3 * _step_seconds(sample))
                line = f"round {turn} window {window} {arm}: {per_step} ms a step"
                print(line, file=sys.stderr, flush=True)


async def _run(
    worker: Worker, chosen: argparse.Namespace, model: Model, window: int, arm: str, turn: int
) -> dict[str, Any]:
    """One sample: times per token of its requests, and what the timers counted."""
    cycles = max(1, chosen.steps // window)
    # The first token comes from the prefill, and a round is carried out by the step after R.
    full = arm == "full"
    tokens, repeats = (window + 1, min(cycles, 4)) if full else (cycles * window + 2, 1)
    before = await _timers(worker)
    per_token: list[float | None] = []
    for repeat in range(repeats):
        ids = load.prompts(
            chosen.batch, chosen.budget, model.shape.vocabulary, seed=1000 * turn + repeat
        )
        burst = await load.burst(
            worker.url,
            [
                load.Request(prompt, tokens, None if full else _vase(chosen, window, seed))
                for seed, prompt in enumerate(ids)
            ],
        )
        per_token += [one.per_token() for one in burst.arrivals]
    return {
        "round": turn,
        "window": window,
        "arm": arm,
        "tokens": tokens,
        "tpot": per_token,
        "timers": difference(await _timers(worker), before),
    }


def _step_seconds(sample: dict[str, Any]) -> float:
    """Of a decode step."""
    steps: float = sample["timers"]["step.run"][0]
    return decode_seconds(sample["timers"]) / steps


def _vase(chosen: argparse.Namespace, window: int, seed: int) -> dict[str, Any]:
    return {"policy": chosen.policy, "budget": chosen.budget, "window": window, "seed": seed}


async def _timers(worker: Worker) -> Totals:
    vase = (await load.state(worker.url))["vase"]
    return dict(vase["timers"])


def kernels_of_a_trace(
    worker: Worker, chosen: argparse.Namespace, model: Model, folder: Path
) -> dict[str, Any]:
    """`kernels` of the report, or `no_kernels`, the reason: the samples stand without a trace."""
    try:
        return {"kernels": asyncio.run(trace(worker, chosen, model, folder))}
    except Exception as error:
        traceback.print_exc()
        return {"no_kernels": f"{type(error).__name__}: {results.reason(error)}"}


async def trace(
    worker: Worker, chosen: argparse.Namespace, model: Model, folder: Path
) -> dict[str, float]:
    """Seconds of GPU kernels by group, over whole windows of 64 or the nearest size."""
    window = min(chosen.windows, key=lambda size: abs(size - 64))
    steps = traced_steps(window)
    ids = load.prompts(chosen.batch, chosen.budget, model.shape.vocabulary, seed=-2)
    requests = [
        load.Request(prompt, 3 * steps, _vase(chosen, window, seed))
        for seed, prompt in enumerate(ids)
    ]
    decoding = asyncio.create_task(load.burst(worker.url, requests))
    await asyncio.sleep(1)  # past the prefill
    path = await traces.record(worker.url, folder / "traces", steps=steps)
    await decoding
    return traces.kernel_seconds(path)


def traced_steps(window: int) -> int:
    """Whole windows, so that a trace begun anywhere holds one round for each."""
    return window * max(1, round(_TRACED_STEPS / window))


def summarize(report: Report, model: Model) -> None:
    """Medians over rounds, per window; the overhead is that of the ratios within a round."""
    chosen = report["settings"]
    report["summary"] = []
    for window in chosen["windows"]:
        mine = {
            arm: [s for s in report["samples"] if (s["window"], s["arm"]) == (window, arm)]
            for arm in ("full", "budget")
        }
        if not mine["budget"] or not mine["full"]:
            continue  # cut before
        steps = {arm: {s["round"]: _step_seconds(s) for s in mine[arm]} for arm in mine}
        pairs = steps["full"].keys() & steps["budget"].keys()
        over = median(steps["budget"][turn] / steps["full"][turn] for turn in pairs)
        parts = [shares(sample["timers"]) for sample in mine["budget"]]
        names = dict.fromkeys(name for part in parts for name in part)
        floor = model.shape.floor_seconds(
            chosen["batch"], chosen["budget"] + window / 2, report["copy_bytes_per_second"]
        )
        report["summary"].append(
            {
                "window": window,
                "step_seconds": {arm: median(found.values()) for arm, found in steps.items()},
                "overhead": None if over is None else over - 1,
                "floor_seconds": floor,
                "shares": {name: median(part.get(name, 0.0) for part in parts) for name in names},
            }
        )


def markdown(report: Report) -> str:
    chosen = report["settings"]
    parts = _HOST_PARTS if chosen["gpu"] else _PARTS
    lines = [
        f"{chosen['model']}. Batch {chosen['batch']}, budget {chosen['budget']}, policy "
        f"{chosen['policy']}, {chosen['rounds']} round(s)"
        f"{', prefix cache on' if chosen.get('prefix_cache') else ''}. Copy bandwidth "
        f"{report['copy_bytes_per_second'] / 1e9:.1f} GB/s. {machine_line(report['environment'])}. "
        "Columns from `eviction` on: % of decode time.",
        "",
        results.table(
            (
                *("window", "step, full ms", "step, budget ms", "overhead %", "floor ms"),
                *(f"{heading} %" for heading in parts.values()),
            ),
            [_row(line, parts) for line in report["summary"]],
        ),
    ]
    if not chosen["gpu"]:
        lines += [
            "Parts of eviction, % of decode time (seconds of all threads that work on it):",
            "",
            _parts_table(report),
        ]
    if "kernels" in report:
        whole = sum(report["kernels"].values())
        rows = [(name, number(100 * s / whole)) for name, s in report["kernels"].items()]
        lines += ["GPU kernels in a trace:", "", results.table(("group", "% of kernel time"), rows)]
    if "no_kernels" in report:
        lines.append(f"No trace of the GPU kernels: {report['no_kernels']}\n")
    return "\n".join(lines)


#: Headings of the parts.
_PARTS = {
    name: name
    for name in ("eviction", "query ring", "scheduler", "attention", "linear", "sampling")
}
#: On a GPU. Its kernels run behind the calls of all others, or in a captured graph.
_HOST_PARTS = {"eviction": "eviction, host time of launching", "scheduler": "scheduler"}


def _row(line: dict[str, Any], parts: Iterable[str]) -> tuple[str, ...]:
    def milliseconds(value: float | None) -> str:
        return number(None if value is None else 1e3 * value)

    return (
        str(line["window"]),
        milliseconds(line["step_seconds"]["full"]),
        milliseconds(line["step_seconds"]["budget"]),
        number(None if line["overhead"] is None else 100 * line["overhead"]),
        milliseconds(line["floor_seconds"]),
        *(number(100 * line["shares"].get(name, 0.0)) for name in parts),
    )


def _parts_table(report: Report) -> str:
    prefix = "eviction: "
    found = [name for line in report["summary"] for name in line["shares"]]
    names = [name for name in dict.fromkeys(found) if name.startswith(prefix)]
    return results.table(
        ("window", *(name.removeprefix(prefix) for name in names)),
        [
            (str(line["window"]), *(number(100 * line["shares"].get(n, 0.0)) for n in names))
            for line in report["summary"]
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
