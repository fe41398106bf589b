"""Cached prompts: each tenant finds its own, unless the gateway is told to share them."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

from tests.gateway.running import Running, run_gateway
from vase_sgl.client import NEVER, AsyncClient
from vase_sgl.gateway import tenants
from vase_sgl.gateway.cache_salt import cache_salt
from vase_sgl.gateway.tenants import MasterSecret, Tenant


def tenant(name: str, *secrets: bytes) -> Tenant:
    masters = tuple(
        MasterSecret(version=n, secret=base64.b64encode(secret).decode())
        for n, secret in enumerate(secrets, start=1)
    )
    return Tenant(name=name, master_secrets=masters)


def test_a_salt_is_the_tenants_own() -> None:
    """RFC 5869 by hand; also tenants that were given one secret have salts of their own."""
    old, new = bytes(range(32)), bytes(32)
    extracted = hmac.digest(b"vase-sgl prefix cache v1", old, hashlib.sha256)
    expected = hmac.digest(extracted, b"alice\x01", hashlib.sha256)[:16].hex()
    assert cache_salt(tenant("alice", old)) == expected
    others = [tenant("bob", old), tenant("alice", new), tenant("alice", old, new)]
    assert expected not in map(cache_salt, others)


async def salts(running: Running) -> list[str | None]:
    """Of two generations and a replay of alice, then of one of bob."""
    answer = await running.client.generate_once("tell me", max_new_tokens=1)
    await running.client.generate_once("tell me", max_new_tokens=1)
    assert (await running.client.replay(answer.request_id).verdict()).outcome == "MATCH"
    key = running.add_tenant("bob")
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        await bob.generate_once("tell me", max_new_tokens=1)
    return [body["cache_salt"] for body in running.worker.bodies]


async def test_workers_are_told_whose_cache_a_request_may_find(running: Running) -> None:
    *own, other = await salts(running)
    alice, bob = tenants.load(running.tenants_file).tenants
    assert set(own) == {cache_salt(alice)} and other == cache_salt(bob)


async def test_a_gateway_may_let_all_tenants_share(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, worker={"share_prefix_cache": True}) as running:
        assert await salts(running) == [None] * 4
