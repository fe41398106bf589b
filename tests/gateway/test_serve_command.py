"""`vase-sgl serve` as a process: ready line, drain on SIGTERM, errors before anything starts."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from tests.gateway.running import add_tenant, until_ready
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.cli import build_app
from vase_sgl.client import NEVER, AsyncClient, Unavailable, VaseError


@asynccontextmanager
async def serve(folder: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    async with run_python(folder, "-m", "vase_sgl.cli", "serve", *options) as process:
        yield process


@asynccontextmanager
async def run_python(folder: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VASE_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        env={**environment, "VASE_DRAIN_SECONDS": "20"},
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
        async with (
            AsyncClient(target, key, retry=NEVER) as client,
            grpc.aio.insecure_channel(target) as channel,
        ):
            await until_ready(client)
            stream = client.generate("tell me", max_new_tokens=60)
            await stream.started()
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            states = aiter(watch)
            assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGTERM)
            state = await asyncio.wait_for(anext(states), 5)
            assert state.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await asyncio.sleep(0.3)
            async with AsyncClient(target, key, retry=NEVER) as late:
                with pytest.raises(Unavailable):
                    await late.generate_once("tell me", max_new_tokens=2)
            tokens = [t async for chunk in stream for t in chunk.token_ids]
            assert len(tokens) == 60 and stream.result.finish_reason == "length"
            ended = time.monotonic()
            assert await asyncio.wait_for(process.wait(), 8) == 0
            assert time.monotonic() - ended < 3, "the open watch held up the drain"


async def test_a_second_signal_stops_at_once(tmp_path: Path, worker: ScriptedWorker) -> None:
    worker.token_seconds = 0.02
    options = ("--worker-url", worker.url, "--grpc-port", "0", "--insecure-no-auth")
    ports = ("--http-port", "0", "--metrics-port", "0")
    async with serve(tmp_path, *options, *ports) as process:
        assert process.stdout is not None
        said = [(await process.stdout.readline()).decode() for _ in ports[::2]]
        assert said[0].startswith("metrics on http://127.0.0.1:")
        assert said[1].startswith("OpenAI-compatible HTTP on 127.0.0.1:")
        async with AsyncClient(await target_of(process), retry=NEVER) as client:
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


async def test_a_terminal_that_is_gone_drains(tmp_path: Path, worker: ScriptedWorker) -> None:
    """Nothing can be said any more, and the signal comes from the shell and from the kernel."""
    worker.token_seconds = 0.02
    options = ("--worker-url", worker.url, "--grpc-port", "0", "--insecure-no-auth")
    terminal, its_end = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vase_sgl.cli", "serve", *options),
        cwd=tmp_path,
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
    )
    os.close(its_end)
    try:
        with open(terminal, "rb", buffering=0) as lines:
            said = b""
            while b"serving on" not in said:
                said = await asyncio.wait_for(asyncio.to_thread(lines.readline), 30)
            client = AsyncClient(said.decode().split()[-1], retry=NEVER)
            await until_ready(client)
            stream = client.generate("tell me", max_new_tokens=60)
            await stream.started()
        process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGHUP)
        assert len([t async for chunk in stream for t in chunk.token_ids]) == 60
        await client.close()
        assert await asyncio.wait_for(process.wait(), 8) == 0
    finally:
        if process.returncode is None:
            process.kill()


async def test_under_nohup_it_goes_on(tmp_path: Path, worker: ScriptedWorker) -> None:
    nohup = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "os.execv(sys.executable, [sys.executable, '-m', 'vase_sgl.cli', 'serve', *sys.argv[1:]])"
    )
    options = ("--worker-url", worker.url, "--grpc-port", "0", "--insecure-no-auth")
    async with run_python(tmp_path, "-c", nohup, *options) as process:
        async with AsyncClient(await target_of(process), retry=NEVER) as client:
            await until_ready(client)
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.3)
            await client.generate_once("tell me", max_new_tokens=2)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 8) == 0


def failure(*options: str) -> str:
    """The error of a `serve` that ends before it serves."""
    result = CliRunner().invoke(build_app(), ["serve", *options])
    assert result.exit_code == 1 and result.stdout == ""
    return result.stderr


def test_errors_come_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = ("--worker-url", "http://127.0.0.1:9")
    assert failure().startswith("error: no worker: set worker.model_path")
    assert "vase-sgl tenants add NAME" in failure(*url)
    Path("bad.yaml").write_text("listn: {}")
    assert "listn: unknown key" in failure("--config", "bad.yaml", *url)
    open_to_all = ("--insecure-no-auth", *url)
    unusable = failure("--audit-url", "nonsense", "--grpc-port", "0", *open_to_all)
    assert "audit.url cannot be used" in unusable
    no_redis = failure("--redis-url", "redis://127.0.0.1:9/0", "--grpc-port", "0", *open_to_all)
    assert "Redis does not answer" in no_redis and "Traceback" not in no_redis
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = failure("--grpc-port", str(port), *open_to_all)
    assert f"cannot listen on 127.0.0.1:{port}: the port is taken" in taken


@pytest.mark.parametrize(
    ("option", "known"), [("--log-level", "debug, info, warning, error"), ("--log-format", "json")]
)
def test_unknown_ways_to_log_are_refused(option: str, known: str) -> None:
    result = CliRunner().invoke(build_app(), ["serve", option, "loud"])
    assert result.exit_code == 2 and known in result.stderr
