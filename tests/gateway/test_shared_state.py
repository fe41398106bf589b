"""A worker's state is asked for once at a time, and told to all who asked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.gateway.running import run_gateway
from tests.gateway.test_overtaking import INFO, settle
from vase_sgl.gateway import shared_state
from vase_sgl.gateway.config import WorkerSection
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.fleet import Fleet
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.shared_state import SharedState
from vase_sgl.gateway.workers import Worker, WorkerInfo


class Asked:
    """A worker that answers when it is told to; answers are numbered by `rounds`."""

    name = "asked"

    def __init__(self) -> None:
        self.asked = 0
        self.answers: list[asyncio.Future[None]] = []

    async def info(self) -> WorkerInfo:
        self.asked += 1
        number = self.asked
        self.answers.append(asyncio.get_running_loop().create_future())
        await self.answers[-1]
        return dataclasses.replace(INFO, rounds=number)

    async def answer(self, error: Exception | None = None) -> None:
        """End the last question."""
        if error is None:
            self.answers[-1].set_result(None)
        else:
            self.answers[-1].set_exception(error)
        await settle()


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def state(asked: Asked) -> SharedState:
    return SharedState(cast(Worker, asked))


@contextlib.contextmanager
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    time = SimpleNamespace(now=0.0, monotonic=lambda: time.now)
    monkeypatch.setattr(shared_state, "time", time)
    yield time


async def test_those_who_ask_at_once_share_an_answer(asked: Asked, state: SharedState) -> None:
    calls = [asyncio.create_task(state.recent()) for _ in range(1000)]
    await settle()
    calls[0].cancel()  # who began it does not end it
    await settle()
    assert asked.asked == 1
    await asked.answer()
    assert {call.result().rounds for call in calls[1:]} == {1}


async def test_a_recent_answer_is_good_for_a_second(
    monkeypatch: pytest.MonkeyPatch, asked: Asked, state: SharedState
) -> None:
    with clock(monkeypatch) as time:
        first = asyncio.create_task(state.recent())
        await settle()
        await asked.answer()
        time.now = 0.9
        assert await state.recent() is first.result()
        time.now = 1.0
        second = asyncio.create_task(state.recent())
        await settle()
        await asked.answer()
        assert second.result().rounds == 2


async def test_the_state_now_is_asked_for_after_the_call(asked: Asked, state: SharedState) -> None:
    """A replay that was told of weights from before the call would judge by those."""
    first = asyncio.create_task(state.recent())
    await settle()
    later = [asyncio.create_task(state.now()) for _ in range(50)]
    await settle()
    assert asked.asked == 1
    await asked.answer()
    assert first.done() and asked.asked == 2
    latest = asyncio.create_task(state.now())
    await settle()
    await asked.answer()
    assert {call.result().rounds for call in later} == {2}
    await asked.answer()
    assert latest.result().rounds == 3 and asked.asked == 3


async def test_a_failure_is_told_to_all_and_not_kept(asked: Asked, state: SharedState) -> None:
    calls = [asyncio.create_task(state.recent()) for _ in range(3)]
    after = asyncio.create_task(state.now())
    await settle()
    await asked.answer(WorkerUnavailable("it is gone"))
    assert all(isinstance(call.exception(), WorkerUnavailable) for call in calls)
    await asked.answer()
    assert (await after).rounds == (await state.recent()).rounds == 2


async def test_a_question_nobody_waits_for_does_not_hold_up_the_end(asked: Asked) -> None:
    async def ignore(ready: bool) -> None:
        """Nobody asks."""

    closed: list[bool] = []

    async def close() -> None:
        await settle()
        closed.append(asked.answers[-1].cancelled())

    monitored = cast(Worker, asked)
    asked.close = close  # type: ignore[attr-defined]
    fleet = Fleet([monitored], WorkerSection(urls=("http://x:1",)), on_change=ignore)
    fleet.loads["asked"].found_ready(INFO)
    call = asyncio.create_task(WorkerRouter(fleet).recent())
    await settle()
    call.cancel()
    await settle()
    await fleet.close()
    assert closed == [True]


async def test_capacity_that_is_polled_asks_a_worker_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gateway(tmp_path, worker={"health_interval_seconds": 60}) as running:
        (load,) = running.gateway._fleet.loads.values()
        asked = 0
        real = load.worker.info

        async def info() -> WorkerInfo:
            nonlocal asked
            asked += 1
            return await real()

        monkeypatch.setattr(load.worker, "info", info)
        with clock(monkeypatch) as time:
            for second in range(1, 4):
                time.now = second * 1e9
                await asyncio.gather(*(running.client.capacity() for _ in range(20)))
                await running.client.capacity()
                assert asked == second
