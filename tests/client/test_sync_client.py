"""The blocking client over a real socket, used from another thread than the gateway's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pytest

from tests.gateway.running import Running
from vase_sgl.client import (
    Cancelled,
    Chunk,
    Client,
    Completion,
    DeadlineExceeded,
    InvalidRequest,
    VaseError,
)

T = TypeVar("T")


async def with_client(running: Running, use: Callable[[Client], T]) -> T:
    """Run `use` in a thread: the gateway lives on this one's event loop."""

    def body() -> T:
        with Client(running.target, running.key) as client:
            return use(client)

    return await asyncio.to_thread(body)


async def test_stream_result_and_replay(running: Running) -> None:
    def use(client: Client) -> tuple[list[Chunk], str]:
        with client.generate("tell me", max_new_tokens=60, budget=32, window=8) as stream:
            request_id = stream.request_id
            with pytest.raises(VaseError, match="read the stream to its end first"):
                _ = stream.result
            chunks = list(stream)
        assert stream.result.usage.completion_tokens == 60
        assert stream.result.cache == chunks[-1].cache
        assert stream.request_id == request_id
        replay = client.replay(request_id)
        assert [step.tokens_compared for step in replay][-1] > 0
        assert replay.verdict.outcome == "MATCH"
        return chunks, request_id

    chunks, request_id = await with_client(running, use)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 60
    assert (await running.client.get_record(request_id)).status == "completed"


async def test_the_request_id_comes_with_the_stream_too(running: Running) -> None:
    def use(client: Client) -> str:
        stream = client.generate("tell me", max_new_tokens=2)
        list(stream)
        return stream.request_id

    assert len(await with_client(running, use)) == 32


async def test_cancel_raises_cancelled_and_reaches_the_worker(running: Running) -> None:
    running.worker.token_seconds = 0.02

    def use(client: Client) -> str:
        stream = client.generate("tell me", max_new_tokens=4000)
        next(stream)
        stream.cancel()
        with pytest.raises(Cancelled):
            list(stream)
        return stream.request_id

    assert await with_client(running, use) == await running.worker.wait_for_abort()


async def test_leaving_the_block_reaches_the_worker(running: Running) -> None:
    running.worker.token_seconds = 0.02

    def use(client: Client) -> None:
        with client.generate("tell me", max_new_tokens=4000) as stream:
            next(stream)

    await with_client(running, use)
    await running.worker.wait_for_abort()


async def test_leaving_a_replay_reaches_the_worker(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=500)
    running.worker.token_seconds = 0.02

    def use(client: Client) -> None:
        with client.replay(answer.request_id) as replay:
            next(replay)
        with pytest.raises(Cancelled):
            _ = replay.verdict

    await with_client(running, use)
    await running.worker.wait_for_abort()


async def test_a_timeout_is_a_deadline(running: Running) -> None:
    running.worker.token_seconds = 0.02

    def use(client: Client) -> None:
        with pytest.raises(DeadlineExceeded):
            list(client.generate("tell me", max_new_tokens=4000, timeout=0.3))

    await with_client(running, use)
    await running.worker.wait_for_abort()


async def test_records_and_capacity(running: Running) -> None:
    def use(client: Client) -> list[Completion]:
        answers = [client.generate_once("tell me", max_new_tokens=n) for n in (2, 3, 4)]
        listed = list(client.list_records(page_size=2))
        assert [r.record_id for r in listed] == [a.request_id for a in reversed(answers)]
        assert [r.usage.completion_tokens for r in listed] == [4, 3, 2]
        assert client.get_record(listed[0].record_id).text == answers[-1].text
        assert client.capacity(budget=100, window=10).slots_per_request == 110
        return answers

    await with_client(running, use)


async def test_errors_are_raised_by_every_call(running: Running) -> None:
    def use(client: Client) -> None:
        with pytest.raises(InvalidRequest, match="max_new_tokens: must be at least 1") as error:
            list(client.generate("tell me", max_new_tokens=0))
        assert error.value.code == "INVALID_ARGUMENT"
        with pytest.raises(InvalidRequest):
            client.generate("tell me", max_new_tokens=0).request_id  # noqa: B018
        with pytest.raises(VaseError):
            client.get_record("none")
        with pytest.raises(VaseError):
            list(client.list_records(page_size=5000))
        with pytest.raises(VaseError):
            client.replay("none").verdict  # noqa: B018

    await with_client(running, use)
