"""Long chains: no statement looks at all of one, for a statement's time is limited."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.gateway.audit_records import execute, numbered
from vase_sgl.gateway.audit import AuditStore, pruning, reading

#: Records of alice. Record n arrived at n milliseconds.
LENGTH = 4000


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'a.sqlite3'}"
    store = await AuditStore.open(url)
    await store.append(numbered(1, created_unix_micros=1000))
    await store.append(numbered(LENGTH + 1, tenant="bob"))
    await store.close()
    await execute(
        url,
        f"WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < {LENGTH}) "
        "INSERT INTO records SELECT tenant, i, printf('%032d', i), i * 1000, entry, payload, hash "
        "FROM n JOIN records WHERE tenant = 'alice' AND sequence = 1",
    )
    yield url


async def counted(engine: AsyncEngine) -> list[int]:
    """Of each statement from now on, the instructions that SQLite takes for it, in hundreds."""
    counts: list[int] = []

    def tick() -> None:
        counts[-1] += 1

    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        await raw.set_progress_handler(tick, 100)  # stays on the pool's only connection
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: counts.append(0))
    return counts


async def test_what_a_prune_would_remove_is_found_in_pages(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_PAGE", 100)
    async with reading.opened(url) as engine:
        counts = await counted(engine)
        async with reading.snapshot(engine) as connection:
            assert await reading.tenants(connection) == ["alice", "bob"]
            due = await pruning.due(connection, "alice", 3950 * 1000)
            assert due == pruning.Pruned("alice", 3949, 3949, (3950, 3950 * 1000))
            due = await pruning.due(connection, "alice", 10**9)
            assert due == pruning.Pruned("alice", LENGTH, LENGTH, None)
    assert max(counts) * 100 < LENGTH


async def test_records_of_a_time_are_found_without_the_others(url: str) -> None:
    store = await AuditStore.open(url)
    counts = await counted(store._engine)

    async def listed(**options: Any) -> list[int]:
        found = await store.latest("alice", count=50, by_arrival=True, **options)
        return [s.sequence for s in found]

    since, place = 2000 * 1000, (2020 * 1000, 2020)
    assert await listed(before=None, since_unix_micros=since) == list(range(4000, 3950, -1))
    assert await listed(before=place, since_unix_micros=since) == list(range(2019, 1999, -1))
    assert await listed(before=None, until_unix_micros=since) == list(range(1999, 1949, -1))
    assert await listed(before=None, since_unix_micros=10**9) == []
    assert max(counts) * 100 < LENGTH
    await store.close()
