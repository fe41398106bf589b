"""The first message does not hold up what follows it, and nothing overtakes it."""

from __future__ import annotations

import asyncio

import pytest

from vase_sgl.gateway.errors import ClientGone, WorkerUnavailable
from vase_sgl.gateway.outbox import Outbox
from vase_sgl.rpc.v1 import gateway_pb2 as pb

STARTED = pb.GenerateResponse(started=pb.GenerationStarted(request_id="1"))
CHUNK = pb.GenerateResponse(chunk=pb.GenerationChunk(text="a"))


class Client:
    """Takes messages while its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.taken: list[pb.GenerateResponse] = []
        self.failure: Exception | None = None

    async def send(self, message: pb.GenerateResponse) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.taken.append(message)


async def test_the_announcement_is_sent_meanwhile_and_first() -> None:
    client = Client()
    async with Outbox(client.send) as outbox:
        outbox.announce(STARTED)
        sending = asyncio.create_task(outbox.send(CHUNK))
        await asyncio.sleep(0.01)
        assert client.taken == [] and not sending.done()
        client.gate.set()
        await sending
    assert client.taken == [STARTED, CHUNK]


async def test_leaving_waits_for_the_announcement() -> None:
    client = Client()
    asyncio.get_running_loop().call_later(0.01, client.gate.set)
    async with Outbox(client.send) as outbox:
        outbox.announce(STARTED)
    assert client.taken == [STARTED]


@pytest.mark.parametrize("then_send", [True, False])
async def test_a_client_that_left_is_noticed(then_send: bool) -> None:
    client = Client()
    client.failure = ClientGone()
    client.gate.set()
    with pytest.raises(ClientGone):
        async with Outbox(client.send) as outbox:
            outbox.announce(STARTED)
            if then_send:
                await outbox.send(CHUNK)


async def test_the_block_s_own_failure_is_the_one_that_is_raised() -> None:
    client = Client()
    client.failure = ClientGone()
    client.gate.set()
    with pytest.raises(WorkerUnavailable):
        async with Outbox(client.send) as outbox:
            outbox.announce(STARTED)
            raise WorkerUnavailable("lost")


async def test_a_cancelled_caller_takes_the_announcement_back() -> None:
    client = Client()

    async def run() -> None:
        async with Outbox(client.send) as outbox:
            outbox.announce(STARTED)
            await asyncio.sleep(60)

    running = asyncio.create_task(run())
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 1)
    client.gate.set()
    await asyncio.sleep(0.01)
    assert client.taken == []


async def test_who_is_cancelled_while_it_leaves_takes_the_announcement_back() -> None:
    client = Client()

    async def run() -> None:
        async with Outbox(client.send) as outbox:
            outbox.announce(STARTED)

    leaving = asyncio.create_task(run())
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    client.gate.set()
    await asyncio.sleep(0.01)
    assert client.taken == []
