"""Probes, clients that do not read or send, and clients that ping too much."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.test_abort import record_of
from vase_sgl.client import NEVER, AsyncClient, RateLimited, Unavailable, VaseError, channels
from vase_sgl.gateway.health import GatewayHealth
from vase_sgl.gateway.patience import Patience

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_liveness_is_not_readiness(tmp_path: Path) -> None:
    """While it drains, and without a worker, the gateway is alive and not ready."""
    async with (
        run_gateway(tmp_path, drain_seconds=10) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        ready_names = ("", "readiness", "vase.v1.VaseGateway")
        assert [await status(n) for n in (*ready_names, "liveness")] == [SERVING] * 4
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await status("other")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        running.worker.faults.healthy = False
        async with asyncio.timeout(5):
            while await status("readiness") == SERVING:
                await asyncio.sleep(0.02)
        assert [await status(n) for n in ready_names] == [NOT_SERVING] * 3
        assert await status("liveness") == SERVING
        running.worker.faults.healthy = True
        async with asyncio.timeout(5):
            while await status("readiness") != SERVING:
                await asyncio.sleep(0.02)

        running.worker.token_seconds = 0.02
        stream = running.client.generate("tell me", max_new_tokens=50)
        await stream.started()
        watches = {
            name: aiter(stub.Watch(health_pb2.HealthCheckRequest(service=name)))
            for name in ("readiness", "liveness")
        }
        for watch in watches.values():
            assert (await anext(watch)).status == SERVING
        stopping = asyncio.create_task(running.gateway.stop())
        assert (await anext(watches["readiness"])).status == NOT_SERVING
        with pytest.raises(StopAsyncIteration):  # ended, and never told NOT_SERVING
            await anext(watches["liveness"])
        async with AsyncClient(running.target, running.key, retry=NEVER) as late:
            with pytest.raises(Unavailable):
                await late.generate_once("tell me")
        assert sum([len(chunk.token_ids) async for chunk in stream]) == 50
        await stopping


async def test_draining_takes_no_longer_than_it_must(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, drain_seconds=20) as running:
        running.worker.token_seconds = 0.01
        stream = running.client.generate("tell me", max_new_tokens=20)
        await stream.started()
        stopping = asyncio.create_task(running.gateway.stop())
        assert sum([len(chunk.token_ids) async for chunk in stream]) == 20
        await asyncio.wait_for(stopping, 8)


async def test_a_gateway_that_stops_is_not_ready_again() -> None:
    """Though a worker gets ready while it drains."""
    state = GatewayHealth("name")
    await state.announce(True)
    request = health_pb2.HealthCheckRequest(service="readiness")
    assert (await state.Check(request, None)).status == SERVING
    await state.shut_down()
    await state.announce(True)
    assert (await state.Check(request, None)).status == NOT_SERVING


@pytest.mark.parametrize(("calls", "most"), [(1000, 64), (8, 2)])
async def test_watches_are_bounded(tmp_path: Path, calls: int, most: int) -> None:
    """They need no key: without a bound anyone could take every call there is."""
    async with (
        run_gateway(tmp_path, grpc={"max_concurrent_calls": calls}) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="liveness")
        watches = [stub.Watch(request) for _ in range(most)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError, match=f"{most} clients watch"):
            await stub.Watch(request).read()
        await running.client.capacity()
        watches[0].cancel()
        await asyncio.sleep(0.1)
        assert (await stub.Watch(request).read()).status == SERVING


async def test_a_gateway_with_as_many_calls_as_may_be_is_alive(tmp_path: Path) -> None:
    """Whoever probes it would otherwise end it, and all of its streams."""
    async with (
        run_gateway(tmp_path, grpc={"max_concurrent_calls": 2}) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        running.worker.token_seconds = 0.02
        streams = [running.client.generate("tell me", max_new_tokens=4000) for _ in range(2)]
        for stream in streams:
            await stream.started()
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("liveness", "readiness"):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await stub.Check(request)).status == SERVING
        with pytest.raises(RateLimited, match="2 calls run already") as error:
            await running.client.capacity()
        assert error.value.retry_seconds == 1.0
        for stream in streams:
            stream.cancel()
        await running.worker.wait_for_abort_of(2)
        await until(lambda: not running.gateway._admissions._metrics.open_requests)
        await running.client.capacity()


async def test_a_watcher_that_does_not_read_holds_up_nothing(tmp_path: Path) -> None:
    """It allows the gateway to send it nothing at all, not even the first state."""
    async with (
        run_gateway(tmp_path) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", running.gateway.port)
        initial_window_size = struct.pack(">HI", 4, 0)
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/grpc.health.v1.Health/Watch",
            ":authority": "gateway",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        literals = b"".join(
            bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in headers.items()
        )
        message = health_pb2.HealthCheckRequest(service="readiness").SerializeToString()
        writer.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS, initial_window_size)
            + frame(HEADERS, literals, flags=4, stream=1)
            + frame(DATA, b"\0" + struct.pack(">I", len(message)) + message, flags=1, stream=1)
        )
        try:
            await until(lambda: running.gateway._health._watches)
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="readiness")
            for healthy, status in ((False, NOT_SERVING), (True, SERVING)):
                running.worker.faults.healthy = healthy
                async with asyncio.timeout(5):
                    while (await stub.Check(request)).status != status:
                        await asyncio.sleep(0.02)
            async with asyncio.timeout(5):
                await running.gateway._health.shut_down()
        finally:
            writer.close()


@pytest.mark.usefixtures("long_tokens")
async def test_a_client_that_does_not_read_is_given_up(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, grpc={"client_stall_seconds": 0.5}) as running:
        running.worker.padding = 30_000
        stream = running.client.generate("tell me", max_new_tokens=2000)
        request_id = await stream.started()
        assert await running.worker.wait_for_abort(20) == request_id
        assert running.worker.tokens_written < 500
        record = await record_of(running, request_id)
        assert record.status == "aborted" and record.finish_reason == "unknown"
        with pytest.raises(VaseError, match=r"did not read for 0\.5 s") as error:
            _ = [chunk async for chunk in stream]
        assert error.value.code == "ABORTED"
        await running.client.generate_once("tell me", max_new_tokens=1)


GENERATE = "/vase.v1.VaseGateway/Generate"
CHECK = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Unsent:
    """Calls on one connection that never send a message."""

    def __init__(
        self, channel: grpc.aio.Channel, path: str, count: int, key: str | None = None
    ) -> None:
        async def nothing() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        call: Any = channel.stream_stream(path)
        self.calls = [call(nothing(), metadata=channels.metadata(key)) for _ in range(count)]

    def open(self) -> int:
        return sum(not call.done() for call in self.calls)

    async def codes(self) -> set[grpc.StatusCode]:
        """How those that are over ended."""
        return {await call.code() for call in self.calls if call.done()}


async def assert_served(running: Running, channel: grpc.aio.Channel) -> None:
    """The tenant `alice` and a probe on `channel` get their answers."""
    await running.client.generate_once("tell me", max_new_tokens=1)
    stub = health_pb2_grpc.HealthStub(channel)
    for _ in range(4):
        request = health_pb2.HealthCheckRequest(service="liveness")
        assert (await stub.Check(request)).status == SERVING


@pytest.mark.parametrize("path", [CHECK, REFLECTION])
async def test_strangers_that_send_nothing_leave_room(tmp_path: Path, path: str) -> None:
    """They may have every fourth call, and a later one takes the place of the oldest."""
    async with (
        run_gateway(tmp_path, grpc={"max_concurrent_calls": 8}) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        unsent = Unsent(channel, path, 8)
        await until(lambda: unsent.open() == 2)
        assert grpc.StatusCode.ABORTED in await unsent.codes()
        await assert_served(running, channel)


async def test_who_calls_is_asked_before_the_message_comes(tmp_path: Path) -> None:
    async with (
        run_gateway(tmp_path) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        unsent = Unsent(channel, GENERATE, 8)
        await until(lambda: not unsent.open())
        assert await unsent.codes() == {grpc.StatusCode.UNAUTHENTICATED}


async def test_a_tenant_that_sends_nothing_leaves_room_for_others(tmp_path: Path) -> None:
    async with (
        run_gateway(tmp_path, grpc={"max_concurrent_calls": 8}) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        unsent = Unsent(channel, GENERATE, 8, running.add_tenant("bob"))
        await until(lambda: unsent.open() == 2)
        assert grpc.StatusCode.ABORTED in await unsent.codes()
        await assert_served(running, channel)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (GENERATE, "message did not come; the gateway waits for it for 0.3 s"),
        (CHECK, "message did not come; the gateway waits for it for 0.3 s"),
        (REFLECTION, "such a stream may last 0.3 s"),
    ],
)
async def test_a_call_that_sends_nothing_is_given_up(tmp_path: Path, path: str, text: str) -> None:
    async with (
        run_gateway(tmp_path, grpc={"client_stall_seconds": 0.3}) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        unsent = Unsent(channel, path, 1, running.key)
        await until(lambda: not unsent.open())
        assert await unsent.codes() == {grpc.StatusCode.ABORTED}
        assert text in await unsent.calls[0].details()


async def test_a_call_without_a_message_is_told_so(tmp_path: Path) -> None:
    async with (
        run_gateway(tmp_path) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        call: Any = channel.stream_stream(GENERATE)(metadata=channels.metadata(running.key))
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError, match="ended without a message") as error:
            await asyncio.wait_for(call.read(), 10)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_reflection_stream_answers_many_questions(tmp_path: Path) -> None:
    async with (
        run_gateway(tmp_path) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        questions = [
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
            for name in ("vase.v1.VaseGateway", "grpc.health.v1.Health") * 10
        ]
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(iter(questions))]
        assert all(answer.HasField("file_descriptor_response") for answer in answers)
        assert len(answers) == 20


async def test_a_caller_crowds_out_only_itself() -> None:
    patience = Patience(seconds=60, max_calls=8)
    ended: list[str] = []

    async def wait(caller: str | None, name: str) -> None:
        try:
            async with patience.wait(caller):
                await asyncio.Event().wait()
        except TimeoutError:
            ended.append(name)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        tasks = [group.create_task(wait(None, "stranger"))]
        tasks += [group.create_task(wait("bob", f"bob {n}")) for n in range(5)]
        await until(lambda: len(ended) == 3)
        assert ended == ["bob 0", "bob 1", "bob 2"]
        for task in tasks:
            task.cancel()


async def test_calls_that_come_at_once_are_all_taken(tmp_path: Path) -> None:
    """More than may wait for their messages, or for a worker: these are on their way."""
    async with run_gateway(tmp_path, grpc={"max_concurrent_calls": 100}) as running:
        calls = [running.client.generate_once("tell me", max_new_tokens=1) for _ in range(90)]
        answers = await asyncio.gather(*calls)
        assert len(answers) == 90


#: Kinds of HTTP/2 frames.
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """A frame of HTTP/2."""
    length = struct.pack(">I", len(payload))[1:]
    return length + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def is_cut_off(port: int, interval: float, pings: int = 8) -> bool:
    """Whether the gateway closes a connection that pings at this interval, in seconds."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS))
        try:
            for _ in range(pings):
                connection.sendall(frame(PING, b"12345678"))
                time.sleep(interval)
            connection.settimeout(0.3)
            while connection.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True


async def test_clients_may_ping_but_not_flood(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, grpc={"min_ping_interval_seconds": 0.05}) as running:
        port = running.gateway.port
        assert not await asyncio.to_thread(is_cut_off, port, 0.1)
        assert await asyncio.to_thread(is_cut_off, port, 0.001)
