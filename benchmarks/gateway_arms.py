"""The two ways to a worker that `gateway.py` compares, and the processes behind them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web

from vase_sgl.gateway.worker_embedded import worker_command
from vase_sgl.parent_watch import PARENT_PID
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc

PROMPT = list(range(100, 164))
BUDGET, WINDOW = 512, 64
#: A request for so many tokens gets one, and then waits.
IDLE_TOKENS = 30_000


# -- the worker --------------------------------------------------------------------------------


def event(count: int, last: bool) -> bytes:
    """The event of one token, as SGLang sends it with `--incremental-streaming-output`."""
    vase = {
        "rounds": count // 64,
        "evicted_tokens": count // 64 * 64,
        "physical_length": len(PROMPT) + count % 64,
        "logical_length": len(PROMPT) + count,
        "reserved_slots": 576,
        "digest": "0123456789abcdef",
    }
    if last:
        vase["round_digests"] = ["0123456789abcdef"] * (count // 64)
    meta = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": count} if last else None,
        "prompt_tokens": len(PROMPT),
        "completion_tokens": count,
        "cached_tokens": 0,
        "vase": vase,
    }
    content = {"text": " word", "output_ids": [count], "meta_info": meta}
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def serve_worker() -> None:
    """Run the worker until SIGTERM; prints its port."""
    prepared: dict[int, list[bytes]] = {}

    async def generate(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        count = body["sampling_params"]["max_new_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if count == IDLE_TOKENS:
            await response.write(event(1, False))
            await asyncio.sleep(3600)
        events = prepared.setdefault(count, [event(n, n == count) for n in range(1, count + 1)])
        for content in events:
            await response.write(content)
            await asyncio.sleep(0)  # the streams advance together, a token each
        await response.write(b"data: [DONE]\n\n")
        return response

    async def info(request: web.Request) -> web.Response:
        vase = {
            "fingerprint": {"model": "none"},
            "limits": {"max_budget": 4096, "max_window": 64},
            "default": None,
            "slots": {"total": 10**9, "available": 10**9, "reserved": 0},
            "rounds": 0,
            "evicted_tokens": 0,
            "running_requests": 0,
            "max_running_requests": 10**5,
            "context_length": 10**7,
            "vocab_size": 10**5,
        }
        return web.json_response({"internal_states": [{"vase": vase}]})

    async def done(request: web.Request) -> web.Response:
        return web.Response()

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/generate", generate)
        app.router.add_post("/abort_request", done)
        app.router.add_get("/health", done)
        app.router.add_get("/server_info", info)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


# -- the two ways ------------------------------------------------------------------------------


class Direct:
    """The worker itself, read as the gateway reads it."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Direct:
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.close()

    async def tokens(self, count: int) -> tuple[int, float]:
        """Tokens of one answer, and seconds to the first."""
        start, first, seen = time.perf_counter(), 0.0, 0
        # The engine gets what the gateway would send it.
        sampling = {
            "max_new_tokens": count,
            "ignore_eos": True,
            "sampling_seed": 1,
            "custom_params": {"vase": {"budget": BUDGET, "window": WINDOW}},
        }
        body = {"input_ids": PROMPT, "stream": True, "sampling_params": sampling}
        async with self._http.post(f"{self._url}/generate", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    seen += len(json.loads(line[6:])["output_ids"])
                    first = first or time.perf_counter() - start
        return seen, first


class Through:
    """The gateway, over gRPC."""

    def __init__(self, target: str, key: str) -> None:
        self._target = target
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def __aenter__(self) -> Through:
        self._channel = grpc.aio.insecure_channel(self._target)
        self._stub = gateway_pb2_grpc.VaseGatewayStub(self._channel)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()

    def refused(self) -> Any:
        """A call without a key."""
        return self._stub.GetCapacity(pb.GetCapacityRequest())

    def call(self, count: int) -> Any:
        """The stream of one answer."""
        request = pb.GenerateRequest(
            max_new_tokens=count,
            sampling=pb.SamplingParams(ignore_eos=True),
            eviction=pb.EvictionParams(budget=BUDGET, window=WINDOW),
        )
        request.token_ids.ids.extend(PROMPT)
        return self._stub.Generate(request, metadata=self._metadata)

    async def tokens(self, count: int) -> tuple[int, float]:
        """Tokens of one answer, and seconds to the first."""
        start, first, seen = time.perf_counter(), 0.0, 0
        async for message in self.call(count):
            if message.HasField("chunk"):
                seen += len(message.chunk.token_ids)
                first = first or time.perf_counter() - start
        return seen, first


# -- the processes -----------------------------------------------------------------------------


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process, with its standard output in a pipe; SIGTERM at the end."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=folder,
        env=os.environ | {PARENT_PID: str(os.getpid())},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def scripted_worker(folder: Path) -> Iterator[str]:
    """URL of the worker without a model."""
    with started((sys.executable, str(Path(__file__).resolve())), folder) as worker:
        assert worker.stdout is not None
        yield f"http://127.0.0.1:{worker.stdout.readline().strip()}"


@contextlib.contextmanager
def real_worker(folder: Path, model: Path) -> Iterator[str]:
    """URL of a worker with a model, as the gateway starts its own. Raises `RuntimeError`.

    Without the prefix cache: the two ways ask the very same, and neither finds the other's prefix.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url, log = f"http://127.0.0.1:{port}", folder / "worker.log"
    command = (*worker_command(str(model), ("--disable-radix-cache",)), "--port", port)
    with log.open("wb") as output:
        worker = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | {PARENT_PID: str(os.getpid())},
        )
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=30):
                break
            if worker.poll() is not None:
                raise RuntimeError(f"the worker did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        worker.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


@contextlib.contextmanager
def gateway_to(url: str, folder: Path) -> Iterator[tuple[str, str, int]]:
    """A gateway in front of the worker: target, API key, process id."""
    cli = (sys.executable, "-m", "vase_sgl.cli")
    key = subprocess.check_output(
        [*cli, "tenants", "add", "bench"], text=True, stderr=subprocess.DEVNULL, cwd=folder
    ).strip()
    (folder / "serve.yaml").write_text(
        "grpc: {max_concurrent_calls: 4096}\nqueue: {max_waiting_per_tenant: 1024}\n"
    )
    command = (
        *(*cli, "serve", "--config", "serve.yaml", "--worker-url", url),
        *("--grpc-port", "0", "--log-level", "warning"),
    )
    with started(command, folder) as gateway:
        assert gateway.stdout is not None
        yield gateway.stdout.readline().split()[-1], key, gateway.pid


async def until_ready(through: Through) -> None:
    """Wait until the gateway has seen its worker."""
    while True:
        try:
            await through.tokens(2)
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    serve_worker()
