"""Who may call: keys, roles, tenants that come and go while the gateway runs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import argon2
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.gateway.running import Running, add_tenant, run_gateway, until
from vase_sgl.client import (
    NEVER,
    AsyncClient,
    AuthenticationError,
    NotFound,
    PermissionError_,
    VaseError,
)
from vase_sgl.gateway import keys, tenants
from vase_sgl.gateway.auth import Credential, KeyAuthenticator
from vase_sgl.gateway.errors import KeyNotChecked, Unauthenticated


async def refused(running: Running, key: str | None) -> str:
    async with AsyncClient(running.target, key, retry=NEVER) as client:
        with pytest.raises(AuthenticationError) as error:
            await client.capacity()
        with pytest.raises(AuthenticationError):
            _ = [chunk async for chunk in client.generate("tell me")]
    return str(error.value)


async def test_every_bad_key_is_told_what_to_do(running: Running) -> None:
    assert "api_key=" in await refused(running, None)
    assert "vsk_<id>_<secret>" in await refused(running, "sk-something")
    unknown = running.key.replace(running.key[4:16], "0" * 12)
    wrong = running.key[:-1] + ("0" if running.key[-1] != "0" else "1")
    assert "unknown or revoked" in await refused(running, unknown)
    assert "unknown or revoked" in await refused(running, wrong)
    assert running.worker.bodies == []


async def test_the_scheme_must_be_bearer(running: Running) -> None:
    from vase_sgl.rpc.v1 import gateway_pb2, gateway_pb2_grpc

    async with grpc.aio.insecure_channel(running.target) as channel:
        stub = gateway_pb2_grpc.VaseGatewayStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="must read `Bearer <API key>`"):
            await stub.GetCapacity(
                gateway_pb2.GetCapacityRequest(), metadata=(("authorization", running.key),)
            )


async def test_a_second_check_of_a_key_is_fast(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    real = keys.verify
    monkeypatch.setattr(keys, "verify", lambda *a: verified.append(a[0]) or real(*a))
    for _ in range(20):
        await running.client.capacity()
    assert verified == []  # the fixture has used the key


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Keys that argon2 was run for, and whether against a hash of theirs."""
    calls, real = [], keys.verify
    monkeypatch.setattr(
        keys, "verify", lambda key, hash: calls.append((key, hash is not None)) or real(key, hash)
    )
    return calls


def other_secret(key: str, number: int = 0) -> str:
    """A key with the same id."""
    return f"{key[:-8]}{int(key[-8:], 16) ^ number + 1:08x}"


async def test_a_key_is_checked_once_while_its_hash_stands_in_the_file(
    tmp_path: Path, verified: list[tuple[str, bool]]
) -> None:
    file = tmp_path / "t.yaml"
    key = add_tenant(file, "bob")
    authenticator = KeyAuthenticator(file)
    for round in range(3):
        calls = [authenticator.tenant_of(Credential(key)) for _ in range(5)]  # one check for all
        assert {tenant.name for tenant in await asyncio.gather(*calls)} == {"bob"}
        with pytest.raises(Unauthenticated):
            await authenticator.tenant_of(Credential(other_secret(key)))
        add_tenant(file, f"another-{round}")
    # The hash has its key; anything else with that id only takes as long.
    assert verified == [(key, True), (other_secret(key), False)]
    stored = tenants.load(file).tenants[0].keys[0].hash
    file.write_text(file.read_text().replace(stored, keys.new_key().hash))
    with pytest.raises(Unauthenticated):
        await authenticator.tenant_of(Credential(key))
    assert verified[2:] == [(key, True)]


async def test_keys_are_not_remembered_as_they_are(tmp_path: Path) -> None:
    key = add_tenant(tmp_path / "t.yaml", "bob")
    checks = [KeyAuthenticator(tmp_path / "t.yaml")._checks for _ in range(2)]
    stored = tenants.load(tmp_path / "t.yaml").tenants[0].keys[0].hash
    for one in checks:
        assert await one.matches(key, stored)
    first, second = (one._proven[stored] for one in checks)
    assert first != second and hashlib.sha256(key.encode()).digest() not in (first, second)
    assert key not in repr(Credential(key))


async def test_an_unknown_id_takes_a_check_like_a_wrong_secret(
    tmp_path: Path, verified: list[tuple[str, bool]]
) -> None:
    key = add_tenant(tmp_path / "t.yaml", "bob")
    authenticator = KeyAuthenticator(tmp_path / "t.yaml")
    unknown, wrong, wrong_too = keys.new_key().key, other_secret(key, 1), other_secret(key, 2)
    for refused_key in (unknown, wrong, unknown, wrong):
        with pytest.raises(Unauthenticated, match="unknown or revoked"):
            await authenticator.tenant_of(Credential(refused_key))
    await authenticator.tenant_of(Credential(key))
    with pytest.raises(Unauthenticated, match="unknown or revoked"):
        await authenticator.tenant_of(Credential(wrong_too))
    assert verified == [(unknown, False), (wrong, True), (key, True), (wrong_too, False)]


async def test_strangers_are_bounded_and_hold_up_no_first_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vase_sgl.gateway.key_checks._WAITING_DECOYS", 8)
    monkeypatch.setattr("vase_sgl.gateway.key_checks._REMEMBERED_REFUSALS", 4)
    go_on, decoys, real = threading.Event(), [], keys.verify

    def slow_for_strangers(key: str, stored_hash: str | None) -> bool:
        if stored_hash is None:
            decoys.append(key)
            go_on.wait(10)
        return real(key, stored_hash)

    monkeypatch.setattr(keys, "verify", slow_for_strangers)
    good = [add_tenant(tmp_path / "t.yaml", f"t{n}") for n in range(6)]
    authenticator = KeyAuthenticator(tmp_path / "t.yaml")
    strangers = [
        asyncio.create_task(authenticator.tenant_of(Credential(keys.new_key().key)))
        for _ in range(20)
    ]
    async with asyncio.timeout(5):
        done, waiting = await asyncio.wait(strangers, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(waiting)) == (12, 8)
        for key in good:
            await authenticator.tenant_of(Credential(key))
    go_on.set()
    outcomes = await asyncio.gather(*strangers, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {Unauthenticated}
    assert len(decoys) == 8 and len(authenticator._checks._refused) == 4


async def test_who_knows_an_id_holds_up_no_other_key(tmp_path: Path) -> None:
    bobs, carols = (add_tenant(tmp_path / "t.yaml", name) for name in ("bob", "carol"))
    authenticator = KeyAuthenticator(tmp_path / "t.yaml")
    flood = [authenticator.tenant_of(Credential(other_secret(bobs, n))) for n in range(40)]
    *outcomes, carol = await asyncio.gather(
        *flood, authenticator.tenant_of(Credential(carols)), return_exceptions=True
    )
    assert isinstance(carol, tenants.Tenant) and carol.name == "carol"
    assert [type(outcome) for outcome in outcomes] == [Unauthenticated] * 4 + [KeyNotChecked] * 36
    assert (await authenticator.tenant_of(Credential(bobs))).name == "bob"
    assert authenticator._checks._running == {}


async def test_a_check_that_fails_says_nothing_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As for want of memory: the outcome of a check is remembered for good."""
    key = add_tenant(tmp_path / "t.yaml", "bob")
    refusals: list[str] = []
    authenticator = KeyAuthenticator(tmp_path / "t.yaml", on_refusal=refusals.append)

    def no_memory(*_: object) -> None:
        raise argon2.exceptions.VerificationError("Memory allocation error")

    with monkeypatch.context() as patched:
        patched.setattr(argon2.PasswordHasher, "verify", no_memory)
        with pytest.raises(KeyNotChecked, match="try again in a moment"):
            await authenticator.tenant_of(Credential(key))
    assert refusals == ["key_not_checked"]
    assert caplog.messages == ["an API key could not be checked: Memory allocation error"]
    assert (await authenticator.tenant_of(Credential(key))).name == "bob"


#: Sends keys of the right form that nobody has, so many at once, until it is killed.
_FLOOD = """
import asyncio, secrets, sys, aiohttp

async def one(session):
    while True:
        key = f"vsk_{secrets.token_hex(6)}_{secrets.token_hex(32)}"
        headers = {"Authorization": f"Bearer {key}"}
        try:
            async with session.get(f"{sys.argv[1]}/v1/models", headers=headers) as answer:
                await answer.read()
                print(answer.status, flush=True)
        except aiohttp.ClientError:
            pass

async def main():
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session) for _ in range(300)))

asyncio.run(main())
"""


async def test_a_flood_of_strangers_shuts_no_tenant_out(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, http={"port": 0}) as running:
        good = [running.add_tenant(f"t{n}") for n in range(3)]
        flood = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _FLOOD, running.http_url), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert flood.stdout is not None
            for _ in range(300):  # it is under way
                assert await flood.stdout.readline() == b"401\n"
            drained = asyncio.create_task(flood.stdout.read())
            for _ in range(2):
                for key in good:  # never seen before, and then after a change of the file
                    async with AsyncClient(running.target, key, retry=NEVER) as client:
                        await client.capacity(timeout=30)
                good.append(running.add_tenant(f"t{len(good)}"))
            assert flood.returncode is None
        finally:
            flood.kill()
            await flood.wait()
        assert set((await drained).split(b"\n")[:-1]) == {b"401"}


async def test_a_key_revoked_while_it_is_checked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.yaml"
    key = add_tenant(file, "bob")
    authenticator = KeyAuthenticator(file)
    loop, real, checked = asyncio.get_running_loop(), keys.verify, []

    def revoked_meanwhile(key: str, stored_hash: str) -> bool:
        checked.append(stored_hash)
        if len(checked) == 1:  # the id stays, as of a key that was made anew by hand
            file.write_text(file.read_text().replace(stored_hash, keys.new_key().hash))
            asyncio.run_coroutine_threadsafe(authenticator._reload(), loop).result(10)
        return real(key, stored_hash)

    monkeypatch.setattr(keys, "verify", revoked_meanwhile)
    for _ in range(2):
        with pytest.raises(Unauthenticated, match="unknown or revoked"):
            await authenticator.tenant_of(Credential(key))
    assert len(set(checked)) == len(checked) == 2


async def test_tenants_come_and_go_while_the_gateway_runs(running: Running) -> None:
    key = running.add_tenant("bob")
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        await bob.generate_once("tell me", max_new_tokens=2)
        content = tenants.load(running.tenants_file)
        tenants.save(
            running.tenants_file,
            tenants.TenantFile(tenants=tuple(t for t in content.tenants if t.name != "bob")),
        )
        with pytest.raises(AuthenticationError, match="unknown or revoked"):
            await bob.capacity()
    await running.client.capacity()


async def test_a_broken_tenants_file_keeps_the_last_good_one(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    for content in ("tenants: [", ""):
        running.tenants_file.write_text(content)
        await running.client.capacity()
    running.tenants_file.unlink()
    await running.client.capacity()
    assert "stay in force" in caplog.text


async def test_a_file_that_could_not_be_read_is_read_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What forbade it, such as a folder's mode, need not show in the file."""
    file = tmp_path / "t.yaml"
    key = add_tenant(file, "bob")
    authenticator = KeyAuthenticator(file)
    tenants.save(file, tenants.TenantFile())

    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", forbidden)
        for _ in range(3):
            assert (await authenticator.tenant_of(Credential(key))).name == "bob"
    assert caplog.text.count("stay in force: cannot read tenants file") == 1
    with pytest.raises(Unauthenticated, match="unknown or revoked"):
        await authenticator.tenant_of(Credential(key))


async def test_a_wrong_file_is_read_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "t.yaml"
    key = add_tenant(file, "bob")
    authenticator = KeyAuthenticator(file)
    loaded: list[Path] = []
    load = tenants.load
    monkeypatch.setattr(tenants, "load", lambda path: (loaded.append(path), load(path))[1])
    file.write_bytes(b"\xff\xfe")
    for _ in range(3):
        assert (await authenticator.tenant_of(Credential(key))).name == "bob"
    assert len(loaded) == 1 and caplog.text.count("is not text in UTF-8") == 1


async def test_a_long_tenants_file_is_read_once_and_holds_up_no_stream(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.worker.token_seconds = 0.01
    chunks = aiter(running.client.generate("tell me", max_new_tokens=4000))
    await anext(chunks)
    key = running.add_tenant("bob")
    reading, go_on, load = threading.Event(), threading.Event(), tenants.load
    let_go: list[bool] = []

    def long_load(path: Path) -> tenants.TenantFile:
        reading.set()
        let_go.append(go_on.wait(10))
        return load(path)

    monkeypatch.setattr(tenants, "load", long_load)
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        calls = [asyncio.create_task(bob.capacity()) for _ in range(3)]
        await until(reading.is_set)
        for _ in range(3):
            await anext(chunks)
        assert not any(call.done() for call in calls)
        go_on.set()
        await asyncio.gather(*calls)
    assert let_go == [True]


async def test_a_key_revoked_in_place_is_refused_whatever_the_files_time_says(
    tmp_path: Path,
) -> None:
    file = tmp_path / "t.yaml"
    key = add_tenant(file, "bob")
    authenticator = KeyAuthenticator(file)
    await authenticator.tenant_of(Credential(key))
    before = file.stat()
    file.write_text(file.read_text().replace(key[4:16], "x" * 12))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(Unauthenticated, match="unknown or revoked"):
        await authenticator.tenant_of(Credential(key))


async def test_roles_are_enforced(running: Running) -> None:
    auditor = running.add_tenant("auditor", roles=["audit"])
    admin = running.add_tenant("admin", roles=["admin"])
    inspector = running.add_tenant("inspector", roles=["inspect"])
    async with AsyncClient(running.target, auditor, retry=NEVER) as client:
        with pytest.raises(PermissionError_, match="tenant auditor lacks the role `generate`"):
            await client.generate_once("tell me")
        with pytest.raises(PermissionError_, match="lacks the role `replay`"):
            await client.replay("0" * 32).verdict()
        assert [r async for r in client.list_records()] == []
    async with AsyncClient(running.target, inspector, retry=NEVER) as client:
        for read in (client.get_record("0" * 32), anext(client.list_records())):
            with pytest.raises(PermissionError_, match="lacks the role `generate` or `replay` or"):
                await read
    async with AsyncClient(running.target, admin, retry=NEVER) as client:
        answer = await client.generate_once("tell me", max_new_tokens=2)
        assert (await client.replay(answer.request_id).verdict()).outcome == "MATCH"


async def test_another_tenants_record_does_not_exist(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=2)
    key = running.add_tenant("bob", roles=["admin"])
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        with pytest.raises(NotFound, match=r"no record .* of tenant bob"):
            await bob.get_record(answer.request_id)
        with pytest.raises(NotFound):
            await bob.replay(answer.request_id).verdict()
        assert [r async for r in bob.list_records()] == []


async def test_equal_seeds_of_two_tenants_are_not_equal(running: Running) -> None:
    key = running.add_tenant("bob")
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        mine = await running.client.generate_once("tell me", max_new_tokens=5, seed=1)
        theirs = await bob.generate_once("tell me", max_new_tokens=5, seed=1)
    assert mine.token_ids != theirs.token_ids


async def test_limits_of_a_tenant_hold(running: Running) -> None:
    key = running.add_tenant(
        "small",
        limits={
            "max_budget": 100,
            "max_new_tokens": 10,
            "max_prompt_tokens": 3,
            "policies": ["random"],
        },
    )
    asked: dict[str, dict[str, Any]] = {
        "max_new_tokens: 11 is above the ceiling of tenant small, 10": {"max_new_tokens": 11},
        "eviction.budget: 101 is above the ceiling of tenant small, 100": {"budget": 101},
        "eviction.policy: tenant small may not use vase-attnv; choose one of random": {
            "budget": 90
        },
        "eviction: tenant small may not use a full cache": {},
    }
    async with AsyncClient(running.target, key, retry=NEVER) as client:
        for text, options in asked.items():
            with pytest.raises(VaseError) as error:
                await client.generate_once("tell me", **{"max_new_tokens": 5, **options})
            assert text in str(error.value) and error.value.code == "INVALID_ARGUMENT"
        with pytest.raises(VaseError, match="the prompt has 4 tokens, above the ceiling"):
            await client.generate_once(
                "a b c d", max_new_tokens=5, budget=90, window=8, policy="random"
            )
        # Just what is allowed, and told to be.
        await client.generate_once(
            "a b c", max_new_tokens=10, budget=100, window=8, policy="random"
        )
        told = await client.capacity()
        assert (told.max_budget, told.max_new_tokens, told.max_prompt_tokens) == (100, 10, 3)
        assert tuple(told.policies) == ("random",)


async def test_without_authentication_everyone_is_anonymous(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with (
            run_gateway(tmp_path, insecure_no_auth=True) as running,
            AsyncClient(running.target, retry=NEVER) as client,
        ):
            answer = await client.generate_once("tell me", max_new_tokens=2)
            assert (await client.get_record(answer.request_id)).status == "completed"
    assert "INSECURE" in caplog.text


async def test_health_and_reflection_are_open(running: Running) -> None:
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "vase.v1.VaseGateway"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for listed in reflection.ServerReflectionInfo(iter([request])):
            names = {service.name for service in listed.list_services_response.service}
        assert "vase.v1.VaseGateway" in names


async def test_neither_keys_nor_prompts_nor_seeds_are_logged(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="vase_sgl"):
        answer = await running.client.generate_once("a-very-secret-prompt", max_new_tokens=2)
        await refused(running, running.key[:-1] + "z")
    assert running.key not in caplog.text and "secret-prompt" not in caplog.text
    assert str(answer.result.seeds.sampling) not in caplog.text
