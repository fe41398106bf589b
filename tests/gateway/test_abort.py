"""Clients that leave: the worker is told at once, the record says so; slow ones slow the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.gateway.running import Running, until
from vase_sgl.client import NEVER, AsyncClient, Cancelled, DeadlineExceeded, Record


async def record_of(running: Running, request_id: str) -> Record:
    """The record, which is written after the client has gone."""
    from vase_sgl.client import NotFound

    async with asyncio.timeout(5):
        while True:
            try:
                return await running.client.get_record(request_id)
            except NotFound:
                await asyncio.sleep(0.02)


async def test_cancelling_aborts_in_the_worker_and_is_recorded(running: Running) -> None:
    running.worker.token_seconds = 0.02
    stream = running.client.generate("tell me", max_new_tokens=4000, budget=32, window=8)
    seen: list[int] = []
    with pytest.raises(Cancelled):
        async for chunk in stream:
            seen.extend(chunk.token_ids)
            if len(seen) >= 5:
                stream.cancel()
    assert await running.worker.wait_for_abort() == stream.request_id
    record = await record_of(running, stream.request_id)
    assert record.status == "aborted" and record.finish_reason == "unknown"
    assert list(record.output_token_ids[: len(seen)]) == seen
    assert len(record.output_token_ids) < 50


async def test_a_step_that_times_out_aborts_and_the_answer_does_not_end_as_if_whole(
    running: Running,
) -> None:
    running.worker.token_seconds = 0.2
    stream = running.client.generate("tell me", max_new_tokens=4000)
    await stream.started()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.05)
    for _ in range(2):
        with pytest.raises(Cancelled):
            await anext(stream)
    assert await running.worker.wait_for_abort() == stream.request_id


async def test_cancelling_after_the_end_does_nothing(running: Running) -> None:
    stream = running.client.generate("tell me", max_new_tokens=2)
    assert [chunk async for chunk in stream]
    stream.cancel()
    assert [chunk async for chunk in stream] == [] and stream.result.usage.completion_tokens == 2


async def test_a_deadline_aborts_in_the_worker(running: Running) -> None:
    running.worker.token_seconds = 0.02
    stream = running.client.generate("tell me", max_new_tokens=4000, timeout=0.5)
    with pytest.raises(DeadlineExceeded) as error:
        _ = [chunk async for chunk in stream]
    assert await running.worker.wait_for_abort() == stream.request_id == error.value.request_id
    assert (await record_of(running, stream.request_id)).status == "aborted"


async def test_a_deadline_of_a_unary_call_aborts_too(running: Running) -> None:
    running.worker.token_seconds = 0.02
    with pytest.raises(DeadlineExceeded):
        await running.client.generate_once("tell me", max_new_tokens=4000, timeout=0.5)
    await running.worker.wait_for_abort()


async def test_a_lost_connection_aborts_in_the_worker(running: Running) -> None:
    running.worker.token_seconds = 0.02
    client = AsyncClient(running.target, running.key, retry=NEVER)
    stream = client.generate("tell me", max_new_tokens=4000)
    request_id = await stream.started()
    await client.close()
    assert await running.worker.wait_for_abort() == request_id
    assert (await record_of(running, request_id)).status == "aborted"


async def test_leaving_the_block_aborts(running: Running) -> None:
    running.worker.token_seconds = 0.02
    async with running.client.generate("tell me", max_new_tokens=4000) as stream:
        async for _ in stream:
            break
    assert await running.worker.wait_for_abort() == stream.request_id


class Left(Exception):
    pass


async def first_of(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        raise Left


async def test_leaving_the_loop_aborts(running: Running) -> None:
    running.worker.token_seconds = 0.02
    async for _ in running.client.generate("tell me", max_new_tokens=4000):
        break
    await running.worker.wait_for_abort_of(1)
    with pytest.raises(Left):
        await first_of(running.client.generate("tell me", max_new_tokens=4000))
    await running.worker.wait_for_abort_of(2)


async def test_leaving_a_replay_aborts_it(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=500)
    running.worker.token_seconds = 0.02
    async with running.client.replay(answer.request_id) as replay:
        async for _ in replay:
            break
    await running.worker.wait_for_abort_of(1)
    async for _ in running.client.replay(answer.request_id):
        break
    await running.worker.wait_for_abort_of(2)


async def test_letting_go_in_another_thread_aborts(running: Running) -> None:
    """As a garbage collector that happens to run there does."""
    running.worker.token_seconds = 0.02
    held = [running.client.generate("tell me", max_new_tokens=4000)]
    request_id = await held[0].started()
    await asyncio.to_thread(held.clear)
    assert await running.worker.wait_for_abort() == request_id


async def test_leaving_while_the_record_is_written_does_not_undo_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = running.gateway._store
    append, writing, go_on = store.append, asyncio.Event(), asyncio.Event()

    async def slow(record: Any) -> Any:
        writing.set()
        await go_on.wait()
        return await append(record)

    monkeypatch.setattr(store, "append", slow)
    stream = running.client.generate("tell me", max_new_tokens=2)
    request_id = await stream.started()
    await writing.wait()
    stream.cancel()
    await until(lambda: running.gateway._admissions._metrics.open_requests == 0)
    go_on.set()
    assert (await record_of(running, request_id)).status == "completed"


async def test_a_finished_generation_is_not_aborted(running: Running) -> None:
    async with running.client.generate("tell me", max_new_tokens=5) as stream:
        _ = [chunk async for chunk in stream]
    await asyncio.sleep(0.1)
    assert running.worker.aborted == []


async def test_cancelling_a_replay_aborts_it(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=500)
    running.worker.token_seconds = 0.02
    replay = running.client.replay(answer.request_id)
    async for _ in replay:
        break
    replay.cancel()
    assert await running.worker.wait_for_abort() == running.worker.bodies[-1]["rid"]


@pytest.mark.usefixtures("long_tokens")
async def test_a_slow_client_slows_the_worker(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """30 kB a token, 60 MB in all: gRPC's flow control lets some 5 MB through unread."""
    running.worker.padding = 30_000
    stream = running.client.generate("tell me", max_new_tokens=2000)
    async for _ in stream:
        break
    stalled = -1
    async with asyncio.timeout(20):
        while running.worker.tokens_written != stalled:
            stalled = running.worker.tokens_written
            await asyncio.sleep(1.0)
    assert 0 < stalled < 500
    assert await running.client.capacity()  # others are served meanwhile
    stream.cancel()
    await running.worker.wait_for_abort()
    assert (await record_of(running, stream.request_id)).status == "aborted"
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []
