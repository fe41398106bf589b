"""What the line in front of full workers costs, and that it grants what asking everybody would."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
from typing import Any

import pytest

from tests.gateway.test_overtaking import INFO, Fleet, fleet, settle
from vase_sgl.gateway.fair_queue import FairQueue
from vase_sgl.gateway.leases import Lease, WorkerLoad
from vase_sgl.gateway.need import KIND, Need
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.workers import WorkerInfo


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often a worker is looked at for room, by its name."""
    counted: collections.Counter[str] = collections.Counter()
    real = WorkerLoad.has_room

    def has_room(load: WorkerLoad, need: Need, **options: int) -> bool:
        counted[load.worker.name] += 1
        return real(load, need, **options)

    monkeypatch.setattr(WorkerLoad, "has_room", has_room)
    return counted


async def full(f: Fleet, tenants: int) -> list[Lease]:
    """Leases of 100 slots that leave none, and so many tenants with two waiting requests."""
    leases = [await f.served("alice", 100) for _ in range(10 * len(f.workers.loads))]
    for number in range(2 * tenants):
        await f.ask(f"tenant {number % tenants}", 100 + number % tenants)
    return leases


@pytest.mark.parametrize("tenants", [5, 45])
async def test_one_that_comes_asks_for_itself(
    monkeypatch: pytest.MonkeyPatch, looks: collections.Counter[str], tenants: int
) -> None:
    with fleet(monkeypatch, "ab") as f:
        await full(f, tenants)
        looks.clear()
        await f.ask("tenant 0", 100)
        assert looks == {}  # those before it wait
        late = await f.ask("bob", 100)
        assert looks == {"a": 1, "b": 1}
        late.cancel()
        await settle()
        assert looks == {"a": 1, "b": 1}


async def test_when_the_first_gives_up_only_its_line_is_asked(
    monkeypatch: pytest.MonkeyPatch, looks: collections.Counter[str]
) -> None:
    with fleet(monkeypatch, "ab") as f:
        await full(f, 20)
        looks.clear()
        f.tasks[-1].cancel()  # the last of its line
        await settle()
        assert looks == {}
        f.tasks[20].cancel()
        await settle()
        assert looks == {"a": 1, "b": 1}


@pytest.mark.parametrize("tenants", [5, 45])
@pytest.mark.parametrize("seconds", [0, 11])
async def test_a_dispatch_asks_once_for_as_much(
    monkeypatch: pytest.MonkeyPatch,
    looks: collections.Counter[str],
    tenants: int,
    seconds: float,
) -> None:
    """However many tenants wait, and also when they may keep a worker, as nobody overtook them."""
    with fleet(monkeypatch, "ab") as f:
        leases = await full(f, tenants)
        f.now += seconds
        looks.clear()
        f.queue.dispatch()
        assert looks == ({"a": 1, "b": 1} if not seconds else {"a": 2, "b": 2})
        looks.clear()
        for lease in leases[:2]:
            lease.release()
        await settle()
        assert sum(task.done() for task in f.tasks) == len(leases) + 2
        assert looks.total() <= 16


async def test_what_gets_free_in_one_turn_is_handed_out_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fleet(monkeypatch, "a") as f:
        leases = await full(f, 5)
        dispatches = 0
        real = f.router.sweep

        def sweep() -> object:
            nonlocal dispatches
            dispatches += 1
            return real()

        monkeypatch.setattr(f.queue, "_sweep", sweep)
        for lease in leases:
            lease.release()
        await settle()
        assert dispatches == 1 and f.workers.loads["a"].in_flight == 9


async def test_who_comes_between_a_release_and_its_dispatch_overtakes_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fleet(monkeypatch, "a") as f:
        before = await f.served("alice", 1000 - 7 - 1)
        first = await f.ask("bob", 900)

        async def ask() -> Lease:
            claimed = f.router.claim(Need((1,) * 900, 10, None, False))
            with f.queue.place("mallory") as place, claimed as claim:
                before.release()
                return await place.wait(claim.take, claim.keep)

        late = asyncio.create_task(ask())
        f.tasks.append(late)
        await settle()
        assert first.done() and not late.done()


async def test_one_that_nobody_overtook_speaks_for_none_that_was_overtaken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fleet(monkeypatch, "a") as f:
        await f.served("alice", 600)
        blocker = await f.served("alice", 100)
        first = await f.ask("bob", 350)
        next_one = await f.ask("bob", 350)
        big = await f.ask("carol", 350)
        overtaker = await f.served("mallory", 300)
        blocker.release()
        first.cancel()
        await settle()
        await f.after(11)
        assert f.kept() == "a"
        overtaker.release()
        await settle()
        assert big.done() and not next_one.done()
        next_one.cancel()
        await settle()


class AskingEverybody(FairQueue[Lease]):
    """Each head is asked whenever anything happens. The measure for what is granted and kept."""

    def dispatch_soon(self) -> None:
        self.dispatch()

    def _serve_first(self, waiter: object) -> None:
        self.dispatch()


def in_order_of_names(
    router: WorkerRouter, loads: list[WorkerLoad], prompt: tuple[int, ...]
) -> list[WorkerLoad]:
    """Those in vain count as turns, and are fewer here than there."""
    return sorted(loads, key=lambda load: (load.reserved, load.worker.name))


def different_workers(f: Fleet) -> None:
    differences: list[dict[str, int]] = [
        {},
        {"page_size": 64},
        {"total_slots": 1500, "max_query_requests": 2},
        {"max_budget": 100},
        {"context_length": 600, "max_running_requests": 3},
    ]
    for load, different in zip(f.workers.loads.values(), differences, strict=True):
        load.found_ready(dataclasses.replace(INFO, reserved_slots=0, **different))


def any_need(chance: random.Random) -> Need:
    prompt, most = (1,) * chance.choice([10, 100, 300, 500]), chance.choice([10, 500])
    if chance.random() < 0.5:
        return Need(prompt, most, None, reads_queries=False)
    budget = chance.choice([64, 256])
    eviction = {"policy": "x", "budget": budget, "window": 16, "prompt": "evict"}
    return Need(prompt, most, eviction, reads_queries=chance.random() < 0.5)


async def history(f: Fleet, seed: int) -> list[object]:
    """What was granted, and where, and what was kept, after each of many random events."""
    chance = random.Random(seed)
    different_workers(f)
    running: dict[int, Lease] = {}
    waiting: dict[int, asyncio.Task[Lease]] = {}
    told: list[object] = []

    async def wait(tenant: str, need: Need, exclude: tuple[str, ...]) -> Lease:
        with f.queue.place(tenant) as place, f.router.claim(need, exclude=exclude) as claim:
            return await place.wait(claim.take, claim.keep)

    for number in range(250):
        event = chance.random()
        pick = chance.random()
        if event < 0.5 and len(waiting) < 50:
            exclude = tuple(chance.sample("abcde", 4)) if chance.random() < 0.2 else ()
            asking = wait(f"tenant {chance.randrange(12)}", any_need(chance), exclude)
            waiting[number] = asyncio.create_task(asking)
        elif event < 0.75 and running:
            running.pop(sorted(running)[int(pick * len(running))]).release()
        elif event < 0.85 and waiting:
            waiting[sorted(waiting)[int(pick * len(waiting))]].cancel()
        else:
            f.now += 2
            f.queue.dispatch()
        await settle()
        for one, task in list(waiting.items()):
            if task.done():
                del waiting[one]
                if task.cancelled():
                    continue
                if (error := task.exception()) is None:
                    running[one] = task.result()
                else:
                    told.append(f"{one}: {error}")
        told.append((f.kept(), {one: lease.worker.name for one, lease in running.items()}))
    for task in waiting.values():
        task.cancel()
    await settle()
    return told


async def test_nothing_else_is_granted_or_kept_than_by_asking_everybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WorkerRouter, "_order", in_order_of_names)
    kept = 0
    for seed in range(20):
        with fleet(monkeypatch, "abcde") as f:
            cheap = await history(f, seed)
        with fleet(monkeypatch, "abcde") as f:
            f.queue = AskingEverybody(
                max_waiting=100, max_waiting_per_tenant=100, max_wait_seconds=40
            )
            assert cheap == await history(f, seed), f"seed = {seed}"
        kept += sum(bool(told[0]) for told in cheap)  # type: ignore[index]
    assert kept > 500


class _Watched:
    """A worker's state that notes what of it is looked at."""

    def __init__(self, info: WorkerInfo) -> None:
        self._info = info
        self.seen: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.seen.add(name)
        return getattr(self._info, name)


def test_workers_are_told_apart_by_all_that_a_need_looks_at() -> None:
    """Or a refusal by one worker would stand for another, which has room."""
    watched: Any = _Watched(INFO)
    for eviction in (None, {"budget": 32, "window": 8, "prompt": "evict"}):
        need = Need((1, 2), 90, eviction, True, INFO.model)
        assert need.fits(watched) and need.slots(watched)
    assert watched.seen == set(KIND)
