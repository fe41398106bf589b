"""Appends per second to the audit store: a commit per record against group commit.

    python benchmarks/audit.py [--url postgresql+asyncpg://…] [--verify] [--json results.json]

Both take the same records from the same number of callers, who each wait until their record is
durable; they alternate within one run, and the ratio of the medians is the result. Beside it is
how late a 1 ms timer of the same event loop fires meanwhile, which is what appending costs other
streams. Without --url: SQLite files in a temporary folder under --folder, so on that disk. A
PostgreSQL is to be an empty, migrated database; the records stay in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import resource
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from vase_sgl.gateway.audit import AuditStore, Record, RecordStatus, Timings, reading
from vase_sgl.gateway.audit.group_commit import GroupCommit
from vase_sgl.gateway.seeds import SeedOrigin, Seeds
from vase_sgl.gateway.tenants import Retention, SeedPolicy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="a migrated, empty store; default: new SQLite files")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--records", type=int, default=1000, help="per measurement")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=1000, help="output tokens per record")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--verify", action="store_true", help="then verify, and time that too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = asyncio.run(_measure_all(arguments, Path(folder)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


async def _measure_all(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    results = []
    print("callers   alone/s   group/s  ratio   late p99 ms: alone, group")
    for callers in arguments.callers:
        rates: dict[str, list[float]] = {"alone": [], "group": []}
        late: dict[str, list[float]] = {"alone": [], "group": []}
        for repeat in range(arguments.repeats):
            for mode in ("alone", "group"):
                url = arguments.url or f"sqlite+aiosqlite:///{folder}/{callers}-{mode}-{repeat}.db"
                rate, lateness = await _measure(url, mode, callers, arguments)
                rates[mode].append(rate)
                late[mode].append(lateness)
        alone, group = (statistics.median(rates[mode]) for mode in ("alone", "group"))
        p99 = {mode: 1000 * statistics.median(late[mode]) for mode in late}
        print(
            f"{callers:>7} {alone:>9.0f} {group:>9.0f} {group / alone:>6.2f} "
            f"{p99['alone']:>13.1f} {p99['group']:>13.1f}"
        )
        results.append(
            {"callers": callers, "rates": rates, "ratio": group / alone, "late_p99": p99}
        )
    if arguments.verify:
        await _verify(url)
    return results


async def _measure(
    url: str, mode: str, callers: int, arguments: argparse.Namespace
) -> tuple[float, float]:
    """Appends per second, and the 99th percentile of the timer's lateness in seconds."""
    store = await AuditStore.open(url)
    if mode == "alone":
        group = store._commits
        store._commits = GroupCommit(
            group._commit,
            retry_alone=group._retry_alone,
            size=group._size,
            max_bytes=group._max_bytes,
            max_items=1,
        )
    left = iter([_record(arguments.tokens) for _ in range(arguments.records)])

    async def caller() -> None:
        for record in left:
            await store.append(record)

    lateness: list[float] = []
    timer = asyncio.create_task(_watch(lateness))
    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    seconds = time.perf_counter() - begun
    timer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await timer
    await store.close()
    return arguments.records / seconds, sorted(lateness)[int(0.99 * len(lateness))]


async def _watch(lateness: list[float]) -> None:
    while True:
        due = time.perf_counter() + 0.001
        await asyncio.sleep(0.001)
        lateness.append(time.perf_counter() - due)


async def _verify(url: str) -> None:
    async with reading.opened(url) as engine, reading.snapshot(engine) as connection:
        for tenant in await reading.tenants(connection):
            begun = time.perf_counter()
            check, problem = await reading.verify(connection, tenant)
            seconds = time.perf_counter() - begun
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(
                f"verify: {check.records} records in {seconds:.1f} s, "
                f"{problem or 'whole'}; the process peaked at {peak} MiB"
            )


def _record(tokens: int) -> Record:
    return dataclasses.replace(
        _TEMPLATE,
        record_id=uuid.uuid4().hex,
        created_unix_micros=time.time_ns() // 1000,
        output_token_ids=tuple(range(100_000, 100_000 + tokens)),
        text="token " * tokens,
        completion_tokens=tokens,
    )


_TEMPLATE = Record(
    record_id="",
    tenant="bench",
    created_unix_micros=0,
    status=RecordStatus.COMPLETED,
    failure="",
    input_kind="text",
    prompt_token_ids=tuple(range(100)),
    sampling={"max_new_tokens": 1000, "temperature": 0.6, "stop": [], "sampling_seed": 1},
    eviction={"budget": 2048, "window": 64, "policy": "vase-attnv", "prompt": "evict", "seed": 1},
    seeds=Seeds(1, 1, SeedPolicy.DERIVED, 1, SeedOrigin.REQUEST_ID, None),
    sample_index=0,
    output_token_ids=(),
    text="",
    finish_reason="length",
    cache=None,
    round_digests=("0123456789abcdef",) * 16,
    fingerprint={"model": "bench"},
    timings=Timings(0.0, 0.1, 1.0),
    retention=Retention.FULL,
    prompt_tokens=100,
    completion_tokens=0,
)


if __name__ == "__main__":
    main()
