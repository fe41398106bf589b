"""Encrypted content: unreadable in the database, readable over key rotations, bound to a record."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from tests.gateway.audit_records import numbered, tamper
from tests.gateway.running import run_gateway
from tests.gateway.test_audit_store import problems
from vase_sgl.client import InvalidRequest
from vase_sgl.gateway.audit import AuditStore, KeyRing
from vase_sgl.gateway.config import Audit, ConfigError, load_config
from vase_sgl.gateway.errors import FailedPrecondition
from vase_sgl.gateway.server import _open_store

FIRST, SECOND = b"1" * 32, b"2" * 32


async def stored(url: str, keys: dict[int, bytes], number: int) -> None:
    store = await AuditStore.open(url, migrate=True, keys=KeyRing(keys))
    await store.append(numbered(number))
    await store.close()


async def test_rotation_keeps_old_records_readable(audit_url: str) -> None:
    await stored(audit_url, {}, 1)
    await stored(audit_url, {1: FIRST}, 2)
    await stored(audit_url, {1: FIRST, 2: SECOND}, 3)
    store = await AuditStore.open(audit_url, keys=KeyRing({2: SECOND, 1: FIRST}))
    for number in (1, 2, 3):
        found = await store.get("alice", numbered(number).record_id)
        assert found is not None and found.record == numbered(number)
    await store.close()

    # A destroyed key: its record is unreadable, the chain is whole, the rest goes on.
    store = await AuditStore.open(audit_url, keys=KeyRing({2: SECOND}))
    with pytest.raises(FailedPrecondition, match=r"key version 1, which .*audit.encryption_keys"):
        await store.get("alice", numbered(2).record_id)
    assert len(await store.latest("alice", before=None, count=9)) == 3
    assert await problems(audit_url) == {"alice": None}
    await store.close()


async def test_a_payload_belongs_to_its_record(audit_url: str) -> None:
    for number in (1, 2):
        await stored(audit_url, {1: FIRST}, number)
    await tamper(
        audit_url,
        "UPDATE records SET payload = (SELECT payload FROM records AS r WHERE r.sequence = 2) "
        "WHERE sequence = 1",
    )
    store = await AuditStore.open(audit_url, keys=KeyRing({1: FIRST}))
    with pytest.raises(FailedPrecondition, match=r"cannot be decrypted.*audit verify"):
        await store.get("alice", numbered(1).record_id)
    await store.close()
    assert "its payload was changed" in str((await problems(audit_url))["alice"])


def test_nonces_differ_and_the_format_is_the_documented_one() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    ring = KeyRing({1: SECOND, 3: FIRST})
    assert ring.active == 3
    one, two = (ring.encrypt(b"secret", tenant="t", record_id="r") for _ in range(2))
    assert one[:12] != two[:12] and len(one) == 12 + 6 + 16
    associated = b"vase-sgl audit v1\0t\0r"
    assert AESGCM(FIRST).decrypt(one[:12], one[12:], associated) == b"secret"
    with pytest.raises(ValueError, match="key version 1 has 3 bytes instead of 32"):
        KeyRing({1: b"abc"})


async def test_a_gateway_encrypts_what_it_records_and_replays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIT_KEY", base64.b64encode(FIRST).decode())
    url = f"sqlite+aiosqlite:///{tmp_path / 'audit.sqlite3'}"
    section = {"url": url, "encryption_keys": [{"version": 1, "env": "AUDIT_KEY"}]}
    async with run_gateway(tmp_path, audit=section) as running:
        answer = await running.client.generate_once(
            "tell me", max_new_tokens=5, stop=["open sesame"]
        )
        record = await running.client.get_record(answer.request_id)
        assert record.text == answer.text and record.sampling["stop"] == ["open sesame"]
        assert (await running.client.replay(answer.request_id).verdict()).outcome == "MATCH"
    raw = b"".join(file.read_bytes() for file in tmp_path.glob("audit.sqlite3*"))
    assert answer.request_id.encode() in raw
    tokens = ",".join(map(str, answer.token_ids))
    for content in (answer.text.strip(), "sesame", tokens):
        assert content.encode() not in raw

    other = tmp_path / "other"
    other.mkdir()
    async with run_gateway(other, audit={"url": url}) as running:
        with pytest.raises(InvalidRequest, match="encrypted with key version 1"):
            await running.client.replay(answer.request_id).verdict()
        assert len([r async for r in running.client.list_records()]) == 1


async def test_a_new_key_decrypts_everywhere_before_it_encrypts(
    audit_url: str, tmp_path: Path
) -> None:
    """Gateways are replaced one by one, and those that lack a key cannot read what it encrypted."""
    keys = []
    for version, key in ((1, FIRST), (2, SECOND)):
        (tmp_path / str(version)).write_text(base64.b64encode(key).decode())
        keys.append({"version": version, "file": tmp_path / str(version)})
    await stored(audit_url, {1: FIRST}, 1)

    def configured(**settings: object) -> Audit:
        section = {"url": audit_url, "encryption_keys": keys, **settings}
        return load_config(overrides={"worker": {"urls": ["http://w"]}, "audit": section}).audit

    for number, config in ((2, configured(active_key=1)), (3, configured())):
        store = await _open_store(config)
        await store.append(numbered(number))
        assert await store.get("alice", numbered(1).record_id) is not None
        await store.close()
    store = await AuditStore.open(audit_url, keys=KeyRing({1: FIRST}))
    assert await store.get("alice", numbered(2).record_id) is not None
    with pytest.raises(FailedPrecondition, match="key version 2"):
        await store.get("alice", numbered(3).record_id)
    await store.close()
    with pytest.raises(ConfigError, match="active_key: there is no version 3 in encryption_keys"):
        configured(active_key=3)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ({"version": 1}, "say where the key is: file or env, one of them"),
        ({"version": 1, "env": "A", "file": "b"}, "file or env, one of them"),
        ({"version": 0, "env": "A"}, "greater than or equal to 1"),
        ({"version": 1, "env": "NO_SUCH_KEY"}, "the variable NO_SUCH_KEY is not set"),
        ({"version": 1, "env": "BAD_KEY"}, "key version 1 is not base64"),
        ({"version": 1, "env": "SHORT_KEY"}, "has 3 bytes instead of 32; `openssl rand"),
        ({"version": 1, "file": "/nowhere/key"}, "cannot read /nowhere/key: No such file"),
    ],
)
def test_a_key_that_cannot_be_used_is_named(
    key: dict[str, object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_KEY", "?")
    monkeypatch.setenv("SHORT_KEY", "YWJj")
    with pytest.raises(ConfigError) as error:
        config = load_config(
            overrides={"worker": {"urls": ["http://w"]}, "audit": {"encryption_keys": [key]}}
        )
        config.audit.encryption_keys[0].read()
    assert text in str(error.value)


def test_a_key_comes_from_a_file(tmp_path: Path) -> None:
    key = os.urandom(32)
    (tmp_path / "key").write_text(base64.b64encode(key).decode() + "\n")
    config = load_config(
        overrides={
            "worker": {"urls": ["http://w"]},
            "audit": {"encryption_keys": [{"version": 4, "file": tmp_path / "key"}]},
        }
    )
    assert config.audit.encryption_keys[0].read() == key
