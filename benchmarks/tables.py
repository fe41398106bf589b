"""Writes the tables of docs/performance.md from the result files, so that nobody types a number.

    python -m benchmarks.tables            # rewrite
    python -m benchmarks.tables --check    # exit status 1 if the page is not what this would write

Rewritten is what lies between `<!-- results: NAME -->` and `<!-- end -->`: the table and plot of
benchmarks/results/NAME.json, or that it has not been measured and how to. `goals` is made
from several results, `floors`, `round_floors` and `value_range` from model shapes, the second also
from the instructions that were counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import determinism, overhead, paper, results, serving
from benchmarks.environment import ROOT
from benchmarks.model_configs import SHAPES
from benchmarks.results import FOLDER, Report, number, table

PAGE = ROOT / "docs" / "performance.md"
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

_MARKDOWN: dict[str, Callable[[Report], str]] = {
    "serving": serving.markdown,
    "overhead": overhead.markdown,
    "determinism": determinism.markdown,
    "paper": paper.markdown,
}
#: How to get a result that is not there.
COMMANDS = {
    "serving": "python -m benchmarks.serving",
    "serving_sweep": "python -m benchmarks.serving --name serving_sweep "
    "--cells 4x200 16x200 64x200 --seconds 30 --rounds 2 --cut",
    "overhead": "python -m benchmarks.overhead",
    "determinism": "python -m benchmarks.determinism",
    "instructions": "python -m benchmarks.instructions",
    **{
        f"gpu/{name}": f"python -m benchmarks.gpu --only {name}"
        for name in (
            *("kernels", "flashinfer", "determinism", "overhead", "serving", "saturation"),
            *("overhead_prefix_cache", "paper_16384", "paper_32768", "paper_dkv", "tuning"),
        )
    },
}
#: Peak of an H100 SXM by its data sheet; the benchmark measures the device's own.
_H100_BYTES_PER_SECOND = 3.35e12
_H100_TENSOR_OPERATIONS_PER_SECOND = 989e12
#: 16 a clock and multiprocessor, by CUDA's programming guide, at the clock of the line above.
_H100_EXPONENTIALS_PER_SECOND = 16 * 132 * 1.83e9
#: Of warps: four a clock and multiprocessor.
_H100_INSTRUCTIONS_PER_SECOND = 4 * 132 * 1.83e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    chosen = parser.parse_args(argv)
    before = PAGE.read_text()
    after = rewritten(before, FOLDER)
    if chosen.check:
        if after != before:
            print(f"{PAGE.name} is not up to date: python -m benchmarks.tables", file=sys.stderr)
        return int(after != before)
    PAGE.write_text(after)
    return 0


def rewritten(page: str, folder: Path) -> str:
    """The page with every block made anew. Raises ValueError for a block of an unknown name."""
    return _BLOCK.sub(lambda found: f"{found[1]}{block(found[2], folder)}{found[4]}", page)


def block(name: str, folder: Path) -> str:
    if name == "goals":
        return goals(folder)
    if name == "floors":
        return floors()
    if name == "round_floors":
        return round_floors(folder)
    if name == "value_range":
        return value_range()
    if name not in COMMANDS:
        raise ValueError(f"no result is called {name!r}; there are {', '.join(COMMANDS)}")
    path = folder / f"{name}.json"
    if not path.exists():
        return f"Not measured. To do so: `{COMMANDS[name]}`\n"
    report = results.read(path)
    if report[results.DRY_RUN]:
        raise ValueError(f"{path.name} is of a dry run; remove it")
    lines = [_markdown(report)]
    if report.get("cut"):
        lines.append("Cut before its end: what was measured until then.\n")
    if "error" in report:
        lines.append(f"Ended by an error, {report['error']}: what was measured until then.\n")
    if path.with_suffix(".svg").exists():
        lines.append(f"![{name}](../benchmarks/results/{name}.svg)\n")
    lines.append(f"`{report['environment']['command']}`\n")
    return "\n".join(lines)


def _markdown(report: Report) -> str:
    if report["benchmark"] in ("kernels", "flashinfer"):
        from benchmarks import kernels  # imports Triton

        return kernels.markdown(report)
    if report["benchmark"] == "tuning":
        from benchmarks import tuning  # likewise

        return tuning.markdown(report)
    if report["benchmark"] == "instructions":
        from benchmarks import instructions  # likewise

        return instructions.markdown(report)
    return _MARKDOWN[report["benchmark"]](report)


def goals(folder: Path) -> str:
    """What was to be reached on a CPU, and what was."""

    def of(name: str, value: Callable[[Report], str]) -> str:
        path = folder / f"{name}.json"
        return value(results.read(path)) if path.exists() else "not measured"

    def line(report: Report, **match: object) -> dict[str, object]:
        for one in report["summary"]:
            if all(one[key] == value for key, value in match.items()):
                return dict(one)
        return {}

    def at_64x1000(key: str) -> Callable[[Report], str]:
        return lambda report: _said(line(report, cell="64x1000", arm="budget").get(key))

    def share(part: str) -> Callable[[Report], str]:
        def value(report: Report) -> str:
            found = line(report, window=64).get("shares")
            return f"{_said(100 * found[part])} %" if isinstance(found, dict) else "-"

        return value

    rows = [
        (
            "64 answers of 1,000 tokens, budget 128, same KV slots: tokens/s over stock",
            "at least 4",
            of("serving", at_64x1000("tokens_per_second_over_stock")),
        ),
        ("retractions of the budget arm, whole run", "0", of("serving", at_64x1000("retractions"))),
        ("scheduler hooks' share, window 64", "at most 1 %", of("overhead", share("scheduler"))),
        ("query ring's share, window 64", "no goal", of("overhead", share("query ring"))),
        ("eviction's share, window 64", "at most 3 %", of("overhead", share("eviction"))),
        (
            "replays that differ, of so many",
            "0 of at least 1,000",
            of(
                "determinism",
                lambda report: (
                    f"{report['summary']['mismatches']} of {report['summary']['replays']:,}"
                ),
            ),
        ),
    ]
    return table(("goal on a CPU", "wanted", "measured"), rows)


def _said(value: object) -> str:
    return number(value) if isinstance(value, int | float) else "-"


def floors() -> str:
    """Lowest time of a decode step by bytes alone, Qwen3-14B on an H100."""
    shape, batch = SHAPES["qwen3-14b"], 16
    rows = []
    for name, cached in (
        *(("budget 2,048", 2048 + 32), ("budget 4,096", 4096 + 32), ("budget 6,144", 6144 + 32)),
        *(("full cache at 16,384", 16384), ("full cache at 32,768", 32768)),
    ):
        seconds = shape.floor_seconds(batch, cached, _H100_BYTES_PER_SECOND)
        kept = batch * cached * shape.kv_bytes_per_token / 1e9
        rows.append(
            (
                name,
                number(shape.weight_bytes / 1e9),
                number(kept),
                number(1e3 * seconds),
                number(batch / seconds),
            )
        )
    head = ("Qwen3-14B, batch 16", "weights GB", "K and V GB", "floor ms a step", "tokens/s at it")
    return table(head, rows)


def round_floors(folder: Path) -> str:
    """What a round of each policy asks of an H100, by its data sheet."""
    from vase_kernels.evict import POLICIES  # imports Triton

    from benchmarks.eviction_case import Shape

    model, batch, window, budget = SHAPES["qwen3-14b"], 64, 64, 2048
    shape = Shape(
        layers=model.layers,
        kv_heads=model.kv_heads,
        group=model.heads // model.kv_heads,
        head_dim=model.head_dim,
        window=window,
        budget=budget,
        requests=batch,
    )
    steps = window * model.floor_seconds(batch, budget + window / 2, _H100_BYTES_PER_SECOND)
    counted = results.read(folder / "instructions.json")
    if Shape(**counted["settings"]) != dataclasses.replace(shape, layers=1, kv_heads=1, requests=1):
        raise ValueError("instructions.json is of another shape than the floors of a round")
    issued = {row["policy"]: sum(row["issued"].values()) for row in counted["samples"]}
    rows = []
    for policy in POLICIES:
        parts = (
            shape.floor_bytes(policy) / _H100_BYTES_PER_SECOND,
            shape.tensor_operations(policy) / _H100_TENSOR_OPERATIONS_PER_SECOND,
            shape.exponentials(policy) / _H100_EXPONENTIALS_PER_SECOND,
            issued[policy] * shape.places / _H100_INSTRUCTIONS_PER_SECOND,
        )
        rows.append(
            (
                policy,
                *(number(1e3 * part) if part else "" for part in parts),
                f"{number(100 * max(parts) / steps)} to {number(100 * sum(parts) / steps)} %",
            )
        )
    head = (
        f"Qwen3-14B, budget {budget:,}, {batch} requests due",
        *("bytes, ms", "tensor cores, ms", "exponentials, ms", "instructions, ms"),
        f"of {window} decode steps",
    )
    return table(head, rows)


def value_range() -> str:
    """Tokens per second by bytes alone: vase-attnv with cached value ranges over reading V anew.

    A cached range is 4 bytes a token, layer and head: it saves reading V of the budget's rows but
    the `window` new ones each round, and takes memory that would hold further requests.
    """
    shape, budget, memory = SHAPES["qwen3-14b"], 2048, 40e9
    ranges = 4 * shape.layers * shape.kv_heads
    rows = []
    for window in (16, 32, 64, 128, 256):
        told: list[str] = []
        for kv in (shape.kv_bytes_per_token, shape.kv_bytes_per_token // 2):
            speeds = []
            for column, read in ((0, budget), (ranges, window)):
                batch = memory / ((budget + window) * (kv + column))
                again = batch * (read * kv / 2 + (budget + window) * column) / window
                step = shape.weight_bytes + batch * (budget + window / 2) * kv + again
                if not column:
                    told.append(f"{number(100 * again / step)} %")
                speeds.append(batch / step)
            told += [f"{number(100 * ranges / kv)} %", f"{speeds[1] / speeds[0]:.3f}"]
        rows.append((str(window), *told))
    head = [
        f"{kind}: {what}"
        for kind in ("bf16", "fp8")
        for what in (
            "reading V, of a step's bytes",
            "cache, of KV memory",
            "tokens/s cached / read",
        )
    ]
    return table(("Qwen3-14B, budget 2,048, 40 GB for KV; window", *head), rows)


if __name__ == "__main__":
    sys.exit(main())
