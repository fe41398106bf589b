"""The schema of the audit store: made, taken over from older versions, refused if unknown."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import create_async_engine

from tests.gateway.audit_records import RECORD, execute, numbered, tamper
from tests.gateway.test_audit_store import problems
from vase_sgl.gateway.audit import AuditError, AuditStore, RecordStatus
from vase_sgl.gateway.audit import schema as audit_schema
from vase_sgl.gateway.tenants import Retention

#: A database of the version without migrations: four records of alice, two of bob.
OLD = (Path(__file__).parent / "data" / "audit_schema_1.sql").read_text(encoding="utf-8")

#: What that version hashed record 1 of alice to.
OLD_TEXT = "né \U0001f600"


async def make_old(url: str) -> None:
    if url.startswith("sqlite"):
        file = Path(url.removeprefix("sqlite+aiosqlite:///"))
        file.parent.mkdir(parents=True)
        with sqlite3.connect(file) as connection:
            connection.executescript(OLD)
        connection.close()
        return
    import asyncpg

    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    # SQLite's dump in PostgreSQL's words: types, and blobs.
    script = OLD.replace("BLOB", "BYTEA").replace("BEGIN TRANSACTION", "BEGIN")
    script = script.replace("X'", "'\\x")
    await connection.execute(script)
    await connection.close()


@pytest.fixture
async def old(audit_url: str) -> str:
    await make_old(audit_url)
    return audit_url


async def test_an_older_store_is_taken_over_whole(old: str) -> None:
    store = await AuditStore.open(old, migrate=True)
    assert await store.tenants() == {"alice": 4, "bob": 2}
    assert await problems(old) == {"alice": None, "bob": None}
    first = await store.get("alice", numbered(1).record_id)
    assert first is not None and first.record.text == OLD_TEXT
    assert first.record.prompt_token_ids == RECORD.prompt_token_ids
    assert first.record.sampling == RECORD.sampling
    assert first.record.eviction == RECORD.eviction and first.record.cache == RECORD.cache
    assert first.record.retention is Retention.FULL and first.record.completion_tokens == 2
    assert first.record.seeds.sampling == 2**63 - 1 and first.record.seeds.origin is None
    (listed,) = await store.latest("alice", before=(4,), count=1)
    assert (listed.sequence, listed.status) == (3, RecordStatus.FAILED)
    assert (listed.prompt_tokens, listed.retention) == (3, Retention.FULL)
    failed = await store.get("alice", listed.record_id)
    assert failed is not None and failed.record.failure == "worker lost"
    # The chain goes on where it was.
    assert await store.append(numbered(5)) == 5
    assert await problems(old) == {"alice": None, "bob": None}
    await store.close()


@pytest.mark.parametrize("column", ["text", "finish_reason"])
async def test_damage_from_before_is_carried_over_and_found(old: str, column: str) -> None:
    await execute(old, f"UPDATE records SET {column} = 'other' WHERE tenant = 'bob'")
    await (await AuditStore.open(old, migrate=True)).close()
    found = await problems(old)
    assert found["alice"] is None and "altered at record" in str(found["bob"])


async def test_a_migration_is_whole_or_not_at_all(old: str) -> None:
    torn = "UPDATE records SET prompt_token_ids = substr(prompt_token_ids, 1, 3)"
    await execute(old, f"{torn} WHERE record_id LIKE '%66'")
    with pytest.raises(AuditError, match=r"records of tenant bob .*the store is as it was"):
        await AuditStore.open(old, migrate=True)
    engine = create_async_engine(old)
    async with engine.connect() as connection:
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    await engine.dispose()
    assert sorted(tables) == ["records", "schema_version"]


async def test_only_sqlite_migrates_by_itself(audit_url: str) -> None:
    if audit_url.startswith("sqlite"):
        await (await AuditStore.open(audit_url)).close()
        return
    with pytest.raises(AuditError, match="is empty; run `vase-sgl audit migrate`"):
        await AuditStore.open(audit_url)
    await make_old(audit_url)
    with pytest.raises(AuditError, match="has schema revision 0001, not 0002; run"):
        await AuditStore.open(audit_url)
    await (await AuditStore.open(audit_url, migrate=True)).close()
    await (await AuditStore.open(audit_url)).close()


async def test_gateways_that_start_together_migrate_once(old: str) -> None:
    stores = await asyncio.gather(*(AuditStore.open(old, migrate=True) for _ in range(4)))
    assert await stores[3].tenants() == {"alice": 4, "bob": 2}
    for store in stores:
        await store.close()


async def test_a_file_that_several_open_at_once_is_locked_for_none(tmp_path: Path) -> None:
    for number in range(8):
        url = f"sqlite+aiosqlite:///{tmp_path / f'{number}.sqlite3'}"
        await execute(url, "PRAGMA user_version = 0")  # a file without a write-ahead log
        opening = (AuditStore.open(url, migrate=True) for _ in range(6))
        for store in await asyncio.gather(*opening):
            await store.close()


async def test_a_store_of_a_newer_version_is_refused(audit_url: str) -> None:
    await (await AuditStore.open(audit_url, migrate=True)).close()
    await execute(audit_url, "UPDATE alembic_version SET version_num = '0099'")
    with pytest.raises(AuditError, match="schema revision 0099, which this version"):
        await AuditStore.open(audit_url, migrate=True)


async def test_somebody_elses_database_is_left_alone(audit_url: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    await execute(audit_url, "CREATE TABLE records (id INTEGER)")
    with pytest.raises(AuditError, match="not an audit store's; name another"):
        await AuditStore.open(audit_url, migrate=True)


@pytest.mark.xdist_group("postgres")
async def test_a_database_that_confirms_too_early_is_refused(postgres_url: str) -> None:
    await (await AuditStore.open(postgres_url, migrate=True)).close()
    name = postgres_url.rpartition("/")[2]
    await execute(postgres_url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    with pytest.raises(AuditError, match="commits that a crash would lose"):
        await AuditStore.open(postgres_url)


def test_the_tables_are_what_the_migrations_make(tmp_path: Path) -> None:
    """The code's tables and the migrations' say the same."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy import create_engine

    from vase_sgl.gateway.audit.tables import metadata

    engine = create_engine(f"sqlite:///{tmp_path / 'a.sqlite3'}")
    with engine.begin() as connection:
        audit_schema.upgrade(connection)
        context = MigrationContext.configure(
            connection,
            opts={"include_object": lambda thing, name, kind, *_: kind != "index"},
        )
        assert compare_metadata(context, metadata) == []


def test_the_migrations_are_in_the_wheel() -> None:
    """Packaged: found through the package, by setuptools' own rule."""
    from setuptools import find_packages

    assert "vase_sgl.gateway.audit.migrations.versions" in find_packages(include=["vase_sgl*"])
    assert audit_schema.newest() == "0002"


async def test_tampering_helpers_do_drop_the_triggers(audit_url: str) -> None:
    """Otherwise the tests of damage would prove nothing."""
    store = await AuditStore.open(audit_url, migrate=True)
    await store.append(numbered(1))
    await tamper(audit_url, "DELETE FROM records")
    assert await store.tenants() == {}
    await store.close()
