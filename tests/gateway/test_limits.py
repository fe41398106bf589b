"""Limits of a tenant: what is refused, when it may come back, and what is charged."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis.asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.gateway.redis_server import REDIS_URL, redis_server
from tests.gateway.running import Running, run_gateway, until
from vase_sgl.client import NEVER, AsyncClient, RateLimited, Unavailable
from vase_sgl.gateway.errors import LimitExceeded, LimitsUnavailable
from vase_sgl.gateway.limits import shared
from vase_sgl.gateway.limits.local import LocalUsage
from vase_sgl.gateway.limits.shared import SharedUsage, SharedUsageError
from vase_sgl.gateway.limits.usage import Usage, UsageLimits
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc


async def refusal(running: Running, key: str) -> tuple[grpc.StatusCode, str, float]:
    """Status, text and RetryInfo, in seconds, of a call that is refused."""
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub = gateway_pb2_grpc.VaseGatewayStub(channel)
        request = pb.GenerateOnceRequest(request=pb.GenerateRequest(text="a", max_new_tokens=1))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GenerateOnce(request, metadata=(("authorization", f"Bearer {key}"),))
    # The library's own reader checks that code and text agree with the status proper.
    status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    return (
        error.value.code(),
        error.value.details() or "",
        info.retry_delay.ToTimedelta().total_seconds(),
    )


async def test_requests_per_second(running: Running) -> None:
    key = running.add_tenant("bob", limits={"requests_per_second": 0.25})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        await bob.generate_once("tell me", max_new_tokens=1)
        code, text, seconds = await refusal(running, key)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "tenant bob may send 0.25 requests per second; come back in " in text
        assert 0 < seconds <= 4
        await asyncio.sleep(seconds + 0.02)
        await bob.generate_once("tell me", max_new_tokens=1)
    await running.client.generate_once("tell me", max_new_tokens=1)


async def test_tokens_are_charged_as_they_were_used(running: Running) -> None:
    """2 + 5 tokens of 60, though 1000 were allowed for; then 2 + 90, which makes a debt."""
    key = running.add_tenant("bob", limits={"tokens_per_minute": 60})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        running.worker.faults.end_after_tokens = 5
        for _ in range(3):
            await bob.generate_once("tell me", max_new_tokens=1000)
        running.worker.faults.end_after_tokens = None
        await bob.generate_once("tell me", max_new_tokens=90)
    code, text, seconds = await refusal(running, key)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "60 tokens per minute" in text
    assert 48 < seconds < 55  # 60 - 3 * 7 - 92 = -53 tokens, and some came back meanwhile


async def test_an_aborted_request_is_charged_for_what_came(running: Running) -> None:
    running.worker.token_seconds = 0.01
    key = running.add_tenant("bob", limits={"tokens_per_minute": 30})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        stream = bob.generate("tell me", max_new_tokens=4000)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 40:
                break
        stream.cancel()
        await running.worker.wait_for_abort()
        with pytest.raises(RateLimited, match="30 tokens per minute"):
            await bob.generate_once("tell me", max_new_tokens=1)


async def test_who_leaves_before_the_first_token_is_charged_for_the_prompt(
    running: Running,
) -> None:
    running.worker.token_seconds = 60.0  # a long prefill
    key = running.add_tenant("bob", limits={"tokens_per_minute": 30})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        stream = bob.generate(list(range(40)), max_new_tokens=5)
        await stream.started()
        await until(lambda: running.worker.running)
        stream.cancel()
        await running.worker.wait_for_abort()
        await until(lambda: running.gateway._admissions._metrics.open_requests == 0)
        with pytest.raises(RateLimited, match="30 tokens per minute"):
            await bob.generate_once("tell me", max_new_tokens=1)


async def test_a_worker_that_gave_nothing_costs_nothing(running: Running) -> None:
    key = running.add_tenant("bob", limits={"tokens_per_minute": 30})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        running.worker.faults.refuse_status = 503
        with pytest.raises(Unavailable):
            await bob.generate_once(list(range(40)), max_new_tokens=1)
        running.worker.faults.refuse_status = None
        await bob.generate_once("tell me", max_new_tokens=1)


async def test_what_came_from_a_worker_that_was_lost_is_charged(running: Running) -> None:
    key = running.add_tenant("bob", limits={"tokens_per_minute": 30})
    running.worker.token_seconds = 0.005
    running.worker.faults.cut_after_tokens = 3
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        with pytest.raises(Unavailable):
            await bob.generate_once(list(range(40)), max_new_tokens=9)
        with pytest.raises(RateLimited, match="30 tokens per minute"):
            await bob.generate_once("tell me", max_new_tokens=1)


async def test_one_request_after_the_other_is_one_at_once(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer has not ended before its place is free, though Redis takes its time."""
    usage = running.gateway._admissions._usage
    leave = usage.leave

    async def slow(*arguments: Any) -> None:
        await asyncio.sleep(0.1)
        await leave(*arguments)

    monkeypatch.setattr(usage, "leave", slow)
    key = running.add_tenant("bob", limits={"max_concurrent_requests": 1})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        for _ in range(2):
            await bob.generate_once("tell me", max_new_tokens=1)


async def test_concurrent_requests(running: Running) -> None:
    running.worker.token_seconds = 0.01
    key = running.add_tenant("bob", limits={"max_concurrent_requests": 2})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        streams = [bob.generate("tell me", max_new_tokens=4000) for _ in range(2)]
        for stream in streams:
            await stream.started()
        code, text, seconds = await refusal(running, key)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and seconds == 1.0
        assert "tenant bob may have 2 requests at once" in text
        streams[0].cancel()
        await running.worker.wait_for_abort_of(1)
        await bob.generate_once("tell me", max_new_tokens=1)
        streams[1].cancel()


async def test_who_leaves_while_its_limits_are_asked_for_keeps_no_place(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Redis, which may have counted the request when the client leaves."""
    admissions = running.gateway._admissions
    enter, counted = admissions._usage.enter, asyncio.Event()

    async def slow(*arguments: Any) -> None:
        await enter(*arguments)
        counted.set()
        await asyncio.Event().wait()

    key = running.add_tenant("bob", limits={"max_concurrent_requests": 1})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        with monkeypatch.context() as patched:
            patched.setattr(admissions._usage, "enter", slow)
            leaving = asyncio.create_task(bob.generate_once("tell me", max_new_tokens=1))
            await counted.wait()
            leaving.cancel()
            await until(lambda: admissions._metrics.open_requests == 0)
        await bob.generate_once("tell me", max_new_tokens=1)


async def test_replays_are_not_counted_and_not_charged(running: Running) -> None:
    limits = {"requests_per_second": 1, "tokens_per_minute": 60}
    key = running.add_tenant("bob", limits=limits)
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        answer = await bob.generate_once("tell me", max_new_tokens=30)
        with pytest.raises(RateLimited, match="1 requests per second"):
            await bob.generate_once("tell me", max_new_tokens=1)
        for _ in range(4):  # 128 tokens, at once
            assert (await bob.replay(answer.request_id).verdict()).outcome == "MATCH"
        await asyncio.sleep(1.0)
        await bob.generate_once("tell me", max_new_tokens=1)


async def test_a_replay_is_not_one_of_the_concurrent_requests(running: Running) -> None:
    key = running.add_tenant("bob", limits={"max_concurrent_requests": 1})
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        answer = await bob.generate_once("tell me", max_new_tokens=30)
        running.worker.token_seconds = 0.01
        stream = bob.generate("tell me", max_new_tokens=4000)
        await stream.started()
        assert (await bob.replay(answer.request_id).verdict()).outcome == "MATCH"
        stream.cancel()
        await running.worker.wait_for_abort()
        replay = bob.replay(answer.request_id)
        async for _ in replay:
            break
        await bob.generate_once("tell me", max_new_tokens=1)  # beside the replay
        replay.cancel()


async def test_a_full_bucket_holds_what_a_second_or_a_minute_allows() -> None:
    now = 0.0
    usage = LocalUsage(lambda: now)
    limits = UsageLimits(requests_per_second=0.5, tokens_per_minute=60, concurrent=None)

    async def refused() -> float:
        with pytest.raises(LimitExceeded) as error:
            await usage.enter("t", limits, "x")
        assert error.value.retry_seconds is not None
        return error.value.retry_seconds

    await usage.enter("t", limits, "a")
    assert await refused() == pytest.approx(2)
    now = 1000.0
    await usage.enter("t", limits, "b")
    assert await refused() == pytest.approx(2)
    await usage.leave("t", limits, "a", 50)
    await usage.leave("t", limits, "b", 50)
    now += 2
    assert await refused() == pytest.approx(1 + 38)
    now += 39
    await usage.enter("t", limits, "c")
    now = 2000.0  # what would have come back meanwhile found the bucket full
    await usage.leave("t", limits, "c", 80)
    assert await refused() == pytest.approx(1 + 20)


@pytest.fixture(scope="module")
def redis_url() -> Any:
    if REDIS_URL:
        yield REDIS_URL
        return
    with redis_server() as server:
        yield server.url


@pytest.fixture(params=["local", "redis"])
async def usage(request: pytest.FixtureRequest) -> AsyncIterator[Usage]:
    if request.param == "local":
        yield LocalUsage()
        return
    url = request.getfixturevalue("redis_url")
    store = await SharedUsage.connect(url, prefix=uuid.uuid4().hex, on_failure="refuse")
    yield store
    await store.close()


async def test_both_stores_count_alike(usage: Usage) -> None:
    limits = UsageLimits(requests_per_second=0.5, tokens_per_minute=60, concurrent=3)
    at_once = UsageLimits(requests_per_second=None, tokens_per_minute=None, concurrent=3)

    async def refused(reason: str) -> float:
        with pytest.raises(LimitExceeded) as error:
            await usage.enter("t", limits, "refused")
        assert error.value.reason == reason
        assert error.value.retry_seconds is not None
        return error.value.retry_seconds

    for name in "abc":
        await usage.enter("t", at_once, name)
    assert await refused("concurrency") == 1.0
    await usage.leave("t", at_once, "a", 0)
    await usage.enter("t", limits, "d")
    await usage.leave("t", limits, "b", 0)
    seconds = await refused("requests")
    assert 0 < seconds <= 2
    await asyncio.sleep(seconds + 0.1)
    await usage.enter("t", limits, "e")
    await usage.leave("t", limits, "c", 61)
    seconds = await refused("tokens")
    assert 0 < seconds <= 2
    await asyncio.sleep(seconds + 0.1)
    await usage.enter("t", limits, "f")
    other = UsageLimits(requests_per_second=4, tokens_per_minute=None, concurrent=4)
    for name in "ghij":  # what a second allows, at once
        await usage.enter("another", other, name)
    await usage.leave("another", other, "unknown", 0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis may take its time. To be named before `usage`."""
    monkeypatch.setattr(shared, "TIMEOUT_SECONDS", 30.0)


async def test_all_at_once_are_counted(patient: None, usage: Usage) -> None:
    """More than there are connections to Redis."""
    limits = UsageLimits(requests_per_second=None, tokens_per_minute=10**6, concurrent=300)
    names = [str(number) for number in range(300)]
    await asyncio.gather(*(usage.enter("t", limits, name) for name in names))
    with pytest.raises(LimitExceeded):
        await usage.enter("t", limits, "one more")
    await asyncio.gather(*(usage.leave("t", limits, name, 4000) for name in names))
    with pytest.raises(LimitExceeded) as error:
        await usage.enter("t", limits, "later")
    assert error.value.retry_seconds == pytest.approx(12, abs=1)  # all of them are charged


async def test_redis_forgets_a_tenant_when_it_owes_nothing(redis_url: str) -> None:
    """Neither earlier, which would be a gift, nor never."""
    limits = UsageLimits(requests_per_second=50, tokens_per_minute=60, concurrent=2)
    prefix = uuid.uuid4().hex
    usage = await SharedUsage.connect(redis_url, prefix=prefix, on_failure="refuse")
    async with redis.asyncio.from_url(redis_url) as client:
        await usage.enter("t", limits, "a")
        await usage.enter("t", limits, "b")
        assert 30 < await client.ttl(f"{prefix}:{{t}}:leases") <= 90
        await usage.leave("t", limits, "a", 6000)
        await usage.leave("t", limits, "b", 0)
        assert 6000 < await client.ttl(f"{prefix}:{{t}}:levels") <= 6060
    await usage.close()


async def test_gateways_share_what_redis_counts(tmp_path: Path, redis_url: str) -> None:
    section = {"redis_url": redis_url, "redis_prefix": uuid.uuid4().hex}
    (tmp_path / "other").mkdir()
    async with (
        run_gateway(tmp_path, limits=section) as one,
        run_gateway(tmp_path / "other", limits=section) as two,
    ):
        limits = {"max_concurrent_requests": 1}
        keys = [gateway.add_tenant("bob", limits=limits) for gateway in (one, two)]
        one.worker.token_seconds = 0.01
        async with (
            AsyncClient(one.target, keys[0], retry=NEVER) as bob,
            AsyncClient(two.target, keys[1], retry=NEVER) as too,
        ):
            stream = bob.generate("tell me", max_new_tokens=4000)
            await stream.started()
            with pytest.raises(RateLimited, match="1 requests at once"):
                await too.generate_once("tell me", max_new_tokens=1)
            stream.cancel()
            await one.worker.wait_for_abort()
            await too.generate_once("tell me", max_new_tokens=1)


async def test_a_dead_gateways_leases_end(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LEASE_SECONDS", 1.5)
    prefix = uuid.uuid4().hex
    limits = UsageLimits(None, None, concurrent=1)
    dying = await SharedUsage.connect(redis_url, prefix=prefix, on_failure="refuse")
    other = await SharedUsage.connect(redis_url, prefix=prefix, on_failure="refuse")
    await dying.enter("t", limits, "a")
    await asyncio.sleep(2.0)
    with pytest.raises(LimitExceeded):  # it was renewed
        await other.enter("t", limits, "b")
    await dying.close()
    await asyncio.sleep(1.7)
    await other.enter("t", limits, "b")
    await other.close()


async def test_closing_ends_though_a_renewal_takes_the_cancellation_for_an_error(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Redis's client does now and then."""
    monkeypatch.setattr(shared, "LEASE_SECONDS", 0.03)
    usage = await SharedUsage.connect(redis_url, prefix=uuid.uuid4().hex, on_failure="refuse")
    renewing = asyncio.Event()

    async def renew(**_: object) -> None:
        renewing.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            raise redis.RedisError from error

    monkeypatch.setattr(usage, "_renew", renew)
    await usage.enter("t", UsageLimits(None, None, concurrent=1), "a")
    await renewing.wait()
    await asyncio.wait_for(usage.close(), 5)


async def let_in(usage: SharedUsage, limits: UsageLimits, request_id: str) -> None:
    """Ask until the tenant `t` has room for the request."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await usage.enter("t", limits, request_id)
            except LimitExceeded:
                await asyncio.sleep(0.02)


async def test_a_request_that_redis_let_in_too_late_keeps_no_place() -> None:
    limits = UsageLimits(None, None, concurrent=1)
    with redis_server() as server:
        usage = await SharedUsage.connect(server.url, prefix="p", on_failure="refuse")
        await usage.enter("t", limits, "first")  # from here on Redis has the script
        await usage.leave("t", limits, "first", 0)
        server.pause()
        with pytest.raises(LimitsUnavailable):
            await usage.enter("t", limits, "a")
        server.resume()
        await let_in(usage, limits, "b")
        await usage.close()


async def test_a_request_whose_end_redis_was_not_told_keeps_no_place() -> None:
    limits = UsageLimits(None, None, concurrent=1)
    with redis_server() as server:
        usage = await SharedUsage.connect(server.url, prefix="p", on_failure="refuse")
        await usage.enter("t", limits, "a")
        # So that the end is not sent: a new connection begins with a question.
        await usage._client.connection_pool.disconnect()
        server.pause()
        await usage.leave("t", limits, "a", 0)
        server.resume()
        await let_in(usage, limits, "b")
        await usage.close()


async def test_a_redis_that_became_a_replica_is_left() -> None:
    """In a failover its name leads to another one, but not the connections that are open."""
    limits = UsageLimits(None, 10**6, None)
    with redis_server() as server:
        usage = await SharedUsage.connect(server.url, prefix="p", on_failure="refuse")
        await usage.enter("t", limits, "a")
        async with redis.asyncio.from_url(server.url) as client:
            await client.replicaof("127.0.0.1", "9")
            await usage.leave("t", limits, "a", 1)  # writes, so it is refused
            async with asyncio.timeout(5):
                while len(await client.client_list()) > 1:
                    await asyncio.sleep(0.02)
        await usage.close()


async def test_idle_connections_that_redis_has_closed_harm_no_request() -> None:
    """As its `timeout` and a failover do."""
    limits = UsageLimits(None, 60, concurrent=20)  # a token a second comes back
    names = [str(number) for number in range(10)]
    with redis_server() as server:
        usage = await SharedUsage.connect(server.url, prefix="p", on_failure="refuse")
        await asyncio.gather(*(usage.enter("t", limits, name) for name in names))
        async with redis.asyncio.from_url(server.url) as client:
            assert await client.client_kill_filter(_type="normal", skipme=True) > 1
            await asyncio.gather(*(usage.leave("t", limits, name, 1000) for name in names))
            left = await client.hget("p:{t}:levels", "tokens")  # type: ignore[misc]
            assert float(left) == pytest.approx(60 - 10_000, abs=500)
            await client.client_kill_filter(_type="normal", skipme=True)
        await asyncio.gather(*(usage.enter("u", limits, name) for name in names))
        await usage.close()


@pytest.mark.parametrize("on_failure", ["refuse", "allow"])
async def test_a_redis_that_is_back_counts_what_runs(
    monkeypatch: pytest.MonkeyPatch, on_failure: shared.OnFailure
) -> None:
    """What it lost with its data, and what was let in while it was away."""
    monkeypatch.setattr(shared, "LEASE_SECONDS", 6.0)
    limits = UsageLimits(None, None, concurrent=1)
    with redis_server() as server:
        usage = await SharedUsage.connect(server.url, prefix="p", on_failure=on_failure)
        if on_failure == "refuse":
            await usage.enter("t", limits, "a")
        server.kill()
        if on_failure == "allow":
            await usage.enter("t", limits, "a")
        server.start()
        async with redis.asyncio.from_url(server.url) as client, asyncio.timeout(10):
            while not await client.zcard("p:{t}:leases"):
                await asyncio.sleep(0.02)
        with pytest.raises(LimitExceeded):
            await usage.enter("t", limits, "b")
        await usage.leave("t", limits, "a", 0)
        await usage.enter("t", limits, "c")
        await usage.close()


@pytest.mark.parametrize("name", ["requests", "tokens"])
async def test_a_redis_whose_clock_was_set_back_locks_nobody_out(redis_url: str, name: str) -> None:
    limits = UsageLimits(requests_per_second=50, tokens_per_minute=3000, concurrent=None)
    prefix = uuid.uuid4().hex
    usage = await SharedUsage.connect(redis_url, prefix=prefix, on_failure="refuse")
    async with redis.asyncio.from_url(redis_url) as client:
        seconds, _ = await client.time()
        noted = {name: "0.5", f"{name}_at": str(seconds + 3600)}
        await client.hset(f"{prefix}:{{t}}:levels", mapping=noted)  # type: ignore[misc]
    await let_in(usage, limits, "a")
    await usage.close()


async def test_a_renewal_brings_back_no_request_that_left(redis_url: str) -> None:
    limits = UsageLimits(None, None, concurrent=1)
    prefix = uuid.uuid4().hex
    usage = await SharedUsage.connect(redis_url, prefix=prefix, on_failure="refuse")
    await usage.enter("t", limits, "a")
    renew = usage._renew

    async def overtaken(**arguments: Any) -> Any:
        await usage.leave("t", limits, "a", 0)
        return await renew(**arguments)

    usage._renew = overtaken  # type: ignore[assignment]
    await usage._renew_leases("t")
    await let_in(usage, limits, "b")
    await usage.close()


async def test_what_is_removed_later_is_removed_in_no_requests_name(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")
    seen: list[str] = []
    usage = await SharedUsage.connect(redis_url, prefix=uuid.uuid4().hex, on_failure="refuse")

    async def zrem(*_: Any) -> int:
        seen.append(name.get())
        return 1

    monkeypatch.setattr(usage._client, "zrem", zrem)
    name.set("alice")
    usage._remove("t", {"a"})
    await until(lambda: not usage._stray)
    assert seen == ["nobody"]
    await usage.close()


async def test_redis_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(SharedUsageError, match="Redis does not answer"):
        async with run_gateway(tmp_path, limits={"redis_url": "redis://127.0.0.1:9/0"}):
            pass
    with pytest.raises(SharedUsageError, match="redis_url cannot be used"):
        await SharedUsage.connect("nonsense", prefix="x", on_failure="refuse")


@pytest.mark.parametrize("choice", ["refuse", "allow"])
async def test_redis_that_goes_away(tmp_path: Path, choice: str) -> None:
    with redis_server() as server:
        section = {"redis_url": server.url, "on_redis_failure": choice}
        async with run_gateway(tmp_path, limits=section) as running:
            key = running.add_tenant("bob", limits={"max_concurrent_requests": 1})
            async with AsyncClient(running.target, key, retry=NEVER) as bob:
                await bob.generate_once("tell me", max_new_tokens=1)
                server.kill()
                if choice == "allow":
                    await bob.generate_once("tell me", max_new_tokens=1)
                else:
                    with pytest.raises(Unavailable, match="limits cannot be checked just now"):
                        await bob.generate_once("tell me", max_new_tokens=1)
                # A tenant without limits needs no Redis.
                await running.client.generate_once("tell me", max_new_tokens=1)
                server.start()
                await bob.generate_once("tell me", max_new_tokens=1)
