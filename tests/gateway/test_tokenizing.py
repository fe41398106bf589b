"""Prompts on their way to a worker's tokenizer: none of a tenant's keep other tenants out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import NEVER, AsyncClient, InvalidRequest, RateLimited, Unavailable
from vase_sgl.short_prompt import SHORT_PROMPT

SHORT, LONG = "a" * SHORT_PROMPT, "a" * (SHORT_PROMPT + 1)
LONG_CHAT = [{"role": "user", "content": LONG}]


class Patient(ScriptedWorker):
    """A worker that tokenizes nothing before it may. It goes on for callers who left."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()
        self.received = 0

    async def _tokenize(self, request: web.Request) -> web.Response:
        await request.read()
        self.received += 1
        await self.may_end.wait()
        return await super()._tokenize(request)


@asynccontextmanager
async def patient(folder: Path, **config: Any) -> AsyncIterator[tuple[Patient, Running]]:
    async with (
        Patient() as worker,
        run_gateway(folder, worker={"urls": [worker.url]}, **config) as running,
    ):
        yield worker, running


@pytest.mark.parametrize(
    ("prompt", "at_once"), [(SHORT, 8), (LONG, 1), (LONG_CHAT, 1)], ids=["short", "long", "chat"]
)
async def test_few_prompts_of_a_tenant_are_tokenized_at_once(
    tmp_path: Path, prompt: Any, at_once: int
) -> None:
    async with patient(tmp_path) as (worker, running):
        tasks = [
            asyncio.create_task(running.client.generate_once(prompt, max_new_tokens=1))
            for _ in range(at_once + 2)
        ]
        await until(lambda: worker.received == at_once)
        await asyncio.sleep(0.2)
        assert worker.received == at_once
        async with AsyncClient(running.target, running.add_tenant("bob"), retry=NEVER) as client:
            bob = asyncio.create_task(client.generate_once(prompt, max_new_tokens=1))
            await until(lambda: worker.received == at_once + 1)
            worker.may_end.set()
            await asyncio.gather(bob, *tasks)


async def test_who_leaves_has_nothing_more_tokenized(tmp_path: Path) -> None:
    async with patient(tmp_path) as (worker, running):
        metrics = running.gateway._admissions._metrics
        for _ in range(5):
            request = asyncio.create_task(running.client.generate_once(LONG, max_new_tokens=1))
            await until(lambda: worker.received and metrics.open_requests == 1)
            await asyncio.sleep(0.05)
            request.cancel()
            await until(lambda: metrics.open_requests == 0)
        assert worker.received == 1
        worker.may_end.set()
        await running.client.generate_once(LONG, max_new_tokens=1)
        assert worker.received == 2


async def test_short_prompts_do_not_wait_for_long_ones(tmp_path: Path) -> None:
    async with patient(tmp_path) as (worker, running):
        long = asyncio.create_task(running.client.generate_once(LONG, max_new_tokens=1))
        await until(lambda: worker.received == 1)
        short = asyncio.create_task(running.client.generate_once(SHORT, max_new_tokens=1))
        await until(lambda: worker.received == 2)
        worker.may_end.set()
        await asyncio.gather(long, short)


async def test_the_wait_for_ones_own_prompts_is_bounded(tmp_path: Path) -> None:
    async with patient(tmp_path, queue={"max_wait_seconds": 0.3}) as (worker, running):
        first = asyncio.create_task(running.client.generate_once(LONG, max_new_tokens=1))
        await until(lambda: worker.received == 1)
        with pytest.raises(RateLimited, match=r"waited 0\.3 s for others of tenant alice to be to"):
            await running.client.generate_once(LONG, max_new_tokens=1)
        worker.may_end.set()
        await first


async def test_a_gateway_that_ends_waits_for_no_tokenizer(tmp_path: Path) -> None:
    async with asyncio.timeout(10), patient(tmp_path) as (worker, running):
        request = asyncio.create_task(running.client.generate_once(LONG, max_new_tokens=1))
        await until(lambda: worker.received == 1)
        request.cancel()


class Endless(ScriptedWorker):
    """A worker that finds token after token."""

    written = 0

    async def _tokenize(self, request: web.Request) -> Any:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"tokens": [1')
        try:
            while True:
                await response.write(b", 1" * 1000)
                self.written += 1000
                await asyncio.sleep(0)
        except ConnectionError:
            return response


class Letters(ScriptedWorker):
    """A worker whose tokens are none."""

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [1, "2"], "count": 2})


async def test_tokens_beyond_the_context_are_not_read(tmp_path: Path) -> None:
    """To parse them would hold up everybody's answers."""
    async with Endless() as worker, run_gateway(tmp_path, worker={"urls": [worker.url]}) as running:
        with pytest.raises(InvalidRequest, match=r"input: the prompt has more tokens than"):
            await running.client.generate_once("tell me", max_new_tokens=1)
        assert worker.written < 10**6


async def test_tokens_that_are_none_are_not_understood(tmp_path: Path) -> None:
    async with Letters() as worker, run_gateway(tmp_path, worker={"urls": [worker.url]}) as running:
        with pytest.raises(Unavailable, match="gave an answer that cannot be understood"):
            await running.client.generate_once("tell me", max_new_tokens=1)
