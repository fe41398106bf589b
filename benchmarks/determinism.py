"""Replays under load that differ (expected: none), and what being deterministic costs.

    python -m benchmarks.determinism [--replays 1000] [--requests 20]

Mismatches: every request is answered alone first; then replays in batches of random size, order and
company. Tokens, round digests, and of sampled requests every log probability, bit for bit, must be
the same. (Of greedy ones SGLang computes the log probability by another formula when the batch
samples too, so that number would differ where nothing else does.) Exit status 1 if one differs.

Cost: on a CPU, SGLang with the plugin against stock SGLang, both with stock decode attention and a
full KV cache: batch-invariant linear layers, hooks. On a GPU, the plugin with and without
`--enable-deterministic-inference`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import load, options, results, serving
from benchmarks.environment import machine_line
from benchmarks.options import Model
from benchmarks.results import Report, median, number
from benchmarks.serving import Arm, Cell
from benchmarks.workers import WorkerSpec, running

_POLICIES = ("vase-attnv", "vase-dkv", "snapkv", "random")
_DETERMINISTIC = "--enable-deterministic-inference"


def main(argv: list[str] | None = None) -> int:
    chosen = _parser().parse_args(argv)
    options.check(chosen)
    with tempfile.TemporaryDirectory() as folder:
        model = options.the_model(chosen, Path(folder))
        arms = cost_arms(chosen)
        replay = replay_spec(chosen)
        if chosen.dry_run:
            specs = {arm.name: arm.spec for arm in arms} | {"replay": replay}
            return options.dry_run("determinism", chosen, model, specs, markdown)
        report = results.new_report("determinism", options.settings(chosen, model))
        with results.until_cut(report):
            if chosen.replays:
                with running([replay], model.path, dummy=model.dummy, gpu=chosen.gpu) as workers:
                    asyncio.run(replays(report, workers[replay].url, chosen, model))
            if chosen.rounds:
                serving.measure(report, arms, _as_serving(chosen), model)
    summarize(report)
    status = results.finish(report, chosen.output, chosen.name, markdown=markdown)
    return 1 if report["summary"]["mismatches"] else status


def _parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__ or "", name="determinism")
    add = made.add_argument
    add("--replays", type=int, default=1000, help="0 leaves them out")
    add("--requests", type=int, default=20, help="different requests that are replayed")
    add("--tokens", type=int, default=48, help="output tokens of each")
    add("--budget", type=int, default=24)
    add("--window", type=int, default=8)
    add("--batches", type=int, nargs="+", default=[1, 2, 5, 16, 32])
    add("--rounds", type=int, default=3, help="of the cost; 0 leaves it out")
    add("--cost-cell", type=serving._cell, default=Cell(16, 128), help="CONCURRENCYxTOKENS")
    return made


def cost_arms(chosen: argparse.Namespace) -> list[Arm]:
    concurrency, tokens = chosen.cost_cell.concurrency, chosen.cost_cell.tokens
    flags = (
        *("--max-total-tokens", str(concurrency * (tokens + 64) + 64)),
        *("--max-running-requests", str(concurrency), "--disable-radix-cache"),
        *chosen.worker_arg,
    )
    if chosen.gpu:
        return [
            Arm("free", WorkerSpec("vase", flags)),
            Arm("deterministic", WorkerSpec("vase", (*flags, _DETERMINISTIC))),
        ]
    return [
        Arm("free", WorkerSpec("stock", flags)),
        Arm("deterministic", WorkerSpec("vase", flags, (("VASE_CPU_DECODE", "stock"),))),
    ]


def replay_spec(chosen: argparse.Namespace) -> WorkerSpec:
    most = max(chosen.batches)
    flags = (
        *("--max-total-tokens", str(most * 4 * (chosen.budget + chosen.tokens) + 64)),
        *("--max-running-requests", str(most), *chosen.worker_arg),
    )
    return WorkerSpec("vase", (*flags, _DETERMINISTIC) if chosen.gpu else flags)


def _as_serving(chosen: argparse.Namespace) -> argparse.Namespace:
    """The options that `serving.measure` reads, for runs to their end."""
    return argparse.Namespace(
        gpu=chosen.gpu,
        resident=not chosen.gpu,
        rounds=chosen.rounds,
        cells=[chosen.cost_cell],
        prompt_tokens=32,
        seconds=None,
        whole=True,
        cut=False,
    )


def the_requests(chosen: argparse.Namespace, vocabulary: int) -> list[load.Request]:
    """Of all kinds: policies, temperatures, prompts below and above the budget, one full cache."""
    made = []
    for index in range(chosen.requests):
        length = random.Random(index).randint(4, 2 * chosen.budget)
        vase = {
            "policy": _POLICIES[index % len(_POLICIES)],
            "budget": chosen.budget,
            "window": chosen.window,
            "seed": index,
        }
        temperature = 0.0 if index % 3 == 0 else 0.8
        made.append(
            load.Request(
                input_ids=load.prompts(1, length, vocabulary, seed=index)[0],
                max_new_tokens=chosen.tokens,
                vase=None if index % 10 == 9 else vase,
                temperature=temperature,
                seed=index,
                logprobs=temperature > 0,
            )
        )
    return made


async def replays(report: Report, url: str, chosen: argparse.Namespace, model: Model) -> None:
    """Fill `replays`: counts by batch size, and every mismatch."""
    requests = the_requests(chosen, model.shape.vocabulary)
    rng = random.Random(0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
        expected = [outcome(await load.answer(http, url, request)) for request in requests]
        rounds = sum(len(one["digests"]) for one in expected)
        if not rounds:
            raise SystemExit("no round happened: nothing is tested; raise --tokens")
        by_size: dict[int, dict[str, int]] = {}
        mismatches: list[dict[str, Any]] = []
        report["replays"] = {
            "rounds_per_pass": rounds,
            "by_batch_size": by_size,
            "mismatches": mismatches,
        }
        done = 0
        while done < chosen.replays:
            size = min(rng.choice(chosen.batches), chosen.replays - done)
            batch = [rng.randrange(len(requests)) for _ in range(size)]
            answers = await asyncio.gather(
                *(load.answer(http, url, requests[index]) for index in batch)
            )
            count = by_size.setdefault(size, {"replays": 0, "mismatches": 0})
            for index, found in zip(batch, map(outcome, answers), strict=True):
                count["replays"] += 1
                if found != expected[index]:
                    count["mismatches"] += 1
                    mismatches.append(
                        {"request": index, "batch": size, **differences(expected[index], found)}
                    )
            done += size
            print(f"{done} replays, {len(mismatches)} differ", file=sys.stderr, flush=True)


def outcome(answer: dict[str, Any]) -> dict[str, Any]:
    """What must be the same."""
    meta = answer["meta_info"]
    return {
        "tokens": answer["output_ids"],
        "digests": meta.get("vase", {}).get("round_digests", []),
        "logprobs": [entry[0] for entry in meta.get("output_token_logprobs") or ()],
    }


def differences(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, int | None]:
    """First differing index of each part; None where it is equal."""
    first = {}
    for part, values in expected.items():
        others = found[part]
        pairs = enumerate(zip(values, others, strict=False))
        index = next((i for i, (a, b) in pairs if a != b), None)
        if index is None and len(values) != len(others):
            index = min(len(values), len(others))
        first[part] = index
    return first


def summarize(report: Report) -> None:
    """Totals of the replays; medians of the rates; their ratio in every round."""
    replayed = report.get("replays", {})
    rates: dict[str, dict[int, float]] = {"free": {}, "deterministic": {}}
    for one in report.get("samples", []):
        rates[one["arm"]][one["round"]] = one["tokens_per_second"]
    free, deterministic = rates.values()
    both = free.keys() & deterministic.keys()
    report["summary"] = {
        "replays": sum(count["replays"] for count in replayed.get("by_batch_size", {}).values()),
        "mismatches": len(replayed.get("mismatches", [])),
        "tokens_per_second": {arm: median(found.values()) for arm, found in rates.items()},
        "ratios": [deterministic[turn] / free[turn] for turn in sorted(both)],
    }


def markdown(report: Report) -> str:
    chosen, summary = report["settings"], report["summary"]
    rates = summary["tokens_per_second"]
    replayed = report.get("replays")
    lines = [f"{chosen['model']}. {machine_line(report['environment'])}.", ""]
    if replayed is not None:
        rows = [
            (str(size), f"{count['replays']:,}", str(count["mismatches"]))
            for size, count in sorted(replayed["by_batch_size"].items(), key=lambda x: int(x[0]))
        ]
        rows.append(("all", f"{summary['replays']:,}", str(summary["mismatches"])))
        lines += [
            f"{chosen['requests']} requests of {chosen['tokens']} tokens, budget "
            f"{chosen['budget']}, window {chosen['window']}, "
            f"{replayed['rounds_per_pass']} rounds in one pass over them:",
            "",
            results.table(("batch", "replays", "that differ"), rows),
        ]
    if report.get("samples"):
        lines.append(
            f"Cost at {chosen['cost_cell']}: {number(rates['deterministic'])} against "
            f"{number(rates['free'])} tokens/s{_ratios(summary['ratios'])}."
        )
    return "\n".join(lines) + "\n"


def _ratios(found: list[float]) -> str:
    if not found:
        return ""
    spread = f" ({number(min(found))} to {number(max(found))})" if len(found) > 1 else ""
    return f", {number(median(found))} times as many{spread}; {len(found)} round(s)"


if __name__ == "__main__":
    sys.exit(main())
