"""The audit store: what is stored comes back, and nothing else can be done to it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import struct
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from tests.gateway.audit_records import execute, numbered
from tests.gateway.running import until
from vase_sgl.gateway.audit import AuditError, AuditStore, KeyRing, reading
from vase_sgl.gateway.audit.entries import hash_of, seal, summarize, unseal
from vase_sgl.gateway.tenants import Retention


@pytest.fixture
async def store(audit_url: str) -> AsyncIterator[AuditStore]:
    store = await AuditStore.open(audit_url, migrate=True)
    yield store
    await store.close()


async def problems(url: str) -> dict[str, str | None]:
    """Every tenant, with what is wrong with its chain."""
    async with reading.opened(url) as engine, reading.snapshot(engine) as connection:
        found = {}
        for tenant in await reading.tenants(connection):
            _, problem = await reading.verify(connection, tenant)
            found[tenant] = None if problem is None else str(problem)
        return found


async def test_a_record_comes_back_as_it_went_in(store: AuditStore, audit_url: str) -> None:
    for number, record in enumerate(
        [
            numbered(1),
            numbered(2, cache=None, eviction=None, round_digests=()),
            numbered(3, sampling={"max_new_tokens": 5}, output_token_ids=(), text=""),
        ],
        start=1,
    ):
        assert await store.append(record) == number
        found = await store.get("alice", record.record_id)
        assert found and found.record == record and found.sequence == number
    assert await store.get("bob", numbered(1).record_id) is None
    assert await store.get("alice", "nothing") is None
    assert await store.get("alice", "no\0thing") is None
    assert await problems(audit_url) == {"alice": None}


async def test_what_is_read_is_decoded_beside_the_event_loop(
    store: AuditStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.append(numbered(1))
    begun, go_on = threading.Event(), threading.Event()

    def long(decode: Callable[..., Any]) -> Callable[..., Any]:
        def decoded(*arguments: Any) -> Any:
            begun.set()
            assert go_on.wait(10)
            return decode(*arguments)

        return decoded

    for decode in (unseal, summarize):
        monkeypatch.setattr(f"vase_sgl.gateway.audit.store.{decode.__name__}", long(decode))
    for read in (
        store.get("alice", numbered(1).record_id),
        store.latest("alice", before=None, count=9),
    ):
        reading = asyncio.ensure_future(read)
        await until(begun.is_set)
        assert not reading.done()
        go_on.set()
        assert await reading
        begun.clear()
        go_on.clear()


async def test_pages_go_back_in_time(store: AuditStore) -> None:
    for number in range(5):
        await store.append(numbered(number, created_unix_micros=100 + number))
    await store.append(numbered(99, tenant="bob"))
    page = await store.latest("alice", before=None, count=3)
    assert [s.sequence for s in page] == [5, 4, 3]
    assert page[0].prompt_tokens == 3
    assert [s.sequence for s in await store.latest("alice", before=(3,), count=3)] == [2, 1]
    between = await store.latest(
        "alice", before=None, count=9, since_unix_micros=101, until_unix_micros=103
    )
    assert [s.created_unix_micros for s in between] == [102, 101]
    assert await store.tenants() == {"alice": 5, "bob": 1}


async def test_a_list_reads_no_content(tmp_path: Path) -> None:
    """Not even where SQLite keeps it in pages before what is listed."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'a.sqlite3'}"
    store = await AuditStore.open(url)
    for number in range(20):
        await store.append(numbered(number, text="x" * 2**19))
    await store.close()

    def bytes_read() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])

    store = await AuditStore.open(url)
    before = bytes_read()
    listed = await store.latest("alice", before=None, count=20)
    assert bytes_read() - before < 2 * 2**20
    found = await store.get("alice", listed[0].record_id)
    assert found is not None and listed[0].hash == found.hash
    await store.close()


async def test_many_at_once_are_few_commits_and_one_chain(
    store: AuditStore, audit_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    write = store._write

    async def counted(batch: list[object], **options: bool) -> object:
        batches.append(len(batch))
        return await write(batch, **options)

    monkeypatch.setattr(store, "_write", counted)
    records = [numbered(n, tenant=("alice", "bob")[n % 2]) for n in range(200)]
    sequences = await asyncio.gather(*map(store.append, records))
    stored = {
        (tenant, s.sequence): s.record_id
        for tenant in ("alice", "bob")
        for s in await store.latest(tenant, before=None, count=200)
    }
    for record, sequence in zip(records, sequences, strict=True):
        assert stored[record.tenant, sequence] == record.record_id
    assert sum(batches) == 200 and len(batches) < 50
    assert await store.tenants() == {"alice": 100, "bob": 100}
    assert await problems(audit_url) == {"alice": None, "bob": None}


async def test_two_gateways_append_to_one_chain(store: AuditStore, audit_url: str) -> None:
    second = await AuditStore.open(audit_url)
    await asyncio.gather(
        *((store, second)[n % 2].append(numbered(n, tenant=f"t{n % 3}")) for n in range(60)),
    )
    assert await problems(audit_url) == {"t0": None, "t1": None, "t2": None}
    assert await second.tenants() == {"t0": 20, "t1": 20, "t2": 20}
    await second.close()


async def test_a_record_cannot_be_stored_twice_and_its_neighbours_are(
    store: AuditStore, audit_url: str
) -> None:
    await store.append(numbered(1))
    results = await asyncio.gather(
        *map(store.append, (numbered(2), numbered(1), numbered(3))), return_exceptions=True
    )
    assert [isinstance(result, Exception) for result in results] == [False, True, False]
    assert [s.sequence for s in await store.latest("alice", before=None, count=9)] == [3, 2, 1]
    # Both in one batch, and one that cannot even be encoded.
    results = await asyncio.gather(
        *map(store.append, (numbered(4), numbered(4), numbered(5, failure="\ud800"), numbered(6))),
        return_exceptions=True,
    )
    assert sum(isinstance(result, Exception) for result in results) == 2
    assert [s.sequence for s in await store.latest("alice", before=None, count=2)] == [5, 4]
    assert await problems(audit_url) == {"alice": None}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE records SET created_unix_micros = 0",
        "DELETE FROM records WHERE sequence = 2",
        "DELETE FROM records",
        "UPDATE chains SET sequence = 1, hash = 'x'",
        "DELETE FROM chains",
        "INSERT INTO chains VALUES ('alice', 0, 'x')",
        "INSERT INTO records SELECT tenant, 1, 'other', 0, entry, payload, hash FROM records "
        "WHERE sequence = 2",
    ],
)
async def test_the_database_refuses_changes(
    store: AuditStore, audit_url: str, statement: str
) -> None:
    for number in range(3):
        await store.append(numbered(number))
    with pytest.raises(DBAPIError, match=r"append-only|only grows|duplicate key"):
        await execute(audit_url, statement)
    assert await problems(audit_url) == {"alice": None}
    assert len(await store.latest("alice", before=None, count=9)) == 3


async def test_each_database_refuses_its_own_way_around(store: AuditStore, audit_url: str) -> None:
    await store.append(numbered(1))
    statements = (
        ["TRUNCATE records", "TRUNCATE chains", "TRUNCATE checkpoints"]
        if audit_url.startswith("postgresql")
        else [
            "INSERT OR REPLACE INTO records SELECT * FROM records",
            "REPLACE INTO chains VALUES ('alice', 7, 'x')",
        ]
    )
    for statement in statements:
        with pytest.raises(DBAPIError, match=r"append-only|only grows"):
            await execute(audit_url, statement)
    assert await problems(audit_url) == {"alice": None}


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nonsense", "audit.url cannot be used"),
        ("sqlite+nodriver:///x", "audit.url cannot be used"),
        ("postgresql+psycopg2://x/y", "not one of sqlite.aiosqlite, postgresql.asyncpg"),
        ("sqlite+aiosqlite:////proc/nowhere/audit.sqlite3", "cannot open the audit store"),
        (
            "postgresql+asyncpg://me:secret@127.0.0.1:9/x",
            r"me:\*\*\*@127.0.0.1:9/x: .*(failed|refused)",
        ),
    ],
)
async def test_an_unusable_url_is_named(url: str, text: str) -> None:
    with pytest.raises(AuditError, match=text):
        await AuditStore.open(url)


def test_digests_can_be_computed_by_whoever_has_the_content() -> None:
    record = numbered(1, retention=Retention.HASH)
    sealed = seal(record, KeyRing({1: b"k" * 32}))
    assert sealed.payload is None
    digests = sealed.body["digests"]
    salt = bytes.fromhex(digests["salt"])
    prompt = struct.pack("<3i", *record.prompt_token_ids)
    output = struct.pack("<2i", *record.output_token_ids)
    assert digests["prompt"] == hashlib.sha256(salt + prompt).hexdigest()
    assert digests["output"] == hashlib.sha256(salt + output).hexdigest()
    assert digests["text"] == hashlib.sha256(salt + record.text.encode()).hexdigest()
    assert seal(record, KeyRing()).body["digests"]["text"] != digests["text"]


async def test_hashed_records_hold_no_content(store: AuditStore, audit_url: str) -> None:
    record = numbered(1, retention=Retention.HASH, prompt_token_ids=(777777,), text="sesame open")
    await store.append(record)
    found = await store.get("alice", record.record_id)
    assert found is not None
    assert found.record.digests is not None
    assert found.record == dataclasses.replace(
        record,
        prompt_token_ids=(),
        output_token_ids=(),
        text="",
        sampling={k: v for k, v in record.sampling.items() if k != "stop"},
        digests=found.record.digests,
    )
    async with reading.opened(audit_url) as engine, reading.snapshot(engine) as connection:
        (row,) = [row async for row in reading.rows_of(connection, "alice", after=0)]
    assert row.payload is None and "777777" not in row.entry and "sesame" not in row.entry
    assert await problems(audit_url) == {"alice": None}


def test_the_entry_is_pinned() -> None:
    """Another encoding would be another format: docs/audit.md and other verifiers rely on it."""
    row = seal(numbered(1), KeyRing()).at(7, "0" * 64)
    assert row.hash == hash_of(row.entry) == hashlib.sha256(row.entry.encode()).hexdigest()
    entry = json.loads(row.entry)
    assert entry["payload"] == {
        "key": None,
        "sha256": hashlib.sha256(row.payload or b"").hexdigest(),
    }
    assert row.hash == ("1c6ae243a22f093a5dbcc83f11f39984bb2c75c3bd5ef04e39944aa2b7f7075b")


async def test_a_sqlite_file_is_its_owners(tmp_path: Path) -> None:
    store = await AuditStore.open(f"sqlite+aiosqlite:///{tmp_path / 'a.sqlite3'}")
    await store.append(numbered(1))
    files = list(tmp_path.glob("a.sqlite3*"))
    assert len(files) == 3 and {file.stat().st_mode & 0o777 for file in files} == {0o600}
    await store.close()


async def test_a_sqlite_commit_is_synced(tmp_path: Path) -> None:
    from sqlalchemy import text

    store = await AuditStore.open(f"sqlite+aiosqlite:///{tmp_path / 'a.sqlite3'}")
    for engine in (store._engine, store._appending):
        async with engine.connect() as connection:
            assert (await connection.execute(text("PRAGMA journal_mode"))).scalar() == "wal"
            assert (await connection.execute(text("PRAGMA synchronous"))).scalar() == 2  # FULL
    await store.close()
