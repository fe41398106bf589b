"""A worker without a model: `/generate` streams at a set pace, `/metrics` as scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


class ScriptedWorker:
    """refuse: a status for every request. seconds: between two tokens."""

    def __init__(self, *, seconds: float = 0.0, refuse: int | None = None) -> None:
        self.url = ""
        self.aborts = 0
        self.running = 0
        self.peak = 0
        self.retracted = 0
        self.bodies: list[dict[str, object]] = []
        self._seconds = seconds
        self._refuse = refuse

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self._refuse:
            return web.Response(status=self._refuse, text="no room")
        response = web.StreamResponse()
        await response.prepare(request)
        self.running += 1
        self.peak = max(self.peak, self.running)
        count = body["sampling_params"]["max_new_tokens"]
        try:
            for number in range(1, count + 1):
                await asyncio.sleep(self._seconds)
                reason = {"type": "length"} if number == count else None
                event = {"output_ids": [number], "meta_info": {"finish_reason": reason}}
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.running -= 1
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        labels = '{model_name="m",dp_rank="0"}'
        return web.Response(
            text=f"# HELP sglang:num_running_reqs x\n"
            f"sglang:num_running_reqs{labels} {float(self.running)}\n"
            f"sglang:num_running_reqs_offline{labels} 99.0\n"
            f"sglang:num_retracted_requests_total{labels} {float(self.retracted)}\n"
            f"sglang:token_usage{labels} 0.5\n"
        )

    async def abort(self, request: web.Request) -> web.Response:
        self.aborts += 1
        return web.Response()

    async def flush(self, request: web.Request) -> web.Response:
        return web.Response(status=400 if self.running else 200)


@asynccontextmanager
async def scripted(worker: ScriptedWorker) -> AsyncIterator[ScriptedWorker]:
    app = web.Application()
    app.router.add_post("/generate", worker.generate)
    app.router.add_get("/metrics", worker.metrics)
    app.router.add_post("/abort_request", worker.abort)
    app.router.add_post("/flush_cache", worker.flush)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    worker.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield worker
    finally:
        await runner.cleanup()
