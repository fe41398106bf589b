"""Ratios of every part in a few minutes, against the committed baseline: `make bench-quick`.

    python -m benchmarks.quick [--only kernels gateway] [--write-baseline]

For a change at hand: is something much worse than before? Small sizes, so only large changes show;
claims come from the benchmarks themselves. A ratio outside its tolerance is marked, and the exit
status is 0 nevertheless, as is a part that fails: a busy machine is no bug.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, describe, machine_line
from benchmarks.results import number, table

BASELINE = ROOT / "benchmarks" / "baseline_cpu.json"
#: A ratio may be so much worse, by its own size; parts of time are noisier than rates.
_TOLERANCE = {"higher": 0.25, "lower": 0.5}
_PART_SECONDS = 240

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """command: of `python`, with the word `{json}` for its result, or `{folder}` and `{name}`.
    ratios: name -> (value, better)."""

    name: str
    command: tuple[str, ...]
    ratios: Callable[[Report], dict[str, tuple[float | None, str]]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument(
        "--write-baseline", action="store_true", help=f"keep the ratios in {BASELINE.name}"
    )
    chosen = parser.parse_args(argv)
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"ratios": {}}
    environment = describe()
    found: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        if not chosen.only or part.name in chosen.only:
            found |= measured(part)
    print(machine_line(environment))
    if "environment" in baseline:
        print(f"baseline: {machine_line(baseline['environment'])}")
    print(compared(found, baseline["ratios"]))
    if chosen.write_baseline:
        kept = {} if not chosen.only else baseline["ratios"]
        report = {"environment": environment, "ratios": kept | found}
        BASELINE.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measured(part: Part) -> dict[str, dict[str, Any]]:
    """Run one part; nothing, and a word about it, if it fails."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{part.name}.json"
        places = {"{json}": str(path), "{folder}": folder, "{name}": part.name}
        command = [places.get(word, word) for word in part.command]
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        try:
            subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                check=True,
                capture_output=True,
                text=True,
                timeout=_PART_SECONDS,
            )
            ratios = part.ratios(json.loads(path.read_text()))
        except subprocess.CalledProcessError as error:
            print(f"{part.name} failed: {error.stderr.strip()[-500:]}", file=sys.stderr)
            return {}
        except subprocess.TimeoutExpired:
            print(f"{part.name} took more than {_PART_SECONDS} s: left out", file=sys.stderr)
            return {}
    print(f"{part.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        name: {"value": value, "better": better}
        for name, (value, better) in ratios.items()
        if value is not None
    }


def compared(found: dict[str, dict[str, Any]], baseline: dict[str, dict[str, Any]]) -> str:
    """The table."""
    rows = []
    for name in dict.fromkeys([*baseline, *found]):
        now = found.get(name, {}).get("value")
        then = baseline.get(name, {}).get("value")
        better = (found.get(name) or baseline[name])["better"]
        rows.append((name, number(now), number(then), better, verdict(now, then, better)))
    return table(("ratio", "now", "baseline", "better", ""), rows)


def verdict(now: float | None, then: float | None, better: str) -> str:
    if now is None:
        return "not measured"
    if then is None:
        return "no baseline"
    tolerance = _TOLERANCE[better]
    worse = now < then * (1 - tolerance) if better == "higher" else now > then * (1 + tolerance)
    return "WORSE" if worse else "as before"


def _serving(report: Report) -> dict[str, tuple[float | None, str]]:
    lines = {line["arm"]: line for line in report["summary"]}
    return {
        f"serving: {arm} over stock, tokens/s": (
            lines[arm]["tokens_per_second_over_stock"],
            "higher",
        )
        for arm in ("full", "budget")
    }


def _overhead(report: Report) -> dict[str, tuple[float | None, str]]:
    (line,) = report["summary"]
    over = line["overhead"]
    return {
        "overhead: time per token over full KV": (None if over is None else 1 + over, "lower"),
        **{
            f"overhead: {part}, share of decode": (line["shares"][part], "lower")
            for part in ("eviction", "query ring", "scheduler")
        },
    }


def _kernels(report: Report) -> dict[str, tuple[float | None, str]]:
    return {
        f"kernels: {row['policy']}, torch reference over floor": (
            row["reference_ms"] / row["floor_ms"],
            "lower",
        )
        for row in report["results"]
    }


def _gateway(report: Report) -> dict[str, tuple[float | None, str]]:
    return {"gateway: tokens/s over direct": (report["tokens_per_second"]["ratio"], "higher")}


_WORKER = ("--output", "{folder}", "--name", "{name}")
PARTS = (
    Part(
        "kernels",
        (
            *("-m", "benchmarks.kernels", "--budgets", "512", "--repeats", "5"),
            *("--policies", "vase-attnv", "vase-dkv", "random", "--json", "{json}"),
        ),
        _kernels,
    ),
    Part(
        "gateway",
        (
            *("-m", "benchmarks.gateway", "--json", "{json}", "--repeats", "2", "--idle", "50"),
            *("--calls", "10", "--tokens", "128"),
        ),
        _gateway,
    ),
    Part(
        "serving",
        (
            *("-m", "benchmarks.serving", "--cells", "8x64", "--seconds", "20", "--rounds", "2"),
            *("--cut", "--budget", "48", "--window", "16", *_WORKER),
        ),
        _serving,
    ),
    Part(
        "overhead",
        (
            *("-m", "benchmarks.overhead", "--windows", "64", "--budget", "128"),
            *("--steps", "64", "--rounds", "2", *_WORKER),
        ),
        _overhead,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
