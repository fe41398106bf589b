"""A large request is overtaken by small ones of other tenants, but not for ever."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.gateway.running import run_gateway, until
from vase_sgl.client import NEVER, AsyncClient
from vase_sgl.gateway import fair_queue
from vase_sgl.gateway.breaker import Trial
from vase_sgl.gateway.config import WorkerSection
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.fair_queue import FairQueue
from vase_sgl.gateway.fleet import Fleet as Workers
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.workers import Worker, WorkerChunk, WorkerInfo

#: 1000 slots.
INFO = WorkerInfo({}, None, 4096, 64, 8192, 1000, 1000, 1000, 0, 0, 0, 0)


def need(slots: int) -> Need:
    return Need(tuple(range(slots)), max_new_tokens=10, eviction=None, reads_queries=False)


class Fleet:
    """Workers that exist as numbers only, with a queue in front of them and a clock.

    The longest wait is 40 s, so a head may keep a worker after 10.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
        self.now = 0.0
        monkeypatch.setattr(fair_queue, "time", SimpleNamespace(monotonic=lambda: self.now))

        async def tell(ready: bool) -> None:
            raise AssertionError("nothing is watched")

        self.workers = Workers(
            [cast(Worker, SimpleNamespace(name=name)) for name in names],
            WorkerSection(urls=("http://x:1",)),
            on_change=tell,
            on_room=lambda: self.queue.dispatch_soon(),
        )
        self.router = WorkerRouter(self.workers)
        self.queue: FairQueue[Lease] = FairQueue(
            max_waiting=100,
            max_waiting_per_tenant=100,
            max_wait_seconds=40,
            sweep=self.router.sweep,
        )
        for load in self.workers.loads.values():
            load.found_ready(INFO)
        self.tasks: list[asyncio.Task[Lease]] = []

    def kept(self) -> str:
        """Names of the workers that are kept for somebody."""
        loads = self.workers.loads.values()
        return "".join(load.worker.name for load in loads if load.kept_for is not None)

    async def ask(self, tenant: str, slots: int) -> asyncio.Task[Lease]:
        """One more request; it was served if the task is done."""

        async def wait() -> Lease:
            with self.queue.place(tenant) as place, self.router.claim(need(slots)) as claim:
                return await place.wait(claim.take, claim.keep)

        task = asyncio.create_task(wait())
        self.tasks.append(task)
        await settle()
        return task

    async def served(self, tenant: str, slots: int) -> Lease:
        """The lease of a request that finds room at once."""
        task = await self.ask(tenant, slots)
        assert task.done()
        return task.result()

    async def after(self, seconds: float) -> None:
        """Let so much time pass, until the next health check."""
        self.now += seconds
        self.queue.dispatch()
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@contextlib.contextmanager
def fleet(monkeypatch: pytest.MonkeyPatch, names: str) -> Iterator[Fleet]:
    made = Fleet(monkeypatch, names)
    try:
        yield made
        assert made.kept() == ""
    finally:
        for task in made.tasks:
            task.cancel()


async def test_a_large_request_is_served_under_a_stream_of_small_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fleet(monkeypatch, "a") as f:
        small = [await f.ask("mallory", 100) for _ in range(30)]
        big = await f.ask("bob", 500)
        while not big.done() and f.now < 30:
            oldest = next(task for task in small if task.done())
            small.remove(oldest)
            oldest.result().release()
            small.append(await f.ask("mallory", 100))
            await f.after(1)
        # Overtaken for 10 s; then five small ones had to end, and none came after them.
        assert f.now == 15 and sum(task.done() for task in small) == 5
        big.result().release()
        await settle()
        assert sum(task.done() for task in small) == 10


async def test_nothing_is_kept_before_the_wait_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet(monkeypatch, "a") as f:
        before = await f.served("mallory", 600)
        big = await f.ask("bob", 900)
        overtaker = await f.served("mallory", 200)
        before.release()
        await f.after(9.9)
        assert f.kept() == ""
        await f.after(0.1)
        assert f.kept() == "a"
        small = await f.ask("mallory", 200)
        assert not small.done()
        overtaker.release()
        await settle()
        assert big.done() and not small.done() and f.kept() == ""


async def test_a_worker_that_is_of_no_use_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long request that was there before: others need not wait for its end."""
    with fleet(monkeypatch, "a") as f:
        before = await f.served("mallory", 800)
        big = await f.ask("bob", 500)
        small = await f.served("mallory", 200)
        await f.after(11)
        assert f.kept() == ""
        small.release()
        await f.served("mallory", 200)
        before.release()
        await settle()
        assert big.done()


async def test_what_answers_have_grown_by_is_free_when_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a budget a worker reserves the output too, as it comes."""
    with fleet(monkeypatch, "a") as f:
        await f.served("alice", 300)
        before = await f.served("alice", 100)
        big = await f.ask("bob", 650)
        overtaker = await f.served("mallory", 100)
        overtaker.answered(WorkerChunk("", [1] * 300))
        load = f.workers.loads["a"]
        load.found_ready(dataclasses.replace(INFO, reserved_slots=800))
        before.release()
        await f.after(11)
        assert f.kept() == "a"
        overtaker.release()
        load.found_ready(INFO)
        await f.after(1)
        assert big.done()


async def test_a_worker_that_is_too_small_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle it would refuse the request with a 400. Where none is larger, nothing waits."""
    with fleet(monkeypatch, "ab") as f:
        with pytest.raises(WorkerUnavailable, match="allow less than this request needs"):
            (await f.ask("bob", 994)).result()  # SGLang wants 7 beside a prompt
        f.workers.loads["b"].found_ready(dataclasses.replace(INFO, total_slots=2000))
        before = [await f.served("mallory", 800) for _ in "ab"]
        big = await f.ask("bob", 1500)
        overtakers = [await f.served("mallory", slots) for slots in (600, 100)]
        assert {lease.worker.name for lease in overtakers} == {"b"}
        for lease in before:
            lease.release()
        assert (await f.served("mallory", 100)).worker.name == "a"
        await f.after(11)
        assert f.kept() == "b" and not big.done()
        for lease in overtakers:
            lease.release()
        await settle()
        assert big.result().worker.name == "b"


async def test_a_worker_that_is_being_tried_is_not_kept_before_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trial may hang, and meanwhile the request would be overtaken on all others."""
    with fleet(monkeypatch, "ab") as f:
        blockers = [await f.served("alice", 900) for _ in "ab"]
        big = await f.ask("bob", 950)
        overtakers = [await f.served("mallory", slots) for slots in (100, 60)]
        for blocker in blockers:
            blocker.release()
        least = overtakers[1].worker.name
        monkeypatch.setattr(f.workers.loads[least].breaker, "_opened", -1000.0)
        monkeypatch.setattr(f.workers.loads[least].breaker, "_trial", Trial())
        await f.after(11)
        assert f.kept() == overtakers[0].worker.name != least
        overtakers[0].release()
        await settle()
        assert big.done()


async def three_workers(f: Fleet) -> tuple[asyncio.Task[Lease], dict[str, Lease]]:
    """A request of 500 that no worker has room for but for one overtaker each, by worker."""
    for _ in "abc":
        await f.served("alice", 400)
    blockers = [await f.served("alice", 200) for _ in "abc"]
    big = await f.ask("bob", 500)
    overtakers = [await f.served("mallory", slots) for slots in (300, 200, 250)]
    for blocker in blockers:
        blocker.release()
    await f.after(11)
    return big, {lease.worker.name: lease for lease in overtakers}


async def test_one_worker_is_kept_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet(monkeypatch, "abc") as f:
        big, overtakers = await three_workers(f)
        assert len(overtakers) == 3
        least = min(overtakers, key=lambda name: overtakers[name].slots)
        assert f.kept() == least and not big.done()
        smalls = [await f.served("mallory", 50) for _ in range(8)]
        assert {lease.worker.name for lease in smalls} == overtakers.keys() - {least}
        overtakers[least].release()
        await settle()
        assert big.done() and big.result().worker.name == least


async def test_two_large_requests_keep_a_worker_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet(monkeypatch, "ab") as f:
        before = [await f.served("alice", 900) for _ in "ab"]
        bobs, carols = await f.ask("bob", 950), await f.ask("carol", 950)
        overtakers = [await f.served("mallory", 100) for _ in "ab"]
        for lease in before:
            lease.release()
        await f.after(11)
        assert f.kept() == "ab"
        for lease in overtakers:
            lease.release()
        await settle()
        assert {task.result().worker.name for task in (bobs, carols)} == {"a", "b"}


async def test_a_request_that_gives_up_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet(monkeypatch, "abc") as f:
        big, _ = await three_workers(f)
        waiting = [await f.ask("mallory", 300) for _ in range(3)]
        assert sum(task.done() for task in waiting) == 2
        big.cancel()
        await settle()
        assert f.kept() == "" and all(task.done() for task in waiting)


async def test_another_worker_is_kept_when_that_one_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fleet(monkeypatch, "abc") as f:
        big, overtakers = await three_workers(f)
        lost, then, _ = sorted(overtakers, key=lambda name: overtakers[name].slots)
        f.workers.loads[lost].found_lost("it is gone")
        await f.after(0)
        assert f.kept() == then
        overtakers[then].release()
        await settle()
        assert big.result().worker.name == then


async def test_a_large_request_is_served_by_a_gateway_that_is_full(tmp_path: Path) -> None:
    """9000 slots are free: nine requests of 1000 fill them, and one of 5000 waits."""
    queue = {"max_wait_seconds": 6}
    async with run_gateway(tmp_path, queue=queue) as running:
        running.worker.token_seconds = 0.01
        key = running.add_tenant("bob")

        async def go_on(number: int) -> None:
            while True:
                new = 10 + 4 * number
                await running.client.generate_once([1] * 1000, max_new_tokens=new)

        smalls = [asyncio.create_task(go_on(number)) for number in range(20)]
        await until(lambda: len(running.worker.running) >= 9)
        try:
            async with AsyncClient(running.target, key, retry=NEVER) as bob:
                await bob.generate_once([1] * 5000, max_new_tokens=2)
        finally:
            for small in smalls:
                small.cancel()
            await asyncio.gather(*smalls, return_exceptions=True)
