"""What clients are told of answers that the end of a gateway cuts off."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.gateway.running import Running, run_gateway, until, until_ready
from tests.gateway.test_openai import client
from vase_sgl.client import AsyncClient, Client, Unavailable
from vase_sgl.gateway.audit import AuditStore, Record
from vase_sgl.gateway.config import load_config
from vase_sgl.gateway.errors import GatewayStopped
from vase_sgl.gateway.server import Gateway
from vase_sgl.gateway.shutdown import Shutdown

STOPPED = "this gateway stopped before the end of the answer"


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[Running]:
    """A gateway with both doors and little patience, whose worker takes its time."""
    async with run_gateway(tmp_path, http={"port": 0}, drain_seconds=0.3) as running:
        running.worker.token_seconds = 0.03
        yield running


async def begun(running: Running, count: int) -> None:
    """Wait until output of so many generations has come."""
    await until(lambda: len(running.worker.answered) == count)
    await asyncio.sleep(0.1)


async def stored(running: Running, request_id: str | None) -> Record:
    """The record in the store of a gateway that is gone."""
    assert request_id is not None
    store = await AuditStore.open(running.audit_url)
    found = await store.get("alice", request_id)
    await store.close()
    assert found is not None
    return found.record


async def assert_cut_off(running: Running, error: Unavailable) -> None:
    """It is the gateway's own error of a generation with output, which is recorded."""
    assert str(error).startswith(STOPPED) and error.final
    record = await stored(running, error.request_id)
    assert (record.status, record.failure) == ("aborted", "")
    assert record.output_token_ids and record.record_id in running.worker.aborted


async def end(running: Running, hurried: bool) -> None:
    """Stop the gateway: by the end of its drain, or by a second signal."""
    if hurried:
        running.gateway._config = running.gateway._config.model_copy(update={"drain_seconds": 60})
    stopping = asyncio.create_task(running.gateway.stop())
    if hurried:
        await asyncio.sleep(0.2)
        await running.gateway.hurry()
    await asyncio.wait_for(stopping, 5)


@pytest.mark.parametrize("hurried", [False, True])
async def test_clients_over_grpc_are_told(slow: Running, hurried: bool) -> None:
    def blocking() -> None:
        with Client(slow.target, slow.key) as sdk:
            list(sdk.generate("tell me", max_new_tokens=4000))

    async def streamed() -> None:
        async for _ in slow.client.generate("tell me", max_new_tokens=4000):
            pass

    tasks = [
        asyncio.create_task(streamed()),
        asyncio.create_task(slow.client.generate_once("tell me", max_new_tokens=4000)),
        asyncio.create_task(asyncio.to_thread(blocking)),
    ]
    await begun(slow, 3)
    await end(slow, hurried)
    errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    for error in errors:
        assert isinstance(error, Unavailable), error
        await assert_cut_off(slow, error)
    assert len(slow.worker.bodies) == 3  # the SDK tried none of them again


@pytest.mark.parametrize("hurried", [False, True])
async def test_clients_over_http_are_told(slow: Running, hurried: bool) -> None:
    """In a stream by an event; else by a status that OpenAI's clients do not try again."""
    body: dict[str, Any] = {"model": "scripted", "prompt": "a", "max_tokens": 4000}

    async def streamed() -> tuple[str, list[str]]:
        async with (
            aiohttp.ClientSession() as http,
            http.post(
                f"{slow.http_url}/v1/completions",
                headers={"Authorization": f"Bearer {slow.key}"},
                json={**body, "stream": True, "n": 2},
            ) as answer,
        ):
            return answer.headers["x-request-id"], (await answer.text()).strip().split("\n\n")

    async def whole() -> None:
        async with client(slow) as api:
            await api.with_options(max_retries=2).completions.create(**body)

    tasks = asyncio.create_task(streamed()), asyncio.create_task(whole())
    await begun(slow, 3)
    await end(slow, hurried)
    request_id, events = await asyncio.wait_for(tasks[0], 5)
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["message"].startswith(STOPPED) and error["code"] == "unavailable"
    assert len(events) > 3 and (await stored(slow, request_id)).status == "aborted"
    with pytest.raises(openai.InternalServerError, match=STOPPED) as refused:
        await asyncio.wait_for(tasks[1], 5)
    assert refused.value.status_code == 503 and refused.value.request_id is not None
    assert (await stored(slow, refused.value.request_id)).status == "aborted"
    assert len(slow.worker.bodies) == 3


@asynccontextmanager
async def second_gateway(running: Running) -> AsyncIterator[AsyncClient]:
    """Another gateway before the same worker; a client that goes there when the first one ends."""
    overrides = {
        "listen": {"port": 0},
        "worker": {"urls": [running.worker.url], "health_interval_seconds": 0.1},
        "audit": {"url": running.audit_url},
        "tenants_file": running.tenants_file,
        "drain_seconds": 0.1,
    }
    gateway = await Gateway.start(load_config(overrides=overrides), lambda seconds: None)
    targets = f"ipv4:{running.target},127.0.0.1:{gateway.port}"
    try:
        async with AsyncClient(f"127.0.0.1:{gateway.port}", running.key) as direct:
            await until_ready(direct)
        async with AsyncClient(targets, running.key) as sdk:
            yield sdk
    finally:
        await gateway.stop()


async def test_no_answer_is_generated_twice(slow: Running) -> None:
    """Though another gateway would take it."""
    async with second_gateway(slow) as sdk:
        await sdk.capacity()  # connects to the first
        task = asyncio.create_task(sdk.generate_once("tell me", max_new_tokens=60))
        await begun(slow, 1)
        await slow.gateway.stop()
        with pytest.raises(Unavailable) as error:
            await asyncio.wait_for(task, 10)
        await assert_cut_off(slow, error.value)
        assert len(slow.worker.bodies) == 1


async def test_what_had_no_output_goes_to_another_gateway(slow: Running) -> None:
    slow.worker.max_running_requests = 1
    await until(lambda: slow.gateway._router.ready()[0][1].max_running_requests == 1)
    async with second_gateway(slow) as sdk:
        await sdk.capacity()
        first = slow.client.generate("tell me", max_new_tokens=4000)
        await first.started()
        waiting = asyncio.create_task(sdk.generate_once("and me", max_new_tokens=3))
        await until(lambda: slow.gateway._queue.waiting)
        await slow.gateway.stop()
        assert len((await asyncio.wait_for(waiting, 10)).token_ids) == 3


async def test_replays_are_told(slow: Running) -> None:
    slow.worker.token_seconds = 0.0
    answer = await slow.client.generate_once("tell me", max_new_tokens=200)
    slow.worker.token_seconds = 0.03
    replay = slow.client.replay(answer.request_id)
    await anext(aiter(replay))
    await slow.gateway.stop()
    with pytest.raises(Unavailable, match="stopped before the end of the replay") as error:
        await replay.verdict()
    assert not error.value.final


async def test_an_answer_that_is_whole_is_given_out(
    slow: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its record is durable only after the end of the drain."""
    append = slow.gateway._store.append

    async def late(record: Any) -> Any:
        await asyncio.sleep(0.8)
        return await append(record)

    monkeypatch.setattr(slow.gateway._store, "append", late)
    slow.worker.token_seconds = 0.0
    task = asyncio.create_task(slow.client.generate_once("tell me", max_new_tokens=5))
    await until(lambda: slow.worker.bodies and not slow.worker.running)
    await slow.gateway.stop()
    answer = await asyncio.wait_for(task, 5)
    assert len(answer.token_ids) == 5
    assert (await stored(slow, answer.request_id)).status == "completed"


@pytest.mark.usefixtures("long_tokens")
async def test_a_client_that_does_not_read_holds_up_no_end(slow: Running) -> None:
    slow.worker.token_seconds, slow.worker.padding = 0.0, 30_000
    stream = slow.client.generate("tell me", max_new_tokens=2000)
    request_id = await stream.started()
    await asyncio.sleep(0.5)
    start = time.monotonic()
    await slow.gateway.stop()
    assert time.monotonic() - start < 5
    assert (await stored(slow, request_id)).status == "aborted"


async def test_a_shutdown_leaves_other_time_limits_alone() -> None:
    shutdown = Shutdown()
    with pytest.raises(TimeoutError):
        async with shutdown.ends("it"), asyncio.timeout(0):
            await asyncio.sleep(1)
    shutdown.now()
    shutdown.now()
    with pytest.raises(Exception, match="stopped before the end of it"):  # what comes later, too
        async with shutdown.ends("it"):
            await asyncio.sleep(1)


async def test_a_run_that_began_after_the_moment_is_ended_once() -> None:
    """Each further signal is one; what began late may be cleaning up by then."""
    shutdown, cleaning = Shutdown(), asyncio.Event()
    shutdown.now()

    async def run() -> None:
        async with shutdown.ends("it"):
            try:
                await asyncio.sleep(1)
            finally:
                cleaning.set()
                await asyncio.sleep(0.05)

    task = asyncio.create_task(run())
    await asyncio.wait_for(cleaning.wait(), 5)
    shutdown.now()
    with pytest.raises(GatewayStopped):
        await task
