"""Chains: damage is found where it is, and named for what it is."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import itertools
import json
import random
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection
from typer.testing import CliRunner

from tests.gateway.audit_records import RECORD, numbered, tamper
from tests.gateway.test_audit_store import problems
from vase_sgl.cli import build_app
from vase_sgl.gateway.audit import (
    AuditError,
    AuditStore,
    KeyRing,
    database,
    export,
    pruning,
    reading,
)
from vase_sgl.gateway.audit.chain import ChainCheck, Checkpoint
from vase_sgl.gateway.audit.entries import GENESIS, canonical, hash_of, seal
from vase_sgl.gateway.tenants import Retention


@pytest.fixture
async def store(audit_url: str) -> AsyncIterator[AuditStore]:
    store = await AuditStore.open(audit_url, migrate=True)
    for number in range(1, 6):
        await store.append(numbered(number, created_unix_micros=number * 1000))
    await store.append(numbered(101, tenant="bob"))
    yield store
    await store.close()


async def exported(url: str) -> list[str]:
    async with reading.opened(url) as engine, reading.snapshot(engine) as connection:
        return [line async for line in export.lines(engine, await reading.tenants(connection))]


def cut_files(lines: list[str]) -> list[list[str]]:
    """What is left of a file with several chains that was cut off between two lines."""
    first_end = next(n for n, line in enumerate(lines) if '"kind":"end"' in line)
    return [[], lines[: first_end + 1], lines[:-1], [*lines[: first_end + 1], lines[-1]]]


def in_format_1(lines: list[str]) -> list[str]:
    """The same file as older versions wrote it."""
    return [line.replace('"format":2', '"format":1', 1) for line in lines[:-1]]


def file_problems(lines: list[str]) -> dict[str, str | None]:
    file = io.StringIO("".join(f"{line}\n" for line in lines))
    return {t: None if p is None else str(p) for t, _, p in export.FileCheck().chains(file)}


async def checked(url: str, known: tuple[int, str]) -> str | None:
    """What is wrong with alice's chain for somebody who noted that place of it."""
    async with reading.opened(url) as engine, reading.snapshot(engine) as connection:
        _, problem = await reading.verify(connection, "alice", known)
        return None if problem is None else str(problem)


SWAP = (
    "UPDATE records SET sequence = 99 WHERE tenant = 'alice' AND sequence = 2",
    "UPDATE records SET sequence = 2 WHERE tenant = 'alice' AND sequence = 3",
    "UPDATE records SET sequence = 3 WHERE tenant = 'alice' AND sequence = 99",
)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            ["UPDATE records SET entry = replace(entry, '\"length\"', '\"stop\"') "
             "WHERE sequence = 2"],
            "altered at record 00000000000000000000000000000002 (sequence 2): its content",
        ),
        (
            ["UPDATE records SET payload = NULL WHERE sequence = 4"],
            "altered at record 00000000000000000000000000000004 (sequence 4): its payload is gone",
        ),
        (
            ["UPDATE records SET payload = (SELECT payload FROM records WHERE tenant = 'bob') "
             "|| payload WHERE sequence = 4"],
            "(sequence 4): its payload was changed",
        ),
        (
            ["UPDATE records SET created_unix_micros = 7 WHERE sequence = 3"],
            "(sequence 3): its columns are not what its entry says",
        ),
        (["DELETE FROM records WHERE sequence = 3"], "missing at record 00000000000000000000"),
        (["DELETE FROM records WHERE sequence = 1 AND tenant = 'alice'"], "1 is not there"),
        (["DELETE FROM records WHERE sequence = 5"], "missing at sequence 5: the chain was noted"),
        (["DELETE FROM records WHERE tenant = 'alice'"], "missing at sequence 1: the chain was"),
        (["DELETE FROM chains WHERE tenant = 'alice'"], "fork at sequence 5: the chain was noted"),
        (SWAP, "reordered at record 00000000000000000000000000000003 (sequence 2): it was stored "
               "as sequence 3"),
    ],
)  # fmt: skip
async def test_the_first_damage_is_named(
    store: AuditStore, audit_url: str, damage: list[str], text: str
) -> None:
    assert await problems(audit_url) == {"alice": None, "bob": None}
    await tamper(audit_url, *damage)
    found = await problems(audit_url)
    assert text in str(found["alice"]) and found["bob"] is None
    assert text in str(file_problems(await exported(audit_url))["alice"])


async def test_a_fork_is_told_from_an_alteration(store: AuditStore, audit_url: str) -> None:
    """A record whose own hash is right, but which follows another history."""
    other = seal(numbered(3, created_unix_micros=3000, text="x"), KeyRing()).at(3, "e" * 64)
    entry = other.entry.replace("'", "''").replace(":", "\\:")
    await tamper(
        audit_url,
        f"UPDATE records SET entry = '{entry}', hash = '{other.hash}', payload = NULL "
        "WHERE tenant = 'alice' AND sequence = 3",
    )
    found = await problems(audit_url)
    assert "fork at record 00000000000000000000000000000003 (sequence 3)" in str(found["alice"])


async def test_an_export_holds_the_whole_chain(store: AuditStore, audit_url: str) -> None:
    await store.append(numbered(6, text="schön\n"))
    lines = await exported(audit_url)
    assert file_problems(lines) == {"alice": None, "bob": None}
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["start", *["record"] * 6, "end", "start", "record", "end", "file-end"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lines: lines[:-2], "cut off: the chain of bob has no end"),
        (lambda lines: [*lines[:-2], lines[-1]], "line 10: the chain of bob has no end"),
        (lambda lines: cut_files(lines)[0], "the file holds no chain"),
        (lambda lines: cut_files(lines)[1], "cut off: its last line, a file-end, is not there"),
        (lambda lines: cut_files(lines)[2], "cut off: its last line, a file-end, is not there"),
        (lambda lines: cut_files(lines)[3], "line 8: the file once held 2 chains, and 1 are there"),
        (lambda lines: ['{"kind":"file-end","chains":0}'], "the file holds no chain"),
        (lambda lines: [*lines, *lines], "line 12: a start after the end of the file"),
        (lambda lines: [*in_format_1(lines), *lines], "line 11: export format 2 after 1"),
        (lambda lines: in_format_1(lines)[:-1], "cut off: the chain of bob has no end"),
        (lambda lines: lines[1:], "line 1: a record without a start"),
        (lambda lines: [*lines, "{}"], "line 12 is not one of `vase-sgl audit export`"),
        (lambda lines: [line.replace('"format":2', '"format":3,"key":1') for line in lines],
            "line 1: unknown export format 3; 1 and 2 are known here, so use the version that"),
        (lambda lines: [line.replace('"kind":"end"', '"kind":"fin"') for line in lines], "line 7"),
    ],
)  # fmt: skip
async def test_a_file_that_is_no_export_is_refused(
    store: AuditStore, audit_url: str, change: object, text: str
) -> None:
    lines = change(await exported(audit_url))  # type: ignore[operator]
    with pytest.raises(AuditError, match=text):
        file_problems(lines)


def without_beginning(lines: list[str], count: int) -> list[str]:
    """The first chain without its first records, and a start that the next one follows."""
    start, cut = json.loads(lines[0]), json.loads(lines[count])
    start |= {"sequence": cut["sequence"], "hash": cut["hash"]}
    return [json.dumps(start), *lines[count + 1 :]]


async def test_a_chain_without_its_beginning_is_not_whole(
    store: AuditStore, audit_url: str
) -> None:
    """The head is the genuine one, and every hash fits."""
    lines = await exported(audit_url)
    for count in (1, 4, 5):
        found = file_problems(without_beginning(lines, count))
        assert found == {
            "alice": f"missing at sequence 1: the chain starts after sequence {count}, and no "
            "checkpoint says why",
            "bob": None,
        }
    first = json.loads(lines[0]) | {"hash": "f" * 64}
    assert "missing at sequence 1" in str(file_problems([json.dumps(first), *lines[1:]])["alice"])


async def test_a_head_is_looked_for_in_a_file(store: AuditStore, audit_url: str) -> None:
    heads = {s.sequence: s.hash for s in await store.latest("alice", before=None, count=9)}
    lines = await exported(audit_url)
    for sequence, hash, text in (
        (5, heads[5], "None"),
        (3, heads[3], "None"),
        (3, "f" * 64, "fork at record 00000000000000000000000000000003"),
        (9, "f" * 64, "missing at sequence 6: the chain once went on to sequence 9"),
    ):
        file = io.StringIO("".join(f"{line}\n" for line in lines))
        problems = {t: p for t, _, p in export.FileCheck({"alice": (sequence, hash)}).chains(file)}
        assert str(problems["alice"]).startswith(text) and problems["bob"] is None


async def test_a_file_of_format_1_is_checked_by_its_own_rules(
    store: AuditStore, audit_url: str
) -> None:
    lines = in_format_1(await exported(audit_url))
    assert file_problems(lines) == {"alice": None, "bob": None}
    del lines[3]
    assert "missing at record" in str(file_problems(lines)["alice"])


async def test_a_file_that_does_not_say_where_it_ends_is_told_apart(
    store: AuditStore, audit_url: str, tmp_path: Path
) -> None:
    lines, file = await exported(audit_url), tmp_path / "export.jsonl"

    def verified(lines: list[str]) -> str:
        file.write_text("".join(f"{line}\n" for line in lines))
        result = CliRunner().invoke(build_app(), ["audit", "verify", "--file", str(file)])
        assert result.exit_code == 0
        return result.stdout

    note = "of export format 1, which does not say where a file ends"
    assert note not in verified(lines)
    cut = in_format_1(lines)[:7]
    whole, said = verified(cut).splitlines()
    assert whole.startswith("alice: 5 records, chain is whole; head 5:") and note in said


@pytest.mark.parametrize("seed", range(20))
async def test_any_changed_file_is_found(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Drop, repeat, swap or edit lines at random: no change goes unseen."""
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('a') / 'a.sqlite3'}"
    store = await AuditStore.open(url)
    for number in range(8):
        await store.append(numbered(number))
    await store.close()
    lines = await exported(url)
    draw = random.Random(seed)
    first, second = draw.sample(range(1, 9), 2)
    match draw.randrange(4):
        case 0:
            del lines[first]
        case 1:
            lines.insert(second, lines[first])
        case 2:
            lines[first], lines[second] = lines[second], lines[first]
        case 3:
            values = json.loads(lines[first])
            name = draw.choice(["entry", "payload", "hash"])
            values[name] = "A" * 4 + values[name][4:]
            lines[first] = json.dumps(values)
    assert file_problems(lines)["alice"] is not None


async def test_an_export_holds_no_state_of_the_store_for_longer_than_a_chain(
    store: AuditStore, audit_url: str
) -> None:
    async with reading.opened(audit_url) as engine:
        lines = [line async for line in export.lines(engine, ["alice"])]
        async with aclosing(export.lines(engine, ["alice", "bob"])) as file:
            for line in lines[:-1]:
                assert await anext(file) == line
                await store.append(numbered(200 + lines.index(line), tenant="bob"))
            rest = [line async for line in file]
    assert sum('"kind":"record"' in line for line in rest) == len(lines)
    assert file_problems([*lines[:-1], *rest]) == {"alice": None, "bob": None}


async def test_a_chain_written_anew_is_found_with_its_old_head(
    store: AuditStore, audit_url: str
) -> None:
    async with reading.opened(audit_url) as engine, reading.snapshot(engine) as connection:
        old, _ = await reading.verify(connection, "alice")
    head = (old.sequence, old.hash)
    await store.append(numbered(6))

    assert await checked(audit_url, head) is None
    anew = await checked(audit_url, (5, "f" * 64))
    assert "fork at record 00000000000000000000000000000005" in str(anew)
    cut = await checked(audit_url, (9, "f" * 64))
    assert "missing at sequence 7: the chain once went on" in str(cut)


async def test_a_head_that_was_pruned_is_not_taken_for_confirmed(
    store: AuditStore, audit_url: str
) -> None:
    heads = {s.sequence: s.hash for s in await store.latest("alice", before=None, count=9)}
    async with reading.opened(audit_url) as engine:
        await pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
        await pruning.prune(engine, "alice", before_unix_micros=5000, by="me")
    for hash in (heads[3], "f" * 64):
        assert await checked(audit_url, (3, hash)) == (
            "missing at sequence 3: it was pruned, so this head can no longer be checked; use one "
            "that was noted at sequence 4 or later"
        )
    for sequence in (2, 4, 5):  # checkpoints hold the hashes of the first two
        assert await checked(audit_url, (sequence, heads[sequence])) is None
        assert str(await checked(audit_url, (sequence, "f" * 64))).startswith("fork at")


async def test_pruning_keeps_the_chain(store: AuditStore, audit_url: str) -> None:
    async with reading.opened(audit_url) as engine:
        await pruning.prune(engine, "bob", before_unix_micros=10**18, by="me")
        first = await pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
        again = await pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
    assert (first.records, first.last_sequence, again.records) == (2, 2, 0)
    assert first.first_kept == again.first_kept == (3, 3000)
    assert [s.sequence for s in await store.latest("alice", before=None, count=9)] == [5, 4, 3]
    assert await problems(audit_url) == {"alice": None, "bob": None}
    assert await store.append(numbered(6, created_unix_micros=9000)) == 6
    async with reading.opened(audit_url) as engine:
        everything = await pruning.prune(engine, "alice", before_unix_micros=10**9, by="you")
        async with reading.snapshot(engine) as connection:
            checkpoints = await reading.checkpoints_of(connection, "alice")
    assert (everything.records, everything.last_sequence) == (4, 6)
    assert everything.first_kept is None
    assert await problems(audit_url) == {"alice": None, "bob": None}
    assert await store.append(numbered(7)) == 7
    assert await problems(audit_url) == {"alice": None, "bob": None}
    entries = [json.loads(checkpoint.entry) for checkpoint in checkpoints]
    assert [(e["by"], e["records"], e["last_sequence"]) for e in entries] == [
        ("me", 2, 2),
        ("you", 4, 6),
    ]
    assert entries[1]["previous_hash"] == checkpoints[0].hash
    assert file_problems(await exported(audit_url)) == {"alice": None, "bob": None}


async def test_an_old_record_behind_a_newer_one_stays(store: AuditStore, audit_url: str) -> None:
    await store.append(numbered(6, created_unix_micros=1))
    async with reading.opened(audit_url) as engine:
        pruned = await pruning.prune(engine, "alice", before_unix_micros=5000, by="me")
    assert pruned.last_sequence == 4
    assert await problems(audit_url) == {"alice": None, "bob": None}


async def test_a_broken_chain_is_not_pruned_unnoticed(store: AuditStore, audit_url: str) -> None:
    await tamper(audit_url, "UPDATE records SET payload = NULL WHERE sequence = 1")
    async with reading.opened(audit_url) as engine:
        with pytest.raises(AuditError, match="alice is broken, and pruning could remove"):
            await pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
        pruned = await pruning.prune(engine, "alice", before_unix_micros=3000, by="me", force=True)
        async with reading.snapshot(engine) as connection:
            (checkpoint,) = await reading.checkpoints_of(connection, "alice")
    assert pruned.records == 2
    assert json.loads(checkpoint.entry)["chain_was_whole"] is False
    assert (await problems(audit_url))["alice"] is None


async def test_two_prunes_at_once_do_not_both_note_it(store: AuditStore, audit_url: str) -> None:
    async with reading.opened(audit_url) as one, reading.opened(audit_url) as two:
        results = await asyncio.gather(
            *(
                pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
                for engine in (one, two) * 3
            ),
            return_exceptions=True,
        )
        assert all(isinstance(r, (pruning.Pruned, AuditError)) for r in results), results
        async with reading.snapshot(one) as connection:
            assert len(await reading.checkpoints_of(connection, "alice")) == 1
    assert await problems(audit_url) == {"alice": None, "bob": None}


@pytest.mark.xdist_group("postgres")
async def test_a_prune_leaves_what_is_appended_meanwhile(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any of its statements, of which PostgreSQL lets each see a state of its own."""
    store = await AuditStore.open(postgres_url, migrate=True)
    execute = AsyncConnection.execute
    tenant, statements_left = "", 0

    async def execute_then_append(connection: AsyncConnection, *args: Any, **options: Any) -> Any:
        nonlocal statements_left
        result = await execute(connection, *args, **options)
        if connection.engine is engine:
            statements_left -= 1
            if statements_left == 0:
                await store.append(dataclasses.replace(RECORD, record_id=tenant, tenant=tenant))
        return result

    async with reading.opened(postgres_url) as engine:
        for statement in itertools.count(1):
            tenant, statements_left = f"t{statement}", statement
            await store.append(numbered(statement, tenant=tenant, created_unix_micros=1000))
            with monkeypatch.context() as patched:
                patched.setattr(AsyncConnection, "execute", execute_then_append)
                pruned = await pruning.prune(engine, tenant, before_unix_micros=5000, by="me")
            assert pruned.last_sequence == 1
            if statements_left > 0:
                break
            assert [s.sequence for s in await store.latest(tenant, before=None, count=9)] == [2]
    assert statement > 5 and set((await problems(postgres_url)).values()) == {None}
    await store.close()


async def test_a_prune_that_was_cut_short_is_whole_and_goes_on(
    store: AuditStore, audit_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pruning, "_remove", cut)
        async with reading.opened(audit_url) as engine:
            with pytest.raises(KeyboardInterrupt):
                await pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
    assert await problems(audit_url) == {"alice": None, "bob": None}
    monkeypatch.setattr(database, "TRANSACTION_BYTES", 1)  # a record is longer
    async with reading.opened(audit_url) as engine:
        await pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
    assert [s.sequence for s in await store.latest("alice", before=None, count=9)] == [5, 4, 3]


async def test_sqlites_wal_stays_short(tmp_path: Path) -> None:
    """A prune has to free a volume that is nearly full, so it may not fill the rest."""
    url, wal = f"sqlite+aiosqlite:///{tmp_path / 'a.sqlite3'}", tmp_path / "a.sqlite3-wal"
    store = await AuditStore.open(url)
    most = 2.1 * database.TRANSACTION_BYTES
    async with reading.opened(url) as engine:
        async with reading.snapshot(engine) as connection:
            await reading.tenants(connection)  # while it reads, the WAL only grows
            for number in range(30):
                await store.append(numbered(number, text="x" * 2**20, created_unix_micros=1))
            assert wal.stat().st_size > 1.5 * most
        for number in range(30, 33):
            await store.append(numbered(number))
        assert wal.stat().st_size < most
        assert (await pruning.prune(engine, "alice", before_unix_micros=2, by="me")).records == 30
        assert wal.stat().st_size < most
    await store.close()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (["UPDATE checkpoints SET entry = replace(entry, '\"me\"', '\"no\"')"], "altered at check"),
        (["UPDATE checkpoints SET last_sequence = 3"], "altered at checkpoint 1"),
        (["DELETE FROM checkpoints"], "missing at record 00000000000000000000000000000003"),
        (["DELETE FROM checkpoints WHERE number = 1"], "missing at checkpoint 2"),
    ],
)
async def test_damaged_checkpoints_are_found(
    store: AuditStore, audit_url: str, damage: list[str], text: str
) -> None:
    async with reading.opened(audit_url) as engine:
        await pruning.prune(engine, "alice", before_unix_micros=2000, by="me")
        await pruning.prune(engine, "alice", before_unix_micros=3000, by="me")
    await tamper(audit_url, *damage)
    assert text in str((await problems(audit_url))["alice"])


async def test_verifying_a_long_chain_needs_no_more_memory(tmp_path: object) -> None:
    """Five times as many records, the same peak."""
    peaks = []
    for count in (400, 2000):
        url = f"sqlite+aiosqlite:///{tmp_path}/{count}.sqlite3"
        store = await AuditStore.open(url)
        records = [numbered(n, output_token_ids=tuple(range(500))) for n in range(count)]
        await asyncio.gather(*map(store.append, records))
        await store.close()
        del records
        tracemalloc.start()
        assert await problems(url) == {"alice": None}
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def checkpoint(number: int, last_sequence: int, previous_hash: str) -> Checkpoint:
    """One of alice's, as a prune notes it."""
    columns = {"tenant": "alice", "number": number, "last_sequence": last_sequence}
    entry = canonical({**columns, "previous_hash": previous_hash, "last_hash": "a" * 64})
    return Checkpoint(**columns, entry=entry, hash=hash_of(entry))  # type: ignore[arg-type]


def test_a_checkpoint_follows_the_one_before_it() -> None:
    first = checkpoint(1, 4, GENESIS)
    second = checkpoint(2, 6, first.hash)
    for stored, text in (
        (second, "None"),
        (checkpoint(2, 6, "f" * 64), "fork at checkpoint 2"),  # the first was written anew
        (checkpoint(2, 4, first.hash), "fork at checkpoint 2"),
        (checkpoint(3, 6, first.hash), "missing at checkpoint 3"),
        (dataclasses.replace(second, number=3), "altered at checkpoint 3"),
        (dataclasses.replace(second, tenant="bob"), "altered at checkpoint 2"),
        (dataclasses.replace(second, hash="f" * 64), "altered at checkpoint 2"),
    ):
        check = ChainCheck("alice")
        assert check.checkpoint(first) is None
        assert str(check.checkpoint(stored)).startswith(text)


def test_a_record_with_another_name_or_content_is_found() -> None:
    row = seal(numbered(1), KeyRing()).at(1, GENESIS)
    digests_only = seal(numbered(1, retention=Retention.HASH), KeyRing()).at(1, GENESIS)
    for tenant, changed, text in (
        ("alice", dataclasses.replace(row, record_id="0" * 32), "its columns are not what"),
        ("bob", dataclasses.replace(row, tenant="bob"), "its columns are not what"),
        ("bob", row, "it belongs to tenant alice"),
        ("alice", dataclasses.replace(digests_only, payload=b"x"), "its entry does not know"),
    ):
        assert text in str(ChainCheck(tenant).record(changed))
    assert ChainCheck("alice").record(digests_only) is None
