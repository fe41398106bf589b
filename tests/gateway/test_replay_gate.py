"""Replays make way: few at once, and only where a worker has slots to spare."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import NEVER, AsyncClient, NotFound, RateLimited, Unavailable
from vase_sgl.gateway import replay_gate
from vase_sgl.gateway.errors import LimitExceeded, WorkerUnavailable
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
        #: Whose replays ran, in that order.
        self.tenants: list[str] = []

    async def look(self) -> WorkerInfo:
        return self.info

    def take(self) -> Watch:
        self.running += 1
        self.most = max(self.most, self.running)
        return self

    def release(self) -> None:
        self.running -= 1

    async def replay(
        self,
        gate: ReplayGate[Watch],
        seconds: float = 0.02,
        tenant: str = "alice",
        need: Need = NEED,
    ) -> None:
        with gate.place(tenant) as waiting:
            async with gate.turn(waiting, need, self.look, self.take):
                self.tenants.append(tenant)
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


@pytest.mark.parametrize(
    ("state", "starts"),
    [
        ({"running_requests": 3, "max_running_requests": 3}, False),
        ({"running_requests": 3, "max_running_requests": 4}, True),
        ({"running_requests": 3, "max_query_requests": 3}, False),
        ({"running_requests": 0, "max_query_requests": 3}, True),
        ({"running_requests": 3, "max_query_requests": 3, "query_requests": 0}, True),
        ({"running_requests": 5, "max_query_requests": 3, "query_requests": 3}, False),
        ({"running_requests": 0, "waiting_requests": 1}, False),
    ],
)
async def test_a_replay_that_would_wait_in_the_worker_waits_here(
    state: dict[str, int], starts: bool
) -> None:
    """The requests there may be another gateway's, and all slots be free."""
    need = dataclasses.replace(NEED, reads_queries=True)
    watch = Watch(dataclasses.replace(IDLE, **state))
    if starts:
        await watch.replay(gate(), need=need)
    else:
        with pytest.raises(WorkerUnavailable, match="busy with generations"):
            await watch.replay(gate(wait=0), need=need)


async def test_the_rings_of_others_hold_up_no_replay_that_needs_none() -> None:
    watch = Watch(dataclasses.replace(IDLE, running_requests=3, max_query_requests=3))
    await watch.replay(gate())


async def test_tenants_take_turns() -> None:
    watch, one = Watch(IDLE), gate(1)
    replays = [watch.replay(one, tenant="bob") for _ in range(5)]
    await asyncio.gather(*replays, watch.replay(one), watch.replay(one))
    assert watch.tenants == ["bob", "bob", "alice", "bob", "alice", "bob", "bob"]


async def test_so_many_wait_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one tenant and in all; those that run are not counted."""
    monkeypatch.setattr(replay_gate, "MAX_WAITING", 5)
    monkeypatch.setattr(replay_gate, "MAX_WAITING_PER_TENANT", 3)
    watch, one = Watch(IDLE), gate(2)
    running = [asyncio.create_task(watch.replay(one, 60, "bob")) for _ in range(2)]
    await until(lambda: watch.running == 2)
    waiting = [asyncio.create_task(watch.replay(one, 60, "bob")) for _ in range(3)]
    waiting += [asyncio.create_task(watch.replay(one, 60, "carol")) for _ in range(2)]
    await asyncio.sleep(0)
    for tenant, text, reason in (
        ("bob", "replays: tenant bob has 3 requests waiting", "queue_tenant"),
        ("carol", "replays: 5 requests are waiting", "queue_total"),
    ):
        with pytest.raises(LimitExceeded, match=text) as error:
            await watch.replay(one, tenant=tenant)
        assert error.value.reason == reason and error.value.retry_seconds
    assert not any(task.done() for task in (*waiting, *running))
    waiting.append(asyncio.create_task(watch.replay(one, 60, "alice")))
    with pytest.raises(LimitExceeded, match="replays: 5 requests are waiting"):
        await waiting[2]  # the last in the longest line
    assert not any(task.done() for task in (*waiting[:2], *waiting[3:], *running))
    for task in (*waiting, *running):
        task.cancel()
    await asyncio.gather(*waiting, *running, return_exceptions=True)
    await watch.replay(one)


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


async def test_the_longest_wait_is_for_a_turn_and_a_worker_together() -> None:
    watch, one = Watch(IDLE), gate(1, wait=2.0)
    holding = asyncio.create_task(watch.replay(one, 1.0))
    await asyncio.sleep(0.01)
    watch.info = busy(0)
    begun = time.monotonic()
    with pytest.raises(WorkerUnavailable, match="busy with generations"):
        await watch.replay(one)
    assert time.monotonic() - begun < 2.7
    await holding


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
    async with run_gateway(tmp_path, replay={"spare_share": 0.1}) as running:
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


class Unaware(ScriptedWorker):
    """A worker that counts nothing of what it was sent: it has not come to it yet."""

    async def _server_info(self, request: web.Request) -> web.Response:
        running, self.running = self.running, set()
        try:
            return await super()._server_info(request)
        finally:
            self.running = running


async def test_what_this_gateway_has_sent_counts_before_the_worker_does(tmp_path: Path) -> None:
    async with Unaware() as worker, run_gateway(tmp_path, worker={"urls": [worker.url]}) as running:
        worker.reserved_slots, worker.available_slots = 0, worker.total_slots
        answer = await running.client.generate_once("tell me", max_new_tokens=4)
        worker.token_seconds = 0.01
        options: dict[str, Any] = {"budget": 3936, "window": 64}
        streams = [
            running.client.generate("tell me", max_new_tokens=5000, **options) for _ in range(2)
        ]
        for stream in streams:
            await stream.started()  # 8004 slots: a replay of 6 leaves less than a quarter
        replay = asyncio.create_task(running.client.replay(answer.request_id).verdict())
        await asyncio.sleep(0.6)
        assert len(worker.bodies) == 3
        streams[0].cancel()
        assert (await asyncio.wait_for(replay, 5)).outcome == "MATCH"
        streams[1].cancel()


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


async def test_a_flood_of_replays_is_refused_before_their_records_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So others find calls that are free, and their replays have their turn."""
    monkeypatch.setattr(replay_gate, "MAX_WAITING_PER_TENANT", 3)
    sections: dict[str, Any] = {
        "replay": {"max_concurrent": 1},
        "grpc": {"max_concurrent_calls": 30},
    }
    async with run_gateway(tmp_path, **sections) as running:
        mine = await running.client.generate_once("tell me", max_new_tokens=4)
        bob = AsyncClient(running.target, running.add_tenant("bob"), retry=NEVER)
        async with bob:
            answer = await bob.generate_once("tell me", max_new_tokens=30)
            running.worker.token_seconds = 0.05
            read: list[str] = []
            real = running.gateway._store.get

            async def get(tenant: str, record_id: str) -> Any:
                read.append(tenant)
                return await real(tenant, record_id)

            monkeypatch.setattr(running.gateway._store, "get", get)
            flood = [
                asyncio.create_task(bob.replay(answer.request_id).verdict()) for _ in range(20)
            ]
            # One runs and three wait, or four wait and the first of them is about to run.
            await until(lambda: sum(task.done() for task in flood) >= 16)
            refused = [task for task in flood if task.done()]
            assert len(read) == 20 - len(refused)
            for task in refused:
                with pytest.raises(RateLimited, match="replays: tenant bob has 3") as error:
                    task.result()
                assert error.value.retry_seconds
            running.worker.token_seconds = 0
            verdict = await running.client.replay(mine.request_id).verdict()
            assert verdict.outcome == "MATCH"
            await asyncio.gather(*flood, return_exceptions=True)


@dataclasses.dataclass
class Turns:
    """How many replays have asked for a turn."""

    asked: int = 0


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    turns, real = Turns(), ReplayGate.turn

    def turn(*args: Any, **options: Any) -> Any:
        turns.asked += 1
        return real(*args, **options)

    monkeypatch.setattr(ReplayGate, "turn", turn)
    return turns


async def test_a_replay_that_cannot_be_makes_nobody_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: Turns
) -> None:
    monkeypatch.setattr(replay_gate, "MAX_WAITING", 2)
    async with run_gateway(tmp_path, replay={"max_concurrent": 1}) as running:
        mine = await running.client.generate_once("tell me", max_new_tokens=200)
        running.worker.token_seconds = 0.05
        replays = [asyncio.create_task(running.client.replay(mine.request_id).verdict())]
        await until(lambda: running.worker.running)
        replays += [
            asyncio.create_task(running.client.replay(mine.request_id).verdict()) for _ in range(2)
        ]
        await until(lambda: turns.asked == 3)
        key = running.add_tenant("bob", roles=["replay"])
        async with AsyncClient(running.target, key, retry=NEVER) as bob:
            with pytest.raises(NotFound, match="there is no record"):
                await bob.replay(mine.request_id).verdict()
        running.worker.token_seconds = 0
        verdicts = await asyncio.gather(*replays)
        assert [verdict.outcome for verdict in verdicts] == ["MATCH"] * 3


async def test_a_worker_that_changed_while_a_replay_waited_is_incomparable(
    tmp_path: Path, turns: Turns
) -> None:
    async with run_gateway(tmp_path) as running:
        answer = await running.client.generate_once("tell me", max_new_tokens=4)
        running.worker.available_slots = 2_000
        running.worker.token_seconds = 0.01
        background = running.client.generate("something long", max_new_tokens=4000)
        await background.started()
        replay = asyncio.create_task(running.client.replay(answer.request_id).verdict())
        await until(lambda: turns.asked == 1)
        running.worker.fingerprint["sglang"] = "1"
        running.worker.faults.other_token_at = 2
        running.worker.available_slots = 9_000
        verdict = await asyncio.wait_for(replay, 10)
        assert verdict.outcome == "INCOMPARABLE"
        assert [d.key for d in verdict.differences] == ["sglang"]
        assert len(running.worker.bodies) == 2
        background.cancel()


async def test_a_replay_goes_to_the_worker_that_is_still_as_recorded(
    tmp_path: Path, turns: Turns
) -> None:
    """Three wait for one turn, for one worker or the other; one of the two is replaced."""
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        urls = {"urls": [one.url, two.url]}
        async with run_gateway(tmp_path, worker=urls, replay={"max_concurrent": 1}) as running:
            await until(lambda: len(running.gateway._router.ready()) == 2)
            answer = await running.client.generate_once("tell me", max_new_tokens=40)
            one.token_seconds = two.token_seconds = 0.05
            replays = [asyncio.create_task(running.client.replay(answer.request_id).verdict())]
            await until(lambda: one.running or two.running)
            busy, idle = (one, two) if one.running else (two, one)
            count = len(idle.bodies)
            replays += [
                asyncio.create_task(running.client.replay(answer.request_id).verdict())
                for _ in range(2)
            ]
            await until(lambda: turns.asked == 3)
            idle.fingerprint = {**idle.fingerprint, "sglang": "1"}
            idle.faults.other_token_at = 3
            busy.token_seconds = 0
            outcomes = [verdict.outcome for verdict in await asyncio.gather(*replays)]
            assert outcomes == ["MATCH"] * 3
            assert len(idle.bodies) == count
