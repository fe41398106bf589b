"""The line in front of the workers: turns, bounds, and leaving it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import token_of
from vase_sgl.client import NEVER, AsyncClient, DeadlineExceeded, InvalidRequest, RateLimited
from vase_sgl.gateway import fair_queue
from vase_sgl.gateway.errors import LimitExceeded, WorkerUnavailable
from vase_sgl.gateway.fair_queue import FairQueue, Party, Place


async def until_waiting(running: Running, count: int) -> None:
    async with asyncio.timeout(5):
        while running.gateway._queue.waiting != count:
            await asyncio.sleep(0.01)


def assert_nothing_is_held(running: Running) -> None:
    """What was leaked would be missing for good: the worker never gets full again."""
    (load,) = running.gateway._fleet.loads.values()
    assert (load.in_flight, load.slots, load.query_readers) == (0, 0, 0)


async def test_tenants_take_turns(tmp_path: Path) -> None:
    """One at a time: bob's 2 requests come after one and two of alice's 8, not after all."""
    async with run_gateway(tmp_path, worker={"max_in_flight": 1}) as running:
        running.worker.token_seconds = 0.02
        key = running.add_tenant("bob")
        async with AsyncClient(running.target, key, retry=NEVER) as bob:
            first = asyncio.create_task(running.client.generate_once("first", max_new_tokens=20))
            async with asyncio.timeout(5):
                while not running.worker.running:
                    await asyncio.sleep(0.01)
            alices = [
                asyncio.create_task(running.client.generate_once("alice", max_new_tokens=2))
                for _ in range(8)
            ]
            await until_waiting(running, 8)
            bobs = [
                asyncio.create_task(bob.generate_once("bob", max_new_tokens=2)) for _ in range(2)
            ]
            await asyncio.gather(first, *alices, *bobs)
        order = [body["input_ids"][0] for body in running.worker.bodies]
        assert [i for i, token in enumerate(order) if token == token_of("bob")] == [2, 4]
        assert running.worker.most_running == 1


async def test_a_workers_own_maximum_bounds_what_it_gets(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as running:
        running.worker.max_running_requests = 3
        running.worker.token_seconds = 0.01
        await running.worker.noticed()
        calls = [running.client.generate_once("tell me", max_new_tokens=5) for _ in range(12)]
        await asyncio.gather(*calls)
        assert running.worker.most_running == 3


async def test_connections_do_not_bound_what_a_worker_gets(tmp_path: Path) -> None:
    """An HTTP client opens 100 unless it is told otherwise."""
    async with run_gateway(tmp_path, worker={"max_in_flight": 110}) as running:
        running.worker.token_seconds = 60.0
        calls = [running.client.generate_once("tell me", max_new_tokens=1) for _ in range(110)]
        tasks = [asyncio.create_task(call) for call in calls]
        await until(lambda: len(running.worker.running) == 110)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_kv_slots_bound_what_a_worker_gets(tmp_path: Path) -> None:
    """10000 slots, 1000 of them reserved already: two requests of 4000 fit, not three."""
    async with run_gateway(tmp_path) as running:
        running.worker.token_seconds = 0.01
        calls = [
            running.client.generate_once("tell me", max_new_tokens=5000, budget=3936, window=64)
            for _ in range(6)
        ]
        running.worker.faults.end_after_tokens = 10
        await asyncio.gather(*calls)
        assert running.worker.most_running == 2
        assert_nothing_is_held(running)


async def test_slots_that_a_first_round_gives_back_go_to_others(tmp_path: Path) -> None:
    """With a shared prompt of 2000 a request reserves 2064 + 1088 slots, and then 1088."""
    async with run_gateway(tmp_path) as running:
        running.worker.token_seconds = 0.005
        prompt = list(range(2000))
        calls = [
            running.client.generate_once(prompt, max_new_tokens=200, budget=1024, window=64)
            for _ in range(6)
        ]
        tasks = [asyncio.create_task(call) for call in calls]
        await until_waiting(running, 3)
        assert running.worker.most_running <= 3
        await asyncio.gather(*tasks)
        assert running.worker.most_running >= 4
        assert_nothing_is_held(running)


async def test_query_rings_bound_what_a_worker_gets(tmp_path: Path) -> None:
    """A worker has so many; a request whose policy reads no queries needs none."""
    async with run_gateway(tmp_path) as running:
        running.worker.max_query_requests = 2
        running.worker.token_seconds = 0.01
        await running.worker.noticed()
        for policy in ("vase-attnv", "streaming"):
            calls = [
                running.client.generate_once(
                    "tell me", max_new_tokens=10, budget=32, window=8, policy=policy
                )
                for _ in range(6)
            ]
            await asyncio.gather(*calls)
            assert (running.worker.most_running == 2) == (policy == "vase-attnv")
            assert_nothing_is_held(running)


async def test_the_line_is_bounded(tmp_path: Path) -> None:
    queue = {"max_waiting": 3, "max_waiting_per_tenant": 2}
    async with run_gateway(tmp_path, worker={"max_in_flight": 1}, queue=queue) as running:
        running.worker.token_seconds = 0.01
        key = running.add_tenant("bob")
        stream = running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        async with AsyncClient(running.target, key, retry=NEVER) as bob:
            waiting = [
                asyncio.create_task(client.generate_once("tell me", max_new_tokens=1))
                for client in (running.client, running.client, bob)
            ]
            await until_waiting(running, 3)
            with pytest.raises(RateLimited, match="tenant alice has 2 requests waiting"):
                await running.client.generate_once("tell me", max_new_tokens=1)
            with pytest.raises(RateLimited, match="3 requests are waiting at this gateway"):
                await bob.generate_once("tell me", max_new_tokens=1)
            stream.cancel()
            await asyncio.gather(*waiting)


async def test_the_line_is_full_before_the_calls_are(tmp_path: Path) -> None:
    """By default: who has nothing waiting finds a call, and room in the line."""
    calls = {"max_concurrent_calls": 9}
    async with run_gateway(tmp_path, worker={"max_in_flight": 1}, grpc=calls) as running:
        running.worker.token_seconds = 0.01
        stream = running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        flood = [
            asyncio.create_task(running.client.generate_once("tell me", max_new_tokens=1))
            for _ in range(7)
        ]
        await until_waiting(running, 4)
        key = running.add_tenant("bob")
        async with AsyncClient(running.target, key, retry=NEVER) as bob:
            other = asyncio.create_task(bob.generate_once("tell me", max_new_tokens=1))
            await until(lambda: sum(task.done() for task in flood) == 4)
            stream.cancel()
            await other
        ends = await asyncio.gather(*flood, return_exceptions=True)
        refused = [end for end in ends if isinstance(end, BaseException)]
        assert len(refused) == 4
        assert all("4 requests are waiting at this gateway" in str(error) for error in refused)


@pytest.mark.parametrize(("waiting", "warned"), [(None, False), (7, False), (8, True)])
async def test_a_line_as_long_as_there_are_calls_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, waiting: int | None, warned: bool
) -> None:
    sections = {"queue": {"max_waiting": waiting}, "grpc": {"max_concurrent_calls": 8}}
    async with run_gateway(tmp_path, **sections):
        assert ("queue.max_waiting: 8 is not below" in caplog.text) == warned


async def test_waiting_is_bounded_in_time(tmp_path: Path) -> None:
    queue = {"max_wait_seconds": 0.2}
    async with run_gateway(tmp_path, worker={"max_in_flight": 1}, queue=queue) as running:
        running.worker.token_seconds = 0.01
        stream = running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        with pytest.raises(RateLimited, match=r"no worker had room within 0\.2 s; come back in"):
            await running.client.generate_once("tell me", max_new_tokens=1)
        assert len(running.worker.bodies) == 1
        stream.cancel()


async def test_a_client_that_gives_up_waiting_is_never_run(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, worker={"max_in_flight": 1}) as running:
        running.worker.token_seconds = 0.01
        stream = running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        with pytest.raises(DeadlineExceeded):
            await running.client.generate_once("tell me", max_new_tokens=1, timeout=0.2)
        await until_waiting(running, 0)
        stream.cancel()
        await running.client.generate_once("tell me", max_new_tokens=1)
        assert len(running.worker.bodies) == 2
        assert len([r async for r in running.client.list_records()]) == 2


class Token:
    def __init__(self) -> None:
        self.released = 0

    def release(self) -> None:
        self.released += 1


def queue() -> FairQueue[Token]:
    return FairQueue(max_waiting=10, max_waiting_per_tenant=10, max_wait_seconds=5)


async def test_a_grant_to_a_cancelled_waiter_is_given_back() -> None:
    line, token = queue(), Token()
    free: list[Token] = []
    with line.place("t") as place:
        task = asyncio.create_task(place.wait(lambda: free.pop() if free else None))
        await asyncio.sleep(0)
        free.append(token)
        line.dispatch()  # granted, and not yet awake
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert token.released == 1 and line.waiting == 0


async def test_a_cancelled_waiter_is_granted_nothing() -> None:
    line = queue()
    free: list[Token] = []
    with line.place("t") as place:
        task = asyncio.create_task(place.wait(lambda: free.pop() if free else None))
        await asyncio.sleep(0)
        task.cancel()
        free.append(Token())
        line.dispatch()
        await asyncio.gather(task, return_exceptions=True)
    assert len(free) == 1


async def test_when_the_first_gives_up_the_next_is_looked_at() -> None:
    """At once: nothing else may happen for a while."""
    line = queue()
    with line.place("t") as large, line.place("t") as small:
        first = asyncio.create_task(large.wait(lambda: None))
        await asyncio.sleep(0)
        second = asyncio.create_task(small.wait(Token))
        await asyncio.sleep(0)
        assert not second.done()
        first.cancel()
        assert isinstance(await asyncio.wait_for(second, 2), Token)


async def test_an_error_reaches_the_waiter_and_the_next_goes_on() -> None:
    line = queue()

    def lost() -> Token | None:
        raise WorkerUnavailable("lost")

    with line.place("t") as place:
        with pytest.raises(WorkerUnavailable, match="lost"):
            await place.wait(lost)
        assert isinstance(await place.wait(Token), Token)


class Full:
    """A line of four in which nobody is granted anything."""

    def __init__(self) -> None:
        self.line: FairQueue[Token] = FairQueue(
            max_waiting=4, max_waiting_per_tenant=4, max_wait_seconds=5
        )
        self.tasks: list[asyncio.Task[Token]] = []

    async def _wait(self, tenant: str) -> Token:
        with self.line.place(tenant) as place:
            return await place.wait(lambda: None)

    async def come(self, *tenants: str) -> str:
        """Whose requests wait after these came, all at once."""
        self.tasks += [asyncio.create_task(self._wait(tenant), name=tenant) for tenant in tenants]
        for _ in range(3):
            await asyncio.sleep(0)
        return "".join(task.get_name() for task in self.tasks if not task.done())

    async def close(self) -> list[LimitExceeded]:
        """Why the others were refused."""
        for task in self.tasks:
            task.cancel()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert self.line.waiting == 0 and not self.line._lines
        return [end for end in ends if isinstance(end, LimitExceeded)]


async def test_a_tenant_with_a_long_line_does_not_fill_that_of_all() -> None:
    """The last to come in the longest line makes room, until the lines are equally long."""
    full = Full()
    assert await full.come("a", "a", "a", "a") == "aaaa"
    assert await full.come("b") == "aaab" and full.tasks[3].done()
    assert await full.come("b", "b") == "aabb"
    assert await full.come("c", "d", "e") == "abcd" and full.line.waiting == 4
    assert await full.come("a") == "abcd"
    refused = await full.close()
    assert len(refused) == 7 and {error.reason for error in refused} == {"queue_total"}


async def test_who_does_not_wait_in_the_line_is_not_refused_for_others() -> None:
    """Those still on their way to it, and those whom a lost worker sent back."""
    full = Full()
    with full.line.place("a"), full.line.place("a"), full.line.place("a"):
        with full.line.place("a") as left:
            pass
        back = asyncio.create_task(left.wait(lambda: None))
        assert await full.come("b") == "b"
        assert await full.come("c") == "b"
        assert not back.done()
        back.cancel()
        await asyncio.gather(back, return_exceptions=True)
    assert len(await full.close()) == 1


async def test_who_has_none_in_line_keeps_no_other_from_giving_way() -> None:
    """A tenant with as many waiting, or with most, all of whose prompts are being tokenized."""
    full = Full()
    with full.line.place("a"), full.line.place("a"):
        assert await full.come("b", "b") == "bb"
        assert await full.come("c") == "bc"
        assert await full.come("d") == "bc"
    assert len(await full.close()) == 2


async def test_who_comes_in_excess_makes_nobody_give_way_before_it_waits() -> None:
    full = Full()
    assert await full.come("a", "a", "a", "a") == "aaaa"
    with full.line.place("b"):
        assert await full.come() == "aaaa"
    with full.line.place("b") as served:
        assert isinstance(await served.wait(Token), Token)
    with full.line.place("b") as late:
        full.tasks[0].cancel()
        assert await full.come() == "aaa"
        waiting = asyncio.create_task(late.wait(lambda: None))
        assert await full.come() == "aaa" and not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert not await full.close()


async def test_those_in_excess_share_with_each_other() -> None:
    """All of a tenant's come while the other's line is long, and then one after the other waits."""
    full = Full()
    await full.come("a", "a", "a", "a")
    with contextlib.ExitStack() as held:
        places = [held.enter_context(full.line.place("b")) for _ in range(3)]
        tasks = [asyncio.create_task(place.wait(lambda: None)) for place in places]
        assert await full.come() == "aa" and full.line.waiting == 4
        assert [task.done() for task in tasks] == [False, True, False]
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(ends[1], LimitExceeded) and ends[1].reason == "queue_total"
    assert len(await full.close()) == 2


async def test_who_ends_a_party_that_was_served_does_not_give_way() -> None:
    full, party = Full(), Party()
    with contextlib.ExitStack() as held:
        with full.line.place("a", party) as first:
            places = [held.enter_context(full.line.place("a", party)) for _ in range(3)]
            await first.wait(Token)
        waiting = [asyncio.create_task(place.wait(lambda: None)) for place in places]
        assert await full.come() == ""
        assert await full.come("a") == "a"
        assert await full.come("b") == "b"
        assert await full.come("c") == "b"
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert len(await full.close()) == 2


async def test_a_party_that_was_served_stays_in_excess() -> None:
    full, party = Full(), Party()
    assert await full.come("a", "a", "a", "a") == "aaaa"
    with contextlib.ExitStack() as held:
        with full.line.place("b", party) as first:
            places = [held.enter_context(full.line.place("b", party)) for _ in range(2)]
            await first.wait(Token)
        with full.line.place("b"):
            waiting = [asyncio.create_task(place.wait(lambda: None)) for place in places]
            assert await full.come() == "aaa"
        assert not any(task.done() for task in waiting) and full.line.waiting == 5
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert len(await full.close()) == 1


async def test_who_is_refused_itself_makes_nobody_give_way(tmp_path: Path) -> None:
    """By a limit of its tenant, or for what it asks."""
    async with run_gateway(
        tmp_path, worker={"max_in_flight": 1}, queue={"max_waiting": 3}
    ) as running:
        running.worker.token_seconds = 0.01
        key = running.add_tenant("bob", limits={"requests_per_second": 0.001})
        stream = running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        waiting = [
            asyncio.create_task(running.client.generate_once("tell me", max_new_tokens=1))
            for _ in range(3)
        ]
        await until_waiting(running, 3)
        async with AsyncClient(running.target, key, retry=NEVER) as bob:
            with pytest.raises(InvalidRequest):
                await bob.generate_once("tell me", max_new_tokens=0)
            with pytest.raises(RateLimited, match="requests per second"):
                await bob.generate_once("tell me", max_new_tokens=1)
        assert running.gateway._queue.waiting == 3
        stream.cancel()
        await asyncio.gather(*waiting)


class Moving:
    """A line in which as many are granted something as is said, and its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None, **bounds: Any) -> None:
        self.now = 0.0
        if monkeypatch is not None:
            monkeypatch.setattr(fair_queue, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.line: FairQueue[Token] = FairQueue(max_wait_seconds=30, **bounds)
        self.free = 0
        self.tasks: list[asyncio.Task[Token]] = []

    def take(self) -> Token | None:
        if not self.free:
            return None
        self.free -= 1
        return Token()

    def wait(self, place: Place[Token]) -> asyncio.Task[Token]:
        self.tasks.append(asyncio.create_task(place.wait(self.take)))
        return self.tasks[-1]

    async def come(self, *tenants: str) -> None:
        async def come(tenant: str) -> Token:
            with self.line.place(tenant) as place:
                return await place.wait(self.take)

        self.tasks += [asyncio.create_task(come(tenant)) for tenant in tenants]
        await asyncio.sleep(0)

    async def grant(self, count: int = 1) -> None:
        self.free += count
        self.line.dispatch()
        await asyncio.sleep(0)
        assert not self.free

    def hint(self, tenant: str = "t") -> float | None:
        """What one more is told, which is refused."""
        with pytest.raises(LimitExceeded) as error, self.line.place(tenant):
            pass
        return error.value.retry_seconds

    async def close(self) -> list[str]:
        """Why those were refused that were."""
        for task in self.tasks:
            task.cancel()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert self.line.waiting == 0 and not self.line._lines
        return [end.reason for end in ends if isinstance(end, LimitExceeded)]


async def test_nobody_is_refused_as_waiting_while_nobody_waits() -> None:
    """Until as many are on their way as may be; who then finds no room is one too many."""
    moving = Moving(max_waiting=2, max_waiting_per_tenant=9, max_arriving=6)
    with contextlib.ExitStack() as held:
        places = [held.enter_context(moving.line.place(tenant)) for tenant in "aabbcc"]
        assert moving.hint("d") == 1.0 and moving.line.waiting == 6
        moving.free = 3
        tasks = [moving.wait(place) for place in places]
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [True, True, True, True, False, False]
        assert isinstance(tasks[3].exception(), LimitExceeded) and moving.line.waiting == 2
        moving.hint("c")
        await moving.grant(2)
    assert await moving.close() == ["queue_total"]


async def test_those_on_their_way_fill_the_line_when_somebody_waits() -> None:
    moving = Moving(max_waiting=3, max_waiting_per_tenant=9, max_arriving=6)
    with contextlib.ExitStack() as held:
        places = [held.enter_context(moving.line.place(tenant)) for tenant in "aab"]
        moving.wait(places[2])
        await asyncio.sleep(0)
        moving.hint("b")
    assert await moving.close() == []


@pytest.mark.parametrize("due", [True, False])
async def test_who_was_granted_something_or_will_be_fills_no_line(due: bool) -> None:
    """In the turn of the loop in which two get free, and before those who get it have woken."""
    moving = Moving(max_waiting=3, max_waiting_per_tenant=3)
    await moving.come("a", "a", "a")
    with moving.line.place("b") as place:
        await moving.come()
        last = moving.wait(place)  # joins in the next turn
        moving.free = 2
        (moving.line.dispatch_soon if due else moving.line.dispatch)()
        await asyncio.sleep(0)
        assert moving.line.waiting == 2 and not moving.free
        await moving.grant(2)
        await asyncio.sleep(0)
        assert last.done()
    assert await moving.close() == []


async def test_the_hint_follows_how_fast_the_line_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    moving = Moving(monkeypatch, max_waiting=9, max_waiting_per_tenant=4)
    await moving.come("t", "t", "t", "t")
    for moving.now, seconds in ((0.0, 1.0), (12.0, 12.0)):
        assert moving.hint() == seconds
    for moving.now, seconds in ((13.0, 13.0), (14.0, 4 * 14 / 2), (15.0, 4 * 15 / 3)):
        await moving.grant()
        await moving.come("t")
        assert moving.hint() == seconds
    for _ in range(fair_queue._REMEMBERED_GRANTS):
        moving.now += 2
        await moving.grant()
        await moving.come("t")
    for later, seconds in ((0.0, 4 * 2.0), (64.0, 4 * 3.0), (1000.0, 30.0)):
        moving.now = 15.0 + 2 * fair_queue._REMEMBERED_GRANTS + later
        assert moving.hint() == seconds
    assert not await moving.close()


async def test_a_line_that_stands_still_is_not_told_to_be_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who found room before somebody had to wait do not tell how fast it moves."""
    moving = Moving(monkeypatch, max_waiting=9, max_waiting_per_tenant=4)
    for moving.now in (0.0, 1.0, 2.0):
        moving.free = 1
        await moving.come("t")
    await moving.come("t", "t", "t", "t")
    for moving.now, seconds in ((2.0, 1.0), (12.0, 10.0), (31.0, 29.0), (99.0, 30.0)):
        assert moving.hint() == seconds
    assert not await moving.close()


async def test_who_waits_in_vain_is_told_that_the_line_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moving = Moving(monkeypatch, max_waiting=9, max_waiting_per_tenant=4)
    longest = asyncio.timeout(None)
    monkeypatch.setattr(asyncio, "timeout", lambda seconds: longest)
    await moving.come("t")
    moving.now = 30.0
    longest.reschedule(0.0)
    with pytest.raises(LimitExceeded, match="no worker had room within 30 s") as error:
        await moving.tasks[0]
    assert error.value.retry_seconds == 30.0


async def test_a_quiet_time_makes_no_slow_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours without a request, then a burst."""
    moving = Moving(monkeypatch, max_waiting=9, max_waiting_per_tenant=4)
    await moving.come("t", "t", "t")
    await moving.grant(3)
    moving.now = 8 * 3600.0
    with contextlib.ExitStack() as on_their_way:
        for _ in range(4):
            on_their_way.enter_context(moving.line.place("t"))
        assert moving.hint() == 1.0
    await moving.come("t", "t", "t", "t")
    assert moving.hint() == 1.0
    moving.now += 1
    await moving.grant(2)
    await moving.come("t", "t")
    assert moving.hint() == 4 * 1 / 2
    assert not await moving.close()
