"""Compare two results: `python loadtest/compare.py A.json B.json` prints ratios B / A.

Standard library only. Says first in what the two tests differ: a ratio means something when that
is the one thing that was changed. Exit status 2 for a file that is not a result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_FORMAT = "vase-sgl-loadtest/1"
_COUNTED = (
    "completed",
    "failed",
    "rejected",
    "unfinished",
    "completed_per_second",
    "output_tokens_per_second",
    "failure_ratio",
    "rejection_ratio",
    "replay_match_ratio",
)
_DURATIONS = ("ttft_ms", "tpot_ms", "e2e_ms", "queue_ms", "replay_ms")
_STATISTICS = ("mean", "p50", "p95", "p99")


class NotAResult(Exception):
    """The file is not a result of a load test."""


def read(path: Path) -> dict[str, Any]:
    """A result. Raises `NotAResult`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotAResult(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise NotAResult(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise NotAResult(f"{path} is not a result of a load test ({_FORMAT}); --result writes one")
    return content


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """What was not the same in the two tests, a line each."""
    for place in ("users", "run_time", "options", "environment"):
        yield from _differ(place, a[place], b[place])
    for place in ("target", "fingerprint", "total_slots"):
        yield from _differ(f"gateway.{place}", a["gateway"][place], b["gateway"][place])
    for name, result in (("A", a), ("B", b)):
        for problem in result["problems"]:
            yield f"{name} is not complete: {problem}"


def _differ(where: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differ(f"{where}.{key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{where}: {a} | {b}"


def ratios(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[tuple[str, float | None, float | None, float | None]]:
    """Name, value in A, value in B, B / A; None for what was not measured or has no ratio."""
    yield from _ratios("", a["all"], b["all"])
    common = [name for name in a["tenants"] if name in b["tenants"]]
    for name in common if len(common) > 1 else ():
        yield from _ratios(f"{name}: ", a["tenants"][name], b["tenants"][name])


def _ratios(
    prefix: str, a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[tuple[str, float | None, float | None, float | None]]:
    pairs = [(name, a[name], b[name]) for name in _COUNTED]
    for name in _DURATIONS:
        pairs += [
            (f"{name} {key}", (a[name] or {}).get(key), (b[name] or {}).get(key))
            for key in _STATISTICS
        ]
    for name, left, right in pairs:
        if left is not None or right is not None:
            ratio = right / left if left and right is not None else None
            yield prefix + name, left, right, ratio


def table(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """A Markdown table of the ratios."""
    lines = ["| | A | B | B / A |", "|---|---:|---:|---:|"]
    for name, left, right, ratio in ratios(a, b):
        lines.append(f"| {name} | {_text(left)} | {_text(right)} | {_text(ratio)} |")
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare two results of load tests.")
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    arguments = parser.parse_args()
    try:
        a, b = read(arguments.a), read(arguments.b)
    except NotAResult as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    differing = list(differences(a, b))
    print("The tests differ in:" if differing else "The tests were set up alike.")
    for line in differing:
        print(f"- {line}")
    print()
    print(table(a, b))
    return 0


if __name__ == "__main__":
    sys.exit(main())
