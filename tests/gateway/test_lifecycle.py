"""Probes, clients that do not read, and clients that ping too much."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.gateway.running import run_gateway
from tests.gateway.test_abort import record_of
from vase_sgl.client import NEVER, AsyncClient, Unavailable, VaseError

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


async def test_watches_are_bounded(tmp_path: Path) -> None:
    """They need no key: without a bound anyone could take every call there is."""
    async with (
        run_gateway(tmp_path, grpc={"max_concurrent_calls": 100}) as running,
        grpc.aio.insecure_channel(running.target) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="liveness")
        watches = [stub.Watch(request) for _ in range(64)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError, match="64 clients watch"):
            await stub.Watch(request).read()
        await running.client.capacity()
        watches[0].cancel()
        await asyncio.sleep(0.1)
        assert (await stub.Watch(request).read()).status == SERVING


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


def is_cut_off(port: int, interval: float, pings: int = 8) -> bool:
    """Whether the gateway closes a connection that pings at this interval, in seconds."""
    frame = struct.Struct(">I")

    def header(length: int, kind: bytes) -> bytes:
        return frame.pack(length)[1:] + kind + b"\x00" + frame.pack(0)

    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + header(0, b"\x04"))
        try:
            for _ in range(pings):
                connection.sendall(header(8, b"\x06") + b"12345678")
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
