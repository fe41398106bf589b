"""Replays make way: few at once, and only where a worker has slots to spare."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import Running, run_gateway
from vase_sgl.client import Unavailable
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.replay_gate import ReplayGate
from vase_sgl.gateway.workers import WorkerInfo, WorkerRequest

IDLE = WorkerInfo({}, None, 4096, 64, 8192, 1000, 1000, 1000, 0, 0, 0, 0)
NEED = Need(tuple(range(10)), max_new_tokens=90, eviction=None, reads_queries=False)  # 100 slots


def busy(available: int) -> WorkerInfo:
    return dataclasses.replace(IDLE, running_requests=3, available_slots=available)


class Watch:
    """A worker whose state is looked at, and how many replays hold a turn."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.running = 0
        self.most = 0

    async def look(self) -> WorkerInfo:
        return self.info

    def take(self) -> Watch:
        self.running += 1
        self.most = max(self.most, self.running)
        return self

    def release(self) -> None:
        self.running -= 1

    async def replay(self, gate: ReplayGate[Watch], seconds: float = 0.02) -> None:
        async with gate.turn(NEED, self.look, self.take):
            await asyncio.sleep(seconds)


def gate(max_concurrent: int = 2, wait: float = 5.0) -> ReplayGate[Watch]:
    return ReplayGate(max_concurrent=max_concurrent, spare_share=0.25, max_wait_seconds=wait)


async def test_so_many_run_at_once_and_no_more() -> None:
    watch, one = Watch(IDLE), gate(3)
    await asyncio.gather(*(watch.replay(one) for _ in range(12)))
    assert watch.most == 3


async def test_a_busy_worker_is_waited_for() -> None:
    watch, one = Watch(busy(349)), gate()
    waiting = asyncio.create_task(watch.replay(one))
    await asyncio.sleep(0.5)
    assert not waiting.done() and watch.most == 0
    watch.info = busy(350)  # 100 for the replay leave a quarter of 1000
    await asyncio.wait_for(waiting, 2)


async def test_an_idle_worker_takes_any_replay() -> None:
    watch = Watch(dataclasses.replace(IDLE, available_slots=10))
    await asyncio.wait_for(watch.replay(gate()), 1)


async def test_a_wait_ends_with_a_reason_and_frees_the_turn() -> None:
    watch, one = Watch(busy(0)), gate(1, wait=0.3)
    begun = time.monotonic()
    with pytest.raises(WorkerUnavailable, match="busy with generations"):
        await watch.replay(one)
    assert time.monotonic() - begun < 2
    watch.info = IDLE
    holding = asyncio.create_task(watch.replay(one, 1.0))
    await asyncio.sleep(0.05)
    with pytest.raises(WorkerUnavailable, match="1 replays are running and others wait"):
        await watch.replay(one)
    await holding
    await watch.replay(one)


@pytest.mark.parametrize(
    ("eviction", "slots"),
    [
        (None, 100),
        ({"policy": "full", "budget": 8, "window": 4, "prompt": "evict"}, 100),
        ({"policy": "random", "budget": 32, "window": 8, "prompt": "evict"}, 40 + 10),
        ({"policy": "random", "budget": 8, "window": 4, "prompt": "evict"}, 14 + 10),
        ({"policy": "random", "budget": 8, "window": 4, "prompt": "keep"}, 22),
        ({"policy": "random", "budget": 512, "window": 64, "prompt": "evict"}, 100),
    ],
)
def test_slots_of_a_replay(eviction: dict[str, object] | None, slots: int) -> None:
    request = WorkerRequest("a" * 32, tuple(range(10)), {"max_new_tokens": 90}, eviction)
    assert Need.of(request).slots_at_most(IDLE) == slots


async def test_a_replay_starts_when_no_generation_waits(tmp_path: Path) -> None:
    """Two generations of 4002 slots run and a third waits for 10000; a replay of 6 would fit."""
    async with run_gateway(tmp_path) as running:
        answer = await running.client.generate_once("tell me", max_new_tokens=4)
        running.worker.token_seconds = 0.01
        options: dict[str, Any] = {"max_new_tokens": 5000, "budget": 3936, "window": 64}
        streams = [running.client.generate("tell me", **options) for _ in range(2)]
        for stream in streams:
            await stream.started()
        last = running.client.generate("wait for it", **options)
        waiting = asyncio.create_task(last.started())
        async with asyncio.timeout(5):
            while running.gateway._queue.waiting != 1:
                await asyncio.sleep(0.01)
        replay = asyncio.create_task(running.client.replay(answer.request_id).verdict())
        await asyncio.sleep(0.6)
        assert len(running.worker.bodies) == 3 and not waiting.done() and not replay.done()
        streams[0].cancel()
        await waiting
        assert (await replay).outcome == "MATCH"
        assert [len(body["input_ids"]) for body in running.worker.bodies[3:]] == [3, 2]
        for stream in (streams[1], last):
            stream.cancel()


async def test_generations_go_on_while_replays_wait(tmp_path: Path) -> None:
    """Over real sockets: while its worker is busy and full a replay waits, a generation runs."""
    section = {"max_concurrent": 1, "max_wait_seconds": 1.0}
    async with run_gateway(tmp_path, replay=section) as running:
        answer = await running.client.generate_once("tell me", max_new_tokens=4)
        running.worker.available_slots = 2_000
        running.worker.token_seconds = 0.05
        background = running.client.generate("something long", max_new_tokens=100)
        await background.started()
        replay = running.client.replay(answer.request_id)
        with pytest.raises(Unavailable, match="busy with generations"):
            await replay.verdict()
        await running.client.generate_once("tell me", max_new_tokens=2)
        running.worker.available_slots = 9_000
        assert (await running.client.replay(answer.request_id).verdict()).outcome == "MATCH"
        background.cancel()


async def test_a_cancelled_replay_gives_its_turn_back(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, replay={"max_concurrent": 1}) as running:
        answer = await running.client.generate_once("tell me", max_new_tokens=40)
        running.worker.token_seconds = 0.05
        await _cancelled_replay(running, answer.request_id)
        running.worker.token_seconds = 0.0
        assert (await running.client.replay(answer.request_id).verdict()).outcome == "MATCH"


async def _cancelled_replay(running: Running, record_id: str) -> None:
    replay = running.client.replay(record_id)
    async for _ in replay:
        break
    replay.cancel()
    await running.worker.wait_for_abort()
