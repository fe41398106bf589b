"""`vase-sgl serve` as a process: ready line, drain on SIGTERM, errors before anything starts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.gateway.running import add_tenant, until_ready
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import AsyncClient, Unavailable, VaseError


@asynccontextmanager
async def serve(folder: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VASE_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vase_sgl.cli", "serve", *options),
        env={**environment, "VASE_DRAIN_SECONDS": "8"},
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def target_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
    assert line.startswith("vase-sgl is serving on 127.0.0.1:"), line
    return line.split()[-1]


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker() as worker:
        yield worker


async def test_sigterm_drains(tmp_path: Path, worker: ScriptedWorker) -> None:
    """NOT_SERVING first; the running answer ends well, a new one is refused; exit status 0."""
    key = add_tenant(tmp_path / ".vase-sgl" / "tenants.yaml", "alice")
    worker.token_seconds = 0.02
    async with serve(tmp_path, "--worker-url", worker.url, "--grpc-port", "0") as process:
        target = await target_of(process)
        async with AsyncClient(target, key) as client, grpc.aio.insecure_channel(target) as channel:
            await until_ready(client)
            stream = client.generate("tell me", max_new_tokens=100)
            await stream.started()
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            states = aiter(watch)
            assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGTERM)
            state = await asyncio.wait_for(anext(states), 5)
            assert state.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await asyncio.sleep(0.3)
            async with AsyncClient(target, key) as late:
                with pytest.raises(Unavailable):
                    await late.generate_once("tell me", max_new_tokens=2)
            tokens = [t async for chunk in stream for t in chunk.token_ids]
            assert len(tokens) == 100 and stream.result.finish_reason == "length"
            assert await asyncio.wait_for(process.wait(), 8) == 0


async def test_a_second_signal_stops_at_once(tmp_path: Path, worker: ScriptedWorker) -> None:
    worker.token_seconds = 0.02
    options = ("--worker-url", worker.url, "--grpc-port", "0", "--insecure-no-auth")
    async with serve(tmp_path, *options) as process:
        async with AsyncClient(await target_of(process)) as client:
            await until_ready(client)
            stream = client.generate("tell me", max_new_tokens=4000)
            await stream.started()
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.5)
            process.send_signal(signal.SIGINT)
            with pytest.raises(VaseError):
                _ = [chunk async for chunk in stream]
            assert await asyncio.wait_for(process.wait(), 5) == 0
        await worker.wait_for_abort()
        assert process.stderr is not None
        errors = (await process.stderr.read()).decode()
    assert "INSECURE" in errors and "Traceback" not in errors


async def failure(folder: Path, *options: str) -> str:
    async with serve(folder, *options) as process:
        output, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1 and output == b"" and b"Traceback" not in errors
    return errors.decode()


async def test_errors_come_before_anything_starts(tmp_path: Path, worker: ScriptedWorker) -> None:
    url = ("--worker-url", worker.url)
    assert "error: no worker: set worker.model_path" in await failure(tmp_path)
    assert "vase-sgl tenants add NAME" in await failure(tmp_path, *url)
    (tmp_path / "bad.yaml").write_text("listn: {}")
    assert "listn: unknown key" in await failure(tmp_path, "--config", "bad.yaml", *url)
    open_to_all = ("--insecure-no-auth", *url)
    assert "audit.url cannot be used" in await failure(
        tmp_path, "--audit-url", "nonsense", *open_to_all
    )
    async with serve(tmp_path, "--grpc-port", "0", *open_to_all) as process:
        port = (await target_of(process)).rpartition(":")[2]
        taken = await failure(tmp_path, "--grpc-port", port, *open_to_all)
        assert f"cannot listen on 127.0.0.1:{port}: the port is taken" in taken


async def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    options = ("--model-path", "/no/such/model", "--grpc-port", "0", "--insecure-no-auth")
    errors = await failure(tmp_path, *options)
    assert "the worker ended with exit code" in errors and "worker.log" in errors


async def test_ctrl_c_while_the_model_loads_leaves_nothing(tmp_path: Path) -> None:
    # This port accepts nothing, so the gateway waits for its worker until it is interrupted.
    options = ("--worker-url", "http://127.0.0.1:9", "--grpc-port", "0", "--insecure-no-auth")
    async with serve(tmp_path, *options) as process:
        await target_of(process)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 5) == 0
