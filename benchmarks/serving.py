"""Stock SGLang against vase_sgl: same model, same flags, same KV slots, the same requests.

    python -m benchmarks.serving                                     # 64 answers of 1,000 tokens
    python -m benchmarks.serving --cells 4x200 16x200 64x200 --seconds 30 --rounds 2 \\
        --name serving_sweep

A cell is CONCURRENCYxTOKENS: so many requests, all submitted at once, each with its own random
prompt and exactly so many output tokens. Arms:

    stock    SGLang as published, none of our hooks (see `benchmarks.stock_worker`)
    full     the plugin, full KV cache: on a CPU our batched decode attention
    budget   the plugin, a fixed budget per request
    stock-same-bytes   stock with as many more slots as fit into the plugin's buffers (CPU only)

The KV pool holds `--kv-slots` tokens in every other arm; by default what the largest cell takes
with the budget, (budget + window) per request. Arms take turns in every round, in every second one
in the other order, and every round has new prompts. On a CPU the workers stay up (an idle one
sleeps); on a GPU one after the other has it.

A run is measured from the submission to its end, for `--seconds` at most, then cut; the budget arm
goes on to its end, so that "no retraction" is seen over whole answers. What stock SGLang has not
begun by then it need not do, nor wait until its last answers end alone, which favours it. `tail` is
the last third of the measured time.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import load, options, plots, results
from benchmarks.environment import machine_line
from benchmarks.model_configs import Shape
from benchmarks.options import Model
from benchmarks.results import Report, median, number, percentile, ratio
from benchmarks.workers import WorkerSpec, running
from vase_sgl.eviction.policies import POLICIES

BASE = "stock"
SAME_BYTES = "stock-same-bytes"


@dataclasses.dataclass(frozen=True)
class Arm:
    """vase: eviction parameters of its requests, or None for a full KV cache."""

    name: str
    spec: WorkerSpec
    vase: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    concurrency: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.concurrency}x{self.tokens}"


def main(argv: list[str] | None = None) -> int:
    chosen = _parser().parse_args(argv)
    options.check(chosen)
    with tempfile.TemporaryDirectory() as folder:
        model = options.the_model(chosen, Path(folder))
        complete(chosen)
        arms = [arm for arm in all_arms(chosen, model.shape) if arm.name in chosen.arms]
        if chosen.dry_run:
            specs = {arm.name: arm.spec for arm in arms}
            return options.dry_run("serving", chosen, model, specs, markdown)
        report = results.new_report("serving", options.settings(chosen, model))
        with results.until_cut(report):
            measure(report, arms, chosen, model)
    summarize(report)
    return results.finish(report, chosen.output, chosen.name, markdown=markdown, plot=plots.serving)


def _parser() -> argparse.ArgumentParser:
    made = options.parser(__doc__ or "", name="serving")
    add = made.add_argument
    add("--cells", nargs="+", type=_cell, default=None, help="CONCURRENCYxTOKENS ...")
    add("--arms", nargs="+", choices=ARMS, default=list(DEFAULT_ARMS))
    add("--rounds", type=int, default=1)
    add("--seconds", type=float, default=None, help="window of a run (240; on a GPU 120)")
    add("--cut", action="store_true", help="cut the budget arm's runs too")
    add("--whole", action="store_true", help="no window: every arm runs to its end")
    add("--prompt-tokens", type=int, default=32)
    add("--budget", type=int, default=None, help="128; on a GPU 2048")
    add("--window", type=int, default=64)
    add("--policy", choices=POLICIES, default="vase-attnv")
    add("--kv-slots", type=int, default=None, help="tokens the KV pool holds; 0: what fits")
    add("--resident", action=argparse.BooleanOptionalAction, default=None, help="workers stay up")
    return made


#: By name: what `--arms` takes.
ARMS = ("stock", SAME_BYTES, "full", "full-stock-decode", "budget", "budget-stock-decode")
DEFAULT_ARMS = ("stock", "full", "budget")


def _cell(text: str) -> Cell:
    concurrency, _, tokens = text.partition("x")
    if not (concurrency.isdecimal() and tokens.isdecimal() and int(concurrency) and int(tokens)):
        raise argparse.ArgumentTypeError(f"{text!r} is not CONCURRENCYxTOKENS, as in 64x1000")
    return Cell(int(concurrency), int(tokens))


def complete(chosen: argparse.Namespace) -> None:
    """Fill the defaults that depend on the machine and on other options."""
    gpu = chosen.gpu
    chosen.cells = chosen.cells or [Cell(256, 16384) if gpu else Cell(64, 1000)]
    chosen.seconds = None if chosen.whole else chosen.seconds or (120.0 if gpu else 240.0)
    chosen.budget = chosen.budget or (2048 if gpu else 128)
    chosen.resident = (not gpu) if chosen.resident is None else chosen.resident
    if SAME_BYTES in chosen.arms and (gpu or chosen.kv_slots == 0):
        raise SystemExit(f"{SAME_BYTES}: with --kv-slots 0 all arms share the bytes that there are")
    if gpu and chosen.resident:
        raise SystemExit("--resident: two workers do not share a GPU's memory")
    most = max(cell.concurrency for cell in chosen.cells)
    slots = max(chosen.prompt_tokens, chosen.budget) + chosen.window
    # SGLang's admission wants a slot more than it fills.
    if chosen.kv_slots is None:
        chosen.kv_slots = most * slots + 64


def all_arms(chosen: argparse.Namespace, shape: Shape) -> Iterator[Arm]:
    most = max(cell.concurrency for cell in chosen.cells)
    flags: tuple[str, ...] = ("--max-running-requests", str(most), "--disable-radix-cache")
    if chosen.kv_slots:
        flags += ("--max-total-tokens", str(chosen.kv_slots))
    if chosen.gpu:
        flags += ("--mem-fraction-static", "0.88")
    flags += tuple(chosen.worker_arg)
    vase = {"policy": chosen.policy, "budget": chosen.budget, "window": chosen.window}
    ceilings = (
        *("--vase-max-budget", str(chosen.budget), "--vase-max-window", str(chosen.window)),
    )
    plugin = WorkerSpec("vase", (*ceilings, *flags), (("VASE_CPU_DECODE", "batched"),))
    unbatched = WorkerSpec("vase", (*ceilings, *flags), (("VASE_CPU_DECODE", "stock"),))
    yield Arm("stock", WorkerSpec("stock", flags))
    if chosen.kv_slots:
        # bfloat16 queries and int32 token positions; Triton's scratch is a GPU's.
        ring = most * chosen.window * shape.layers * shape.heads * shape.head_dim * 2
        positions = chosen.kv_slots * shape.layers * shape.kv_heads * 4
        slots = chosen.kv_slots + (ring + positions) // shape.kv_bytes_per_token
        yield Arm(SAME_BYTES, WorkerSpec("stock", (*flags, "--max-total-tokens", str(slots))))
    yield Arm("full", plugin)
    yield Arm("full-stock-decode", unbatched)
    yield Arm("budget", plugin, vase)
    yield Arm("budget-stock-decode", unbatched, vase)


def measure(report: Report, arms: list[Arm], chosen: argparse.Namespace, model: Model) -> None:
    """Fill `samples`, in the order of the runs, and `workers`, what each says about itself."""
    samples = report["samples"] = []
    said = report["workers"] = {}

    def run(arm: Arm, cell: Cell, turn: int, url: str) -> None:
        if arm.name not in said:  # first, so that there is no sample of an unknown worker
            said[arm.name] = asyncio.run(_about(arm, url))
        sample = asyncio.run(one_run(arm, cell, turn, url, chosen, model))
        samples.append(sample)
        rate = number(sample["tokens_per_second"])
        print(f"round {turn} {cell} {arm.name}: {rate} tokens/s", file=sys.stderr, flush=True)

    if chosen.resident:
        specs = [arm.spec for arm in arms]
        with running(specs, model.path, dummy=model.dummy, gpu=chosen.gpu) as workers:
            for arm in arms:
                asyncio.run(warm_up(workers[arm.spec].url, arm, chosen, model))
            for turn in range(chosen.rounds):
                for cell in chosen.cells:
                    for arm in in_turn(arms, turn):
                        run(arm, cell, turn, workers[arm.spec].url)
        return
    for turn in range(chosen.rounds):
        ordered = in_turn(arms, turn)
        for spec in dict.fromkeys(arm.spec for arm in ordered):
            with running([spec], model.path, dummy=model.dummy, gpu=chosen.gpu) as workers:
                mine = [arm for arm in ordered if arm.spec == spec]
                for arm in mine:
                    asyncio.run(warm_up(workers[spec].url, arm, chosen, model))
                for cell in chosen.cells:
                    for arm in mine:
                        run(arm, cell, turn, workers[spec].url)


def in_turn(arms: list[Arm], turn: int) -> list[Arm]:
    """The arms as a round has them: what the first finds, the last finds in the next round."""
    return arms if turn % 2 == 0 else arms[::-1]


async def _about(arm: Arm, url: str) -> dict[str, Any]:
    """Slots of the pool; of the plugin also its fingerprint and buffers."""
    state = await load.state(url)
    vase = state.get("vase", {})
    if (arm.spec.kind == "stock") == bool(vase):
        raise SystemExit(f"arm {arm.name} is not what it says: plugin state {vase}")
    return {"slots": state["memory_usage"]["token_capacity"]} | {
        key: vase[key] for key in ("fingerprint", "buffers_mib") if key in vase
    }


async def warm_up(url: str, arm: Arm, chosen: argparse.Namespace, model: Model) -> None:
    """First calls are slower than others: a few short answers, and a round where there are any."""
    tokens = 2 * chosen.window if arm.vase is not None else 8
    # A prompt as long as the budget, so that a round is due after `window` tokens.
    length = chosen.budget if arm.vase is not None else chosen.prompt_tokens
    ids = load.prompts(2, length, model.shape.vocabulary, seed=-1)
    await load.burst(url, [load.Request(prompt, tokens, arm.vase) for prompt in ids])


async def one_run(
    arm: Arm, cell: Cell, turn: int, url: str, chosen: argparse.Namespace, model: Model
) -> dict[str, Any]:
    ids = load.prompts(cell.concurrency, chosen.prompt_tokens, model.shape.vocabulary, seed=turn)
    requests = [
        load.Request(
            prompt,
            cell.tokens,
            None if arm.vase is None else arm.vase | {"seed": index},
        )
        for index, prompt in enumerate(ids)
    ]
    to_end = chosen.whole or (arm.vase is not None and not chosen.cut)
    burst = await load.burst(url, requests, seconds=None if to_end else chosen.seconds)
    window = min(chosen.seconds or burst.seconds, burst.seconds)
    seen = [one.before(window) for one in burst.arrivals]
    tokens = burst.tokens_between(-1, window)
    return {
        "round": turn,
        "arm": arm.name,
        "cell": str(cell),
        "seconds": window,
        "tokens": tokens,
        "tokens_per_second": tokens / window,
        "tail_tokens_per_second": burst.tokens_between(window * 2 / 3, window) / (window / 3),
        "started": sum(one.first is not None for one in seen),
        "finished": sum(one.finish is not None for one in seen),
        "ttft": [one.first for one in seen],
        "tpot": [one.per_token() for one in seen],
        "whole": [one.finish is not None for one in seen],
        "run_to_end": burst.complete,
        "run_seconds": burst.seconds,
        "run_tokens_per_second": burst.tokens_between(-1, burst.seconds) / burst.seconds,
        "peak_running": burst.peak_running,
        "retractions": burst.retractions,
        "tokens_by_second": burst.tokens_by_second(),
        "gauges": burst.gauges,
    }


def summarize(report: Report) -> None:
    """Medians over rounds, per cell and arm, with ratios to stock SGLang."""
    samples = report["samples"]
    runs = dict.fromkeys((sample["cell"], sample["arm"]) for sample in samples)
    report["summary"] = [
        _summary(cell, arm, samples) | {"fit": _fit(report, cell, arm)} for cell, arm in runs
    ]
    for line in report["summary"]:
        base: dict[str, Any] = next(
            (one for one in report["summary"] if (one["cell"], one["arm"]) == (line["cell"], BASE)),
            {},
        )
        for name in ("tokens_per_second", "tail_tokens_per_second"):
            line[f"{name}_over_stock"] = ratio(line[name], base.get(name))


def _fit(report: Report, cell: str, arm: str) -> int:
    """How many of the cell's whole answers the pool holds at once."""
    chosen = report["settings"]
    prompt, tokens = chosen["prompt_tokens"], _cell(cell).tokens
    whole = prompt + tokens
    if arm.startswith("budget"):
        whole = min(whole, max(prompt, chosen["budget"]) + chosen["window"])
    return int(report["workers"][arm]["slots"] // whole)


def _summary(cell: str, arm: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [one for one in samples if (one["cell"], one["arm"]) == (cell, arm)]
    ttft = {f"ttft_p{p}": median(_ttft(one, p / 100) for one in mine) for p in (50, 95)}
    return {
        "cell": cell,
        "arm": arm,
        "seconds": median(one["seconds"] for one in mine),
        "tokens_per_second": median(one["tokens_per_second"] for one in mine),
        "tail_tokens_per_second": median(one["tail_tokens_per_second"] for one in mine),
        "peak_running": max(one["peak_running"] for one in mine),
        "retractions": sum(one["retractions"] for one in mine),
        "run_to_end": all(one["run_to_end"] for one in mine),
        "tpot_p50": median(_tpot(one, 0.5) for one in mine),
        # JSON has no infinity: null, more than the window.
        **{name: None if t == float("inf") else t for name, t in ttft.items()},
    }


def _ttft(sample: dict[str, Any], share: float) -> float | None:
    # A request without a first token in the window has waited longer than all others.
    return percentile([float("inf") if t is None else t for t in sample["ttft"]], share)


def _tpot(sample: dict[str, Any], share: float) -> float | None:
    """Of whole answers if there are any: those that were cut had short contexts."""
    of_whole = [t for t, whole in zip(sample["tpot"], sample["whole"], strict=True) if whole and t]
    return percentile(of_whole or [t for t in sample["tpot"] if t], share)


_HEAD = (
    *("concurrency x tokens, arm", "seconds", "tokens/s", "over stock"),
    *("tail tokens/s", "over stock"),
    *("peak running", "whole answers that fit", "retractions"),
    *("TTFT p50 s", "TTFT p95 s", "TPOT p50 ms"),
)


def markdown(report: Report) -> str:
    chosen = report["settings"]
    if not report["samples"]:
        return "Nothing was measured before the cut.\n"
    window = (
        "every run to its end"
        if chosen["seconds"] is None
        else "from the submission of all requests to the last answer, "
        f"{chosen['seconds']:g} s at most"
    )
    pools = [said["slots"] for said in report["workers"].values()]
    pool = f"{min(pools):,}" if len(set(pools)) == 1 else f"{min(pools):,} to {max(pools):,}"
    mib = max(pools) * chosen["kv_bytes_per_slot"] / 2**20
    buffers = next(
        (
            "; the plugin's own buffers beside it: "
            + ", ".join(f"{name} {value:.0f} MiB" for name, value in said["buffers_mib"].items())
            for said in report["workers"].values()
            if "buffers_mib" in said
        ),
        "",
    )
    lines = [
        f"{chosen['model']}. KV pool of {pool} slots in every arm ({mib:,.0f} MiB{buffers}); "
        f"budget {chosen['budget']}, window {chosen['window']}, policy {chosen['policy']}, prompts "
        f"of {chosen['prompt_tokens']} tokens. Measured: {window}; {chosen['rounds']} round(s). "
        f"{machine_line(report['environment'])}.",
        "",
        results.table(
            _HEAD,
            [_row(line, chosen["seconds"]) for line in report["summary"]],
        ),
        "`tail`: the last third of the time. Retractions: of the run to its end where the arm has "
        "a `*`, else of the measured time. TPOT: of whole answers if there are any.",
    ]
    return "\n".join(lines) + "\n"


def _row(line: dict[str, Any], seconds: float | None) -> tuple[str, ...]:
    def wait(value: float | None) -> str:
        return f"> {seconds:g}" if value is None and seconds is not None else number(value)

    tpot = line["tpot_p50"]
    return (
        f"{line['cell']} {line['arm']}{'*' if line['run_to_end'] else ''}",
        number(line["seconds"]),
        number(line["tokens_per_second"]),
        number(line["tokens_per_second_over_stock"]),
        number(line["tail_tokens_per_second"]),
        number(line["tail_tokens_per_second_over_stock"]),
        str(line["peak_running"]),
        str(line["fit"]),
        str(line["retractions"]),
        wait(line["ttft_p50"]),
        wait(line["ttft_p95"]),
        number(None if tpot is None else tpot * 1e3),
    )


if __name__ == "__main__":
    sys.exit(main())
