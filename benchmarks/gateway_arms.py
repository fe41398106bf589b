"""The two ways to a worker that `gateway.py` compares, and the processes behind them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web

from benchmarks import workers
from benchmarks.environment import ROOT
from vase_sgl.demo.gateway import GatewayProcess, add_tenant
from vase_sgl.gateway.worker_embedded import worker_command
from vase_sgl.parent_watch import end_with_parent
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


def serve_worker(port: int) -> None:
    """Run the worker until SIGTERM, or until the process that started it is gone."""
    end_with_parent()
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
        await web.TCPSite(runner, "127.0.0.1", port, backlog=2048).start()
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
def scripted_worker(folder: Path) -> Iterator[str]:
    """URL of the worker without a model."""
    command = (sys.executable, "-m", "benchmarks.gateway_arms")
    with workers.started(command, folder / "worker.log", folder=ROOT) as worker:
        worker.wait_until_healthy()
        yield worker.url


@contextlib.contextmanager
def real_worker(folder: Path, model: Path) -> Iterator[str]:
    """URL of a worker with a model, as the gateway starts its own. Raises `SystemExit`.

    Without the prefix cache: the two ways ask the very same, and neither finds the other's prefix.
    """
    command = worker_command(str(model), ("--disable-radix-cache",))
    with workers.started(command, folder / "worker.log") as worker:
        worker.wait_until_healthy()
        yield worker.url


@contextlib.contextmanager
def gateway_to(url: str, folder: Path) -> Iterator[tuple[str, str, int]]:
    """A gateway in front of the worker: target, API key, process id."""
    tenants, config = folder / "tenants.yaml", folder / "serve.yaml"
    key = add_tenant("bench", tenants)
    config.write_text("grpc: {max_concurrent_calls: 4096}\nqueue: {max_waiting_per_tenant: 1024}\n")
    arguments = (
        *("--config", str(config), "--tenants-file", str(tenants), "--worker-url", url),
        *("--audit-url", f"sqlite+aiosqlite:///{folder / 'audit.sqlite3'}"),
    )
    with GatewayProcess(arguments) as gateway:
        yield gateway.target, key, gateway.pid


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    serve_worker(parser.parse_args().port)
