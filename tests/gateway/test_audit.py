"""The audit store: what is stored comes back, chains hold, damage is found."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vase_sgl.gateway.audit import AuditError, AuditStore, Record, RecordStatus, Timings
from vase_sgl.gateway.audit.chain import chain_hash
from vase_sgl.gateway.seeds import Seeds
from vase_sgl.gateway.tenants import SeedPolicy
from vase_sgl.gateway.workers import CacheStats

RECORD = Record(
    record_id="0" * 32,
    tenant="alice",
    created_unix_micros=1_700_000_000_000_001,
    status=RecordStatus.COMPLETED,
    failure="",
    input_kind="text",
    prompt_token_ids=(1, 2, 2**31 - 1),
    sampling={"max_new_tokens": 5, "temperature": 0.1, "stop": ["é"], "sampling_seed": 2**63 - 1},
    eviction={"budget": 32, "window": 8, "policy": "random", "prompt": "evict", "seed": 2**63 - 1},
    seeds=Seeds(2**63 - 1, 0, SeedPolicy.CLIENT, 1),
    sample_index=0,
    output_token_ids=(3, 4),
    text="né \U0001f600",
    finish_reason="length",
    cache=CacheStats(5, 5, 1, 8, 40, "ff" * 8),
    round_digests=("ff" * 8,),
    fingerprint={"model": "m"},
    timings=Timings(0.1, None, 1 / 3),
)


def numbered(number: int, **fields: object) -> Record:
    return dataclasses.replace(RECORD, record_id=f"{number:032x}", **fields)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "audit.sqlite3"


@pytest.fixture
async def store(file: Path) -> AsyncIterator[AuditStore]:
    store = await AuditStore.open(f"sqlite+aiosqlite:///{file}")
    yield store
    await store.close()


async def test_a_record_comes_back_as_it_went_in(store: AuditStore) -> None:
    for number, record in enumerate(
        [numbered(1), numbered(2, cache=None, eviction=None, round_digests=())], start=1
    ):
        stored = await store.append(record)
        found = await store.get("alice", record.record_id)
        assert found == stored and found.record == record and found.sequence == number
    assert await store.get("bob", numbered(1).record_id) is None
    assert await store.get("alice", "nothing") is None


async def test_pages_go_back_in_time(store: AuditStore) -> None:
    for number in range(5):
        await store.append(numbered(number))
    await store.append(numbered(99, tenant="bob"))
    page = await store.latest("alice", before=None, count=3)
    assert [s.sequence for s in page] == [5, 4, 3]
    assert [s.sequence for s in await store.latest("alice", before=3, count=3)] == [2, 1]
    assert await store.tenants() == {"alice": 5, "bob": 1}


async def test_two_gateways_append_to_one_chain(file: Path, store: AuditStore) -> None:
    second = await AuditStore.open(f"sqlite+aiosqlite:///{file}")
    await asyncio.gather(
        *((store, second)[n % 2].append(numbered(n)) for n in range(20)),
    )
    assert await second.verify("alice") is None
    assert await second.tenants() == {"alice": 20}
    await second.close()


async def test_a_record_cannot_be_stored_twice(store: AuditStore) -> None:
    await store.append(numbered(1))
    with pytest.raises(Exception, match=r"UNIQUE constraint failed: records\.record_id"):
        await store.append(numbered(1))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("UPDATE records SET text = 'other' WHERE sequence = 2", "its content was changed"),
        ("UPDATE records SET eviction_seed = 7 WHERE sequence = 2", "its content was changed"),
        ("DELETE FROM records WHERE sequence = 2", "sequence 2 is missing"),
        (
            "UPDATE records SET hash = (SELECT hash FROM records WHERE sequence = 3) "
            "WHERE sequence = 2",
            "its content was changed",
        ),
    ],
)
async def test_damage_is_found(store: AuditStore, file: Path, damage: str, text: str) -> None:
    for number in range(4):
        await store.append(numbered(number))
    assert await store.verify("alice") is None
    with sqlite3.connect(file) as connection:
        connection.execute(damage)
    assert text in str(await store.verify("alice"))


async def test_a_chain_of_several_pages_is_verified(
    store: AuditStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vase_sgl.gateway.audit.store._PAGE", 3)
    for number in range(10):
        await store.append(numbered(number))
    assert await store.verify("alice") is None


def test_the_hash_is_pinned() -> None:
    """Another value breaks every chain there is."""
    assert chain_hash(RECORD, 1, "0" * 64) == (
        "57358979831fed61ba3b82d3b5c519818794e7d42b6c1eab6616080314b001d6"
    )


@given(text=st.text(), sequence=st.integers(1, 2**62))
def test_the_hash_covers_the_record_and_its_place(text: str, sequence: int) -> None:
    changed = dataclasses.replace(RECORD, text=text)
    same = chain_hash(changed, sequence, "0" * 64) == chain_hash(RECORD, 1, "0" * 64)
    assert same == (text == RECORD.text and sequence == 1)


async def test_a_store_of_another_version_is_refused(store: AuditStore, file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(AuditError, match="has schema version 99, this gateway writes 1"):
        await AuditStore.open(f"sqlite+aiosqlite:///{file}")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nonsense", "audit.url cannot be used"),
        ("sqlite+nodriver:///x", "audit.url cannot be used"),
        ("sqlite+aiosqlite:////proc/nowhere/audit.sqlite3", "cannot open the audit store"),
    ],
)
async def test_an_unusable_url_is_named(url: str, text: str) -> None:
    with pytest.raises(AuditError, match=text):
        await AuditStore.open(url)
