"""The audit store when it shares its database, and when its database fails."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy.exc
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.gateway.audit_records import numbered
from tests.gateway.running import Running, run_gateway, until
from tests.gateway.test_audit_store import problems
from vase_sgl.client import Unavailable
from vase_sgl.gateway.audit import AuditError, AuditStore, database, pruning, reading
from vase_sgl.gateway.audit.group_commit import GroupCommit
from vase_sgl.gateway.errors import AuditUnavailable


async def test_processes_share_a_chain(audit_url: str) -> None:
    """No fork and no lost record, with two processes that append to the same three chains."""
    await (await AuditStore.open(audit_url, migrate=True)).close()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.append_process", audit_url, str(first), "150"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for first in (0, 1000)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
    for process in processes:
        process.communicate(b"\n", timeout=60)
        assert process.returncode == 0
    assert await problems(audit_url) == {"t0": None, "t1": None, "t2": None}
    store = await AuditStore.open(audit_url)
    assert sum((await store.tenants()).values()) == 300
    ids = {s.record_id for t in range(3) for s in await store.latest(
        f"t{t}", before=None, count=999)}  # fmt: skip
    assert len(ids) == 300
    await store.close()


async def test_a_confirmation_that_got_lost_stores_nothing_twice(
    audit_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await AuditStore.open(audit_url, migrate=True)
    write = store._write

    async def lost(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(store, "_write", write)
        await write(*arguments, **options)
        raise ConnectionResetError("the commit happened, its answer did not arrive")

    monkeypatch.setattr(store, "_write", lost)
    sequences = await asyncio.gather(store.append(numbered(1)), store.append(numbered(2)))
    assert sequences == [1, 2]
    assert await store.tenants() == {"alice": 2}
    assert await problems(audit_url) == {"alice": None}
    await store.close()


async def test_a_locked_database_is_unavailable_and_then_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_PATIENCE_SECONDS", 0.1)
    async with run_gateway(tmp_path) as running:
        other = sqlite3.connect(tmp_path / "audit.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="audit store cannot be written now; try again"):
            await running.client.generate_once("tell me", max_new_tokens=2)
        # Nothing is computed that could not be recorded.
        with pytest.raises(Unavailable, match="so nothing is generated"):
            await running.client.generate_once("tell me", max_new_tokens=2)
        assert len(running.worker.bodies) == 1
        other.execute("ROLLBACK")
        other.close()
        await _works_again(running)
        assert await problems(running.audit_url) == {"alice": None}


@pytest.mark.xdist_group("postgres")
async def test_a_postgresql_that_goes_away_and_comes_back(
    tmp_path: Path, postgres: str, postgres_url: str
) -> None:
    await (await AuditStore.open(postgres_url, migrate=True)).close()
    name = postgres_url.rpartition("/")[2]
    admin = await asyncpg.connect(postgres.replace("+asyncpg", "") + "/postgres")
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    async with run_gateway(tmp_path, audit={"url": postgres_url}) as running:
        await running.client.generate_once("tell me", max_new_tokens=2)
        await admin.execute(cut)  # as a restart does: not seen by clients
        await running.client.generate_once("tell me", max_new_tokens=2)
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await admin.execute(cut)
        with pytest.raises(Unavailable, match="audit store cannot be written now"):
            await running.client.generate_once("tell me", max_new_tokens=2)
        with pytest.raises(Unavailable, match="audit store cannot be read now"):
            _ = [r async for r in running.client.list_records()]
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await _works_again(running)
        assert len([r async for r in running.client.list_records()]) == 3
        assert await problems(postgres_url) == {"alice": None}
    await admin.close()


@pytest.mark.xdist_group("postgres")
async def test_a_session_that_can_only_read_is_left(postgres: str, postgres_url: str) -> None:
    """As one that was begun in a failover, while the name still led to a standby."""
    store = await AuditStore.open(postgres_url, migrate=True)
    await store.append(numbered(1))
    name = postgres_url.rpartition("/")[2]
    admin = await asyncpg.connect(postgres.replace("+asyncpg", "") + "/postgres")
    await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await admin.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    )
    with pytest.raises(AuditUnavailable):
        await store.append(numbered(2))
    await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
    await admin.close()
    assert await store.append(numbered(3)) == 2
    await store.close()


@pytest.mark.xdist_group("postgres")
async def test_a_connection_to_postgresql_is_kept_alive_and_not_kept_for_long(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the network forgot without a word would hold up every answer for half a minute."""
    await (await AuditStore.open(postgres_url, migrate=True)).close()
    store = await AuditStore.open(postgres_url)
    async with store._appending.connect() as connection:
        raw = await connection.get_raw_connection()
        transport: asyncio.Transport = raw.driver_connection._transport  # type: ignore[union-attr]
        connected = transport.get_extra_info("socket")
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
    await store.close()
    monkeypatch.setattr(database, "_RECYCLE_SECONDS", 0.2)
    store = await AuditStore.open(postgres_url)

    async def session() -> int:
        async with store._appending.connect() as connection:
            number: int = await connection.scalar(sqlalchemy.text("SELECT pg_backend_pid()"))
            return number

    first = await session()
    assert await session() == first
    await asyncio.sleep(0.3)
    assert await session() != first
    await store.close()


@pytest.mark.parametrize("memory", [True, False])
async def test_a_failed_append_is_tried_again_on_a_new_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    """But in a store in memory, which would be gone with it."""
    store = await AuditStore.open(
        f"sqlite+aiosqlite:///{':memory:' if memory else tmp_path / 'audit.sqlite3'}"
    )
    await store.append(numbered(1))
    pool, write = store._appending.pool, store._write

    async def fail(*_: Any) -> Any:
        monkeypatch.setattr(store, "_write", write)
        raise ConnectionResetError

    monkeypatch.setattr(store, "_write", fail)
    assert await store.append(numbered(2)) == 2
    assert (store._appending.pool is pool) == memory
    await store.close()


async def _works_again(running: Running) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await running.client.generate_once("tell me", max_new_tokens=2)
            except Unavailable:
                await asyncio.sleep(0.2)
            else:
                return


@pytest.mark.xdist_group("postgres")
async def test_a_gateway_that_hangs_does_not_keep_a_chain_locked(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped, or behind a cut network, after it took its turn."""
    await (await AuditStore.open(postgres_url, migrate=True)).close()  # with all patience
    monkeypatch.setattr(database, "_PATIENCE_SECONDS", 1)
    store = await AuditStore.open(postgres_url)
    hanging = await AuditStore.open(postgres_url)
    await store.append(numbered(1))
    taken, over = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        async with database.writing(hanging._engine) as connection:
            await hanging._lock(connection, {"alice"})
            taken.set()
            await over.wait()

    task = asyncio.create_task(hang())
    await taken.wait()
    assert await asyncio.wait_for(store.append(numbered(2)), 5) == 2
    over.set()
    with pytest.raises(sqlalchemy.exc.DBAPIError):  # the driver has several words
        await task
    assert await problems(postgres_url) == {"alice": None}
    await store.close()
    await hanging.close()


@asynccontextmanager
async def no_connection_free(engine: AsyncEngine) -> AsyncIterator[None]:
    """All connections of the engine are taken, as by work that hangs in the database."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine.pool, "_timeout", 0.1)
        async with AsyncExitStack() as taken:
            with contextlib.suppress(sqlalchemy.exc.TimeoutError):
                while True:
                    await taken.enter_async_context(engine.connect())
            yield


async def test_reads_that_hang_keep_no_record_from_being_written(audit_url: str) -> None:
    store = await AuditStore.open(audit_url, migrate=True)
    await store.append(numbered(1))
    async with no_connection_free(store._engine):
        with pytest.raises(AuditUnavailable, match="audit store cannot be read now"):
            await store.get("alice", numbered(1).record_id)
        assert await store.append(numbered(2)) == 2
    assert await store.tenants() == {"alice": 2}
    assert await problems(audit_url) == {"alice": None}
    await store.close()


async def test_a_read_that_gets_no_connection_is_told_so_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_POOL_SECONDS", 0.1)
    async with run_gateway(tmp_path) as running, AsyncExitStack() as taken:
        engine = running.gateway._store._engine
        for _ in range(15):  # SQLAlchemy's pool: 5, and 10 more
            await taken.enter_async_context(engine.connect())
        with pytest.raises(Unavailable, match="audit store cannot be read now; try again later"):
            await running.client.get_record("a" * 32, timeout=15)


@pytest.mark.xdist_group("postgres")
async def test_a_statement_that_takes_too_long_is_named(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The exception of a time limit has no text of its own."""
    await (await AuditStore.open(postgres_url, migrate=True)).close()
    monkeypatch.setitem(database._CONNECT_ARGS["postgresql+asyncpg"], "command_timeout", 0.5)
    store = await AuditStore.open(postgres_url)
    other = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
    async with other.transaction():
        await other.execute("LOCK TABLE records, chains")
        with pytest.raises(AuditUnavailable, match="cannot be read now"):
            await store.get("alice", numbered(1).record_id)
        assert "the audit store cannot be read: TimeoutError" in caplog.text
        with pytest.raises(AuditError, match="the audit store failed: TimeoutError"):
            async with reading.opened(postgres_url) as engine:
                await pruning.prune(engine, "alice", before_unix_micros=1, by="me")
    await other.close()
    await store.close()


async def test_an_append_that_gets_no_connection_is_a_failed_write(audit_url: str) -> None:
    """One failure for the whole batch, not one more for each of its records."""
    store = await AuditStore.open(audit_url, migrate=True)
    async with no_connection_free(store._appending):
        results = await asyncio.gather(
            *(store.append(numbered(n)) for n in range(5)), return_exceptions=True
        )
        assert [type(result) for result in results] == [AuditUnavailable] * 5
        # The first may have been alone in its batch.
        assert store.write_failures in (1, 2)
        with pytest.raises(AuditUnavailable, match="so nothing is generated"):
            store.check()
    assert await store.append(numbered(6)) == 1
    store.check()
    await store.close()


async def test_a_stopped_store_has_committed_what_waited(audit_url: str) -> None:
    store = await AuditStore.open(audit_url, migrate=True)
    waiting = [asyncio.create_task(store.append(numbered(n))) for n in range(50)]
    await asyncio.gather(*waiting[:1])
    await store.close()
    assert all(task.done() and task.exception() is None for task in waiting)
    assert await problems(audit_url) == {"alice": None}


async def test_back_pressure_instead_of_loss(
    audit_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database stalls, appends wait; none is dropped or answered early."""
    store = await AuditStore.open(audit_url, migrate=True)
    go_on = asyncio.Event()
    write = store._write

    async def stalled(*arguments: Any, **options: Any) -> Any:
        await go_on.wait()
        return await write(*arguments, **options)

    monkeypatch.setattr(store, "_write", stalled)
    store._commits._queue._maxsize = 20  # type: ignore[attr-defined]
    waiting = [asyncio.create_task(store.append(numbered(n))) for n in range(100)]
    await until(lambda: store._commits._queue.qsize() == 20)
    assert not any(task.done() for task in waiting)
    go_on.set()
    assert len(await asyncio.gather(*waiting)) == 100
    assert await problems(audit_url) == {"alice": None}
    await store.close()


async def test_the_writer_says_what_it_says_in_no_callers_name() -> None:
    """Its task is begun by the first caller and lives as long as the process."""
    name: ContextVar[str] = ContextVar("name", default="nobody")
    seen: list[str] = []

    async def commit(batch: Sequence[int]) -> Sequence[int]:
        seen.append(name.get())
        return batch

    commits = GroupCommit(commit, retry_alone=lambda error: False, size=lambda item: 1, max_bytes=9)
    name.set("alice")
    await commits.submit(1)
    await commits.close()
    assert seen == ["nobody"]


@pytest.mark.parametrize("failing", [False, True])
async def test_who_gives_up_waiting_for_a_commit_harms_no_other(failing: bool) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def commit(batch: Sequence[int]) -> Sequence[int]:
        begun.set()
        await go_on.wait()
        if failing and 1 in batch:
            raise OSError("disk full")
        return batch

    commits = GroupCommit(commit, retry_alone=lambda error: False, size=lambda item: 1, max_bytes=9)
    waiting = asyncio.create_task(commits.submit(1))
    await begun.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    go_on.set()
    assert await asyncio.wait_for(commits.submit(2), 5) == 2
    await commits.close()
