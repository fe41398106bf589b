"""What a test found, as one JSON document."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loadtest.problems import BadSetup
from loadtest.rows import VERDICTS, Row

FORMAT = "vase-sgl-loadtest/1"

_PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
#: Rows that are distributions of a duration, by their name in the result.
_DURATIONS = {"ttft_ms": "ttft", "tpot_ms": "tpot", "e2e_ms": "e2e", "queue_ms": "queue"}


def summary(rows: Iterable[Row], seconds: float) -> dict[str, Any]:
    """Counts, rates and distributions of some tenants' rows over `seconds` of test.

    A rate or distribution of nothing is None.
    """
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row)

    def count(kind: str) -> int:
        return sum(row.count for row in by_kind.get(kind, ()))

    def size(kind: str) -> int:
        return sum(row.size for row in by_kind.get(kind, ()))

    completed = count("e2e")
    failed = sum(row.failures for kind in ("generate", "replay") for row in by_kind.get(kind, ()))
    finished = count("generate") + count("replay")
    rejected = count("rejected")
    verdicts = {verdict: count(verdict) for verdict in VERDICTS}
    # Those of answers that were cut short are output as well: long ones would else not count.
    output_tokens = size("generate") + size("unfinished")
    return {
        "completed": completed,
        "failed": failed,
        "rejected": rejected,
        "unfinished": count("unfinished"),
        "failure_ratio": _ratio(failed, finished),
        "rejection_ratio": _ratio(rejected, finished + rejected),
        "prompt_tokens": size("ttft"),
        "output_tokens": output_tokens,
        "completed_per_second": _ratio(completed, seconds),
        "output_tokens_per_second": _ratio(output_tokens, seconds),
        **{name: _distribution(by_kind.get(kind, ())) for name, kind in _DURATIONS.items()},
        "replays": verdicts,
        "replay_match_ratio": _ratio(verdicts["MATCH"], sum(verdicts.values())),
        "replay_ms": _distribution(by_kind.get("replay", ())),
    }


def environment() -> dict[str, Any]:
    """What the test itself ran on."""
    packages = ("vase-sgl", "locust", "grpcio", "gevent")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def document(
    rows: list[Row], started: float, seconds: float, problems: list[str], **more: Any
) -> dict[str, Any]:
    """The result. started: seconds since the epoch. problems: why it is not complete."""
    tenants = sorted({row.tenant for row in rows})
    return {
        "format": FORMAT,
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(),
        "seconds": seconds,
        "problems": problems,
        "environment": environment(),
        **more,
        "all": summary(rows, seconds),
        "tenants": {
            name: summary([row for row in rows if row.tenant == name], seconds) for name in tenants
        },
    }


def write(where: str, result: Mapping[str, Any]) -> None:
    """Write the document to a file, folders included, or for `-` to standard output.

    Raises `BadSetup`.
    """
    if where == "-":
        print(json.dumps(result, indent=1), flush=True)
        return
    path = Path(where)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadSetup(f"cannot write the result {path}: {error.strerror}") from error


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _distribution(rows: Iterable[Row]) -> dict[str, float] | None:
    histogram: dict[float, int] = {}
    total = most = 0.0
    for row in rows:
        total += row.total_ms
        most = max(most, row.max_ms)
        for value, times in row.histogram.items():
            histogram[value] = histogram.get(value, 0) + times
    count = sum(histogram.values())
    if count == 0:
        return None
    return {
        "count": count,
        "mean": total / count,
        **{name: min(_percentile(histogram, q), most) for name, q in _PERCENTILES.items()},
        "max": most,
    }


def _percentile(histogram: Mapping[float, int], share: float) -> float:
    """The smallest value that at least `share` of all are not above."""
    left = math.ceil(share * sum(histogram.values()))
    for value in sorted(histogram):
        left -= histogram[value]
        if left <= 0:
            return value
    raise ValueError("an empty histogram has no percentiles")
