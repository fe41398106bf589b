"""Records that a newer gateway wrote to the same store: older ones say so, and go on."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import Running, run_gateway
from vase_sgl.client import VaseError
from vase_sgl.gateway.audit import AuditStore, Record
from vase_sgl.gateway.audit.encryption import KeyRing
from vase_sgl.gateway.audit.entries import FORMAT, Sealed, seal

Body = dict[str, Any]
NEWER = "f" * 32


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Running]:
    async with run_gateway(tmp_path) as running:
        yield running


async def record_as_newer(running: Running, change: Callable[[Body], Body]) -> str:
    """Record a generation, and a copy of it as a newer gateway would; the id of the first."""
    mine = await running.client.generate_once("one two", max_new_tokens=90, budget=64, window=16)

    def newer_seal(record: Record, keys: KeyRing) -> Sealed:
        sealed = seal(record, keys)
        return dataclasses.replace(sealed, body=change(dict(sealed.body)))

    store = await AuditStore.open(running.audit_url)
    found = await store.get("alice", mine.request_id)
    assert found is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vase_sgl.gateway.audit.store.seal", newer_seal)
        await store.append(dataclasses.replace(found.record, record_id=NEWER))
    await store.close()
    return mine.request_id


def more(*path: str, **added: Any) -> Callable[[Body], Body]:
    """The entry with these fields added to, or changed in, the part that a path leads to."""

    def change(body: Body) -> Body:
        if not path:
            return {**body, **added}
        return {**body, path[0]: more(*path[1:], **added)(body[path[0]])}

    return change


@pytest.mark.parametrize("part", ["timings", "seeds", "cache", "payload", None])
async def test_a_field_more_that_may_be_left_out_is(target: Running, part: str | None) -> None:
    mine = await record_as_newer(target, more(*([part] if part else []), later=7))
    newest, older = [record async for record in target.client.list_records()]
    assert dataclasses.replace(newest, record_id=mine) == older
    found, known = await target.client.get_record(NEWER), await target.client.get_record(mine)
    assert (found.text, found.timings, found.cache) == (known.text, known.timings, known.cache)
    verdict = await target.client.replay(NEWER).verdict()
    # Its seeds are those of the other's id.
    assert (verdict.outcome, verdict.seed_check) == ("MATCH", "MISMATCH")


@pytest.mark.parametrize(
    ("change", "listed", "text"),
    [
        (more(format=FORMAT + 1), {"status": "unknown", "retention": "unknown"}, "the format 3"),
        (
            lambda body: {**body, "format": 9, "seeds": 1, "timings": []},
            {"rounds": 0},
            "the format 9",
        ),
        (more(status="refused"), {"status": "unknown"}, "the status `refused`"),
        (more(retention="prompt"), {"retention": "unknown"}, "the retention `prompt`"),
        (more("seeds", origin="hardware"), {"status": "completed"}, "the origin `hardware`"),
        (more("seeds", policy="shared"), {"status": "completed"}, "the policy `shared`"),
    ],
)
async def test_what_an_older_gateway_does_not_know_it_neither_shows_nor_replays(
    target: Running, change: Callable[[Body], Body], listed: dict[str, Any], text: str
) -> None:
    mine = await record_as_newer(target, change)
    newest, older = [record async for record in target.client.list_records()]
    assert (newest.record_id, older.record_id) == (NEWER, mine)
    assert newest.created == older.created
    assert {name: getattr(newest, name) for name in listed} == listed
    text = f"^record {NEWER} has {text}.*, which this gateway, of vase_sgl .*, does not know; ask"
    for call in (target.client.get_record(NEWER), target.client.replay(NEWER).verdict()):
        with pytest.raises(VaseError, match=text) as error:
            await call
        assert error.value.code == "FAILED_PRECONDITION"
    assert (await target.client.replay(mine).verdict()).outcome == "MATCH"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (more("sampling", min_tokens=3, later=1), "in its sampling later, min_tokens, which"),
        (more("eviction", later=1), "in its eviction later, which"),
        (more("eviction", prompt="half"), "the prompt mode `half`, which"),
    ],
)
async def test_parameters_of_a_newer_version_are_not_left_out(
    target: Running, change: Callable[[Body], Body], text: str
) -> None:
    """A worker that has the recorded fingerprint knows them: a replay hands them on."""
    await record_as_newer(target, change)
    assert len([record async for record in target.client.list_records()]) == 2
    with pytest.raises(VaseError, match=f"^record {NEWER} has {text}") as error:
        await target.client.get_record(NEWER)
    assert error.value.code == "FAILED_PRECONDITION"
