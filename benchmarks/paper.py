"""The VaSE authors' throughput table on this stack: one batch, budgets, the full cache beside them.

    python -m benchmarks.paper                 # a GPU: Qwen3-14B shape, batch 16, prompts of 256

Each arm has a worker of its own, whose KV pool is exactly what the batch takes, so that the peak
memory is the arm's. Arms that cannot have their pool say so. Time is from the last first token on,
as the authors leave out the prefill, and cut after `--seconds` a run unless `--whole`: with a
budget the cost of a step does not grow any more; with the full cache it does, so cutting favours
that one.

The published numbers (arXiv 2606.03928, authors' code; Hugging Face transformers with
FlashAttention-2 on a GPU they do not name) stand in columns of their own. They are another machine
and another engine: compare ratios, not numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import load, options, plots, results
from benchmarks.environment import machine_line
from benchmarks.options import Model
from benchmarks.results import Report, number, ratio
from benchmarks.workers import Worker, WorkerSpec, running

#: By policy: (output tokens, budget or "full") -> tokens/s, peak GB; None: out of memory.
_PUBLISHED_FULL: dict[tuple[int, int | str], tuple[float, float] | None] = {
    (16384, "full"): (132.9, 68.7),
    (32768, "full"): None,
}
PUBLISHED = {
    "vase-attnv": {
        **_PUBLISHED_FULL,
        (16384, 2048): (384.1, 34.3),
        (16384, 4096): (333.4, 39.6),
        (16384, 6144): (313.4, 45.4),
        (32768, 2048): (368.4, 34.3),
        (32768, 4096): (328.4, 39.6),
        (32768, 6144): (302.1, 45.4),
    },
    "vase-dkv": {
        **_PUBLISHED_FULL,
        (16384, 2048): (410.9, 33.9),
        (16384, 4096): (364.8, 38.9),
        (16384, 6144): (347.8, 43.9),
        (32768, 2048): (396.8, 33.9),
        (32768, 4096): (364.5, 38.9),
        (32768, 6144): (341.5, 43.9),
    },
}
#: The batch of the published numbers; beside another they would mislead.
PUBLISHED_BATCH = 16
FULL = "full"


@dataclasses.dataclass(frozen=True)
class Arm:
    """slots: of the pool, for the whole batch."""

    tokens: int
    budget: int | str
    slots: int
    spec: WorkerSpec

    @property
    def name(self) -> str:
        return f"{self.tokens} {self.budget}"


def main(argv: list[str] | None = None) -> int:
    chosen = _parser().parse_args(argv)
    options.check(chosen)
    arms = [_arm(chosen, tokens, budget) for tokens in chosen.outputs for budget in chosen.budgets]
    with tempfile.TemporaryDirectory() as folder:
        model = options.the_model(chosen, Path(folder))
        if chosen.dry_run:
            specs = {arm.name: arm.spec for arm in arms}
            return options.dry_run("paper", chosen, model, specs, markdown)
        report = results.new_report("paper", options.settings(chosen, model))
        report["samples"] = []
        with results.until_cut(report):
            for arm in arms:
                report["samples"].append(measure(arm, chosen, model))
    summarize(report)
    plot = partial(plots.bars, value="tokens_per_second", label="tokens/s", name="arm")
    return results.finish(report, chosen.output, chosen.name, markdown=markdown, plot=plot)


def _parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__ or "", name="paper")
    add = made.add_argument
    add("--outputs", type=int, nargs="+", default=[16384, 32768])
    add("--budgets", type=_budget, nargs="+", default=[FULL, 2048, 4096, 6144])
    add("--window", type=int, default=64)
    add("--policy", choices=tuple(PUBLISHED), default="vase-attnv")
    add("--batch", type=int, default=16)
    add("--prompt-tokens", type=int, default=256)
    add("--seconds", type=float, default=80.0, help="a run is cut after so long")
    add("--whole", action="store_true", help="every run to its end")
    return made


def _budget(text: str) -> int | str:
    if text == FULL:
        return FULL
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a budget nor {FULL!r}")
    return int(text)


def _arm(chosen: argparse.Namespace, tokens: int, budget: int | str) -> Arm:
    prompt = chosen.prompt_tokens
    each = prompt + tokens
    flags: tuple[str, ...] = ()
    if isinstance(budget, int):
        if budget <= chosen.window:
            raise SystemExit(f"--budgets: {budget} must be above the window of {chosen.window}")
        each = min(each, max(prompt, budget) + chosen.window)
        flags += ("--vase-max-budget", str(budget), "--vase-max-window", str(chosen.window))
    slots = chosen.batch * each + 64
    prefill = str(chosen.batch * prompt)
    flags += (
        *("--max-total-tokens", str(slots), "--max-running-requests", str(chosen.batch)),
        *("--chunked-prefill-size", prefill, "--max-prefill-tokens", prefill),
        "--disable-radix-cache",
    )
    if chosen.gpu:
        flags += ("--mem-fraction-static", "0.94")
    return Arm(tokens, budget, slots, WorkerSpec("vase", (*flags, *chosen.worker_arg)))


def measure(arm: Arm, chosen: argparse.Namespace, model: Model) -> dict[str, Any]:
    sample: dict[str, Any] = {"output": arm.tokens, "budget": arm.budget, "slots": arm.slots}
    try:
        with running([arm.spec], model.path, dummy=model.dummy, gpu=chosen.gpu) as workers:
            worker = workers[arm.spec]
            slots = asyncio.run(load.state(worker.url))["memory_usage"]["token_capacity"]
            if slots < arm.slots:
                return sample | {"problem": f"memory for {slots:,} of {arm.slots:,} slots"}
            sample |= asyncio.run(_run(worker, arm, chosen, model))
    except SystemExit as error:  # the next arm may still start
        return sample | {"problem": f"did not start: {results.reason(error)}"}
    rate = number(sample["tokens_per_second"])
    print(f"{arm.name}: {rate} tokens/s", file=sys.stderr, flush=True)
    return sample


async def _run(
    worker: Worker, arm: Arm, chosen: argparse.Namespace, model: Model
) -> dict[str, Any]:
    vase = None
    if isinstance(arm.budget, int):
        vase = {"policy": chosen.policy, "budget": arm.budget, "window": chosen.window}
    ids = load.prompts(chosen.batch, chosen.prompt_tokens, model.shape.vocabulary, seed=0)
    await load.burst(worker.url, [load.Request(ids[0], 8, vase)])
    requests = [
        load.Request(prompt, arm.tokens, None if vase is None else vase | {"seed": seed})
        for seed, prompt in enumerate(ids)
    ]
    memory = [resident_gb(worker, gpu=chosen.gpu)]
    seconds = None if chosen.whole else chosen.seconds
    decoding = asyncio.create_task(load.burst(worker.url, requests, seconds=seconds))
    while not decoding.done():
        await asyncio.wait([decoding], timeout=2)
        memory.append(await asyncio.to_thread(resident_gb, worker, gpu=chosen.gpu))
    burst = await decoding
    firsts = [one.first for one in burst.arrivals]
    if None in firsts:
        return {"problem": f"{firsts.count(None)} of {len(firsts)} requests had no token in time"}
    start = max(first for first in firsts if first is not None)
    return {
        "tokens_per_second": burst.tokens_between(start, burst.seconds) / (burst.seconds - start),
        "seconds": burst.seconds,
        "whole": burst.complete,
        "tokens_each": [one.tokens for one in burst.arrivals],
        "peak_running": burst.peak_running,
        "retractions": burst.retractions,
        "peak_memory_gb": max(memory),
    }


def resident_gb(worker: Worker, *, gpu: bool) -> float:
    """GB (10^9) in use: of the whole GPU, or resident in the worker's processes."""
    if gpu:
        query = [
            "nvidia-smi",
            "--query-gpu=memory.used",
            "--format=csv,noheader,nounits",
            "-i",
            "0",
        ]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return int(said.split()[0]) * 2**20 / 1e9
    import psutil

    main_process = psutil.Process(worker.pid)
    family = [main_process, *main_process.children(recursive=True)]
    return float(sum(process.memory_info().rss for process in family) / 1e9)


def summarize(report: Report) -> None:
    """Per arm, with the ratio to the full cache of the same output, beside the published one."""
    samples, chosen = report["samples"], report["settings"]
    known = PUBLISHED[chosen["policy"]] if chosen["batch"] == PUBLISHED_BATCH else {}
    full = {s["output"]: s.get("tokens_per_second") for s in samples if s["budget"] == FULL}
    report["summary"] = []
    for sample in samples:
        place = (sample["output"], sample["budget"])
        published = known.get(place)
        published_full = known.get((sample["output"], FULL))
        report["summary"].append(
            {
                "arm": f"{sample['output']} {sample['budget']}",
                "tokens_per_second": sample.get("tokens_per_second"),
                "over_full": ratio(sample.get("tokens_per_second"), full.get(sample["output"])),
                "peak_memory_gb": sample.get("peak_memory_gb"),
                "whole": sample.get("whole", False),
                "problem": sample.get("problem"),
                "published": published,
                "published_out_of_memory": place in known and published is None,
                "published_over_full": ratio(
                    published[0] if published else None,
                    published_full[0] if published_full else None,
                ),
            }
        )


def markdown(report: Report) -> str:
    chosen = report["settings"]
    cut = "to its end" if chosen["whole"] else f"cut after {chosen['seconds']:g} s (`<`)"
    lines = [
        f"{chosen['model']}. Batch {chosen['batch']}, prompts of {chosen['prompt_tokens']} tokens, "
        f"window {chosen['window']}, policy {chosen['policy']}; every run {cut}. "
        f"{machine_line(report['environment'])}. Published: another machine and another engine "
        "(Hugging Face transformers).",
        "",
        results.table(
            (
                *("output, budget", "tokens/s", "over full", "peak GB"),
                *("published tokens/s", "published over full", "published GB"),
            ),
            [_row(line) for line in report["summary"]],
        ),
    ]
    return "\n".join(lines)


def _row(line: dict[str, Any]) -> tuple[str, ...]:
    published = line["published"]
    cells = ("out of memory" if line["published_out_of_memory"] else "-", "-", "-")
    if published:
        cells = (f"{published[0]}", number(line["published_over_full"]), f"{published[1]}")
    return (
        f"{line['arm']}{'' if line['whole'] else ' <'}",
        line["problem"] or number(line["tokens_per_second"]),
        number(line["over_full"]),
        number(line["peak_memory_gb"]),
        *cells,
    )


if __name__ == "__main__":
    sys.exit(main())
