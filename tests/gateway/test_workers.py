"""Several workers: who gets a request, and what happens when one fails at any moment."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import Unavailable
from vase_sgl.gateway import worker_http
from vase_sgl.gateway.breaker import BreakerState, CircuitBreaker
from vase_sgl.gateway.config import BreakerSection, WorkerSection
from vase_sgl.gateway.discovery import discover, resolve
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.fleet import Fleet as Workers
from vase_sgl.gateway.leases import Lease, WorkerLoad
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.replay_gate import ReplayGate
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.worker_answers import worker_info
from vase_sgl.gateway.worker_http import HttpWorker
from vase_sgl.gateway.workers import CacheStats, WorkerChunk, WorkerInfo
from vase_sgl.worker_key import WORKER_KEY


@dataclasses.dataclass
class Fleet:
    running: Running
    one: ScriptedWorker
    two: ScriptedWorker

    def states(self) -> dict[str, BreakerState]:
        return {status.name: status.breaker for status in self.running.gateway._fleet.statuses()}


@asynccontextmanager
async def fleet(folder: Path, **worker: Any) -> AsyncIterator[Fleet]:
    """Two workers behind a gateway, both ready."""
    async with ScriptedWorker() as one, ScriptedWorker() as two:
        section = {"urls": [one.url, two.url], "health_interval_seconds": 5, **worker}
        async with run_gateway(folder, worker=section) as running:
            await until(lambda: len(running.gateway._router.ready()) == 2)
            yield Fleet(running, one, two)


async def test_workers_that_ask_for_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(WORKER_KEY, "0123456789abcdef")
    async with (
        ScriptedWorker(api_key="0123456789abcdef") as one,
        ScriptedWorker(api_key="fedcba9876543210") as two,
    ):
        section = {"urls": [one.url, two.url]}
        async with run_gateway(tmp_path, worker=section) as running:
            answer = await running.client.generate_once("tell me", max_new_tokens=5)
            assert len(answer.token_ids) == 5
            assert [worker.name for worker, _ in running.gateway._router.ready()] == [one.url]
    assert f"worker {two.url} refuses this gateway's key" in caplog.text
    assert "0123456789abcdef" not in caplog.text


@pytest.mark.parametrize("fault", [{"refuse_status": 500}, {"cut_after_tokens": 0}])
async def test_a_failure_before_the_first_token_goes_to_the_other_worker(
    tmp_path: Path, fault: dict[str, Any]
) -> None:
    """With the same id, seeds and budget: the answer is the one the first would have given."""
    async with fleet(tmp_path) as f:
        options: dict[str, Any] = {"max_new_tokens": 60, "budget": 32, "window": 8, "seed": 7}
        expected = await f.running.client.generate_once("tell me", **options)
        for name, value in fault.items():
            setattr(f.one.faults, name, value)
        f.one.bodies.clear()
        f.two.bodies.clear()
        for _ in range(2):
            answer = await f.running.client.generate_once("tell me", **options)
            assert answer.token_ids == expected.token_ids
            assert answer.result.round_digests == expected.result.round_digests
        assert len(f.one.bodies) == 1 and len(f.two.bodies) == 2
        (body,) = f.one.bodies
        assert body in f.two.bodies
        record = await f.running.client.get_record(body["rid"])
        assert record.status == "completed"
        assert len([r async for r in f.running.client.list_records()]) == 3


async def test_a_retry_carries_the_seeds_that_the_record_names(tmp_path: Path) -> None:
    """Seeds derived from the request's own id: a second derivation would give others."""
    async with fleet(tmp_path) as f:
        f.one.faults.refuse_status = 500
        async with asyncio.timeout(5):
            while not f.one.bodies:
                answer = await f.running.client.generate_once(
                    "tell me", max_new_tokens=60, budget=32, window=8
                )
        record = await f.running.client.get_record(answer.request_id)
        seeds = record.seeds
        for worker in (f.one, f.two):
            sampling = worker.bodies[-1]["sampling_params"]
            assert worker.bodies[-1]["rid"] == record.record_id
            assert sampling["sampling_seed"] == seeds.sampling
            assert sampling["custom_params"]["vase"]["seed"] == seeds.eviction


async def test_after_the_first_token_there_is_no_retry(tmp_path: Path) -> None:
    async with fleet(tmp_path) as f:
        f.one.faults.cut_after_tokens = f.two.faults.cut_after_tokens = 3
        stream = f.running.client.generate("tell me", max_new_tokens=10)
        sent: list[int] = []
        with pytest.raises(Unavailable, match=r"was lost while it answered; try again later"):
            async for chunk in stream:
                sent += chunk.token_ids
        assert len(sent) == 3 and len(f.one.bodies) + len(f.two.bodies) == 1
        record = await f.running.client.get_record(stream.request_id)
        assert record.status == "failed" and list(record.output_token_ids) == sent


async def test_a_worker_killed_mid_stream(tmp_path: Path) -> None:
    """What was sent stays, the call ends with UNAVAILABLE, the next requests go elsewhere."""
    async with fleet(tmp_path) as f:
        for worker in (f.one, f.two):
            worker.token_seconds = 0.01
        stream = f.running.client.generate("tell me", max_new_tokens=4000)
        sent: list[int] = []
        with pytest.raises(Unavailable):
            async for chunk in stream:
                sent += chunk.token_ids
                if len(sent) == 10:
                    dying, living = (f.one, f.two) if f.one.running else (f.two, f.one)
                    await dying.kill()
        assert len(sent) >= 10
        record = await f.running.client.get_record(stream.request_id)
        assert record.status == "failed" and "was lost" in record.failure
        assert list(record.output_token_ids[: len(sent)]) == sent
        for _ in range(4):
            await f.running.client.generate_once("tell me", max_new_tokens=2)
        assert len(living.bodies) == 4


async def test_without_retries_the_first_failure_is_the_last(tmp_path: Path) -> None:
    async with fleet(tmp_path, retries=0) as f:
        f.one.faults.refuse_status = f.two.faults.refuse_status = 500
        with pytest.raises(Unavailable, match="status 500"):
            await f.running.client.generate_once("tell me", max_new_tokens=2)
        assert len(f.one.bodies) + len(f.two.bodies) == 1


async def test_both_fail(tmp_path: Path) -> None:
    async with fleet(tmp_path) as f:
        f.one.faults.refuse_status = f.two.faults.refuse_status = 500
        stream = f.running.client.generate("tell me", max_new_tokens=2)
        with pytest.raises(Unavailable, match="status 500"):
            _ = [chunk async for chunk in stream]
        assert len(f.one.bodies) == len(f.two.bodies) == 1
        assert (await f.running.client.get_record(stream.request_id)).status == "failed"


async def test_the_breaker_opens_tries_and_closes(tmp_path: Path) -> None:
    breaker = {"failures": 3, "open_seconds": 2, "successes": 2}
    async with fleet(tmp_path, breaker=breaker) as f:
        f.one.faults.refuse_status = 500

        async def requests(count: int) -> None:
            for _ in range(count):
                await f.running.client.generate_once("tell me", max_new_tokens=2)

        await requests(6)
        assert len(f.one.bodies) == 3 and f.states()[f.one.url] is BreakerState.OPEN
        await requests(6)
        assert len(f.one.bodies) == 3
        await until(lambda: f.states()[f.one.url] is BreakerState.HALF_OPEN)
        await requests(4)  # the one that is let through fails, and it opens again
        assert len(f.one.bodies) == 4 and f.states()[f.one.url] is BreakerState.OPEN
        f.one.faults.refuse_status = None
        await until(lambda: f.states()[f.one.url] is BreakerState.HALF_OPEN)
        await requests(4)
        assert f.states()[f.one.url] is BreakerState.CLOSED
        assert f.states()[f.two.url] is BreakerState.CLOSED


async def test_when_every_breaker_is_open_the_client_is_told_when_to_come_back(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, breaker={"failures": 1, "open_seconds": 20}) as f:
        f.one.faults.refuse_status = f.two.faults.refuse_status = 500
        with pytest.raises(Unavailable):
            await f.running.client.generate_once("tell me", max_new_tokens=2)
        with pytest.raises(Unavailable, match=r"every worker failed too often .* in 20 s"):
            await f.running.client.generate_once("tell me", max_new_tokens=2)


def test_old_failures_and_results_of_older_requests_do_not_count() -> None:
    now = 0.0
    settings = BreakerSection(failures=2, window_seconds=10, open_seconds=5, successes=1)
    breaker = CircuitBreaker(settings, lambda: now)
    old = breaker.enter()
    breaker.leave(breaker.enter(), False)
    now = 11
    breaker.leave(breaker.enter(), False)
    assert breaker.state is BreakerState.CLOSED
    now = 12
    breaker.leave(breaker.enter(), False)
    assert breaker.state is BreakerState.OPEN and breaker.open_seconds == 5
    now = 17
    assert breaker.state is BreakerState.HALF_OPEN and breaker.allows
    trial = breaker.enter()
    assert trial and not breaker.allows
    breaker.leave(old, True)
    assert breaker.state is BreakerState.HALF_OPEN and not breaker.allows
    breaker.leave(trial, None)
    assert breaker.allows
    breaker.leave(breaker.enter(), True)
    assert breaker.state is BreakerState.CLOSED


def test_a_breaker_that_closed_begins_anew() -> None:
    """What it counted before is forgotten; what fails late prolongs nothing."""
    now = 0.0
    settings = BreakerSection(failures=2, window_seconds=100, open_seconds=5, successes=2)
    breaker = CircuitBreaker(settings, lambda: now)

    def request(succeeds: bool) -> BreakerState:
        breaker.leave(breaker.enter(), succeeds)
        return breaker.state

    for _ in range(2):
        late = breaker.enter()
        assert [request(False), request(False)] == [BreakerState.CLOSED, BreakerState.OPEN]
        now += 1
        breaker.leave(late, False)
        now += 4
        assert [request(True), request(True)] == [BreakerState.HALF_OPEN, BreakerState.CLOSED]


def test_a_trial_has_succeeded_with_its_first_output() -> None:
    now = 0.0
    settings = BreakerSection(failures=1, window_seconds=100, open_seconds=5, successes=2)
    breaker = CircuitBreaker(settings, lambda: now)
    breaker.leave(breaker.enter(), False)
    now = 5
    first = breaker.enter()
    breaker.answered(first)
    second = breaker.enter()
    assert first and second and not breaker.allows
    breaker.answered(first)  # counts once
    breaker.leave(first, True)
    assert breaker.state is BreakerState.HALF_OPEN and not breaker.allows
    breaker.answered(second)
    assert breaker.state is BreakerState.CLOSED
    breaker.leave(second, False)
    assert breaker.state is BreakerState.OPEN


def test_a_trial_that_fails_after_its_first_output_opens_the_breaker_again() -> None:
    now = 0.0
    settings = BreakerSection(failures=1, window_seconds=100, open_seconds=5, successes=2)
    breaker = CircuitBreaker(settings, lambda: now)
    breaker.leave(breaker.enter(), False)
    now = 5
    first = breaker.enter()
    breaker.answered(first)
    second = breaker.enter()
    breaker.leave(first, False)
    assert breaker.state is BreakerState.OPEN and breaker.open_seconds == 5
    now = 6
    breaker.answered(second)  # which was sent before that
    breaker.leave(second, False)
    assert breaker.open_seconds == 4
    now = 10
    for _ in range(2):
        assert breaker.state is BreakerState.HALF_OPEN
        breaker.leave(breaker.enter(), True)
    assert breaker.state is BreakerState.CLOSED


class Told:
    """A worker that says what it is told to. 1000 slots."""

    def __init__(self, name: str = "told", **info: Any) -> None:
        self.name = name
        self.answer = WorkerInfo(
            **{
                "fingerprint": {},
                "default_eviction": None,
                "max_budget": 32,
                "max_window": 8,
                "context_length": 100,
                "vocab_size": None,
                "total_slots": 1000,
                "available_slots": 1000,
                "reserved_slots": 0,
                "running_requests": 0,
                "rounds": 0,
                "evicted_tokens": 0,
                **info,
            }
        )
        self.healthy, self.closed, self.checks = True, False, 0

    async def check_health(self) -> None:
        self.checks += 1
        if not self.healthy:
            raise WorkerUnavailable("as it was told")

    async def info(self) -> WorkerInfo:
        return self.answer

    async def close(self) -> None:
        self.closed = True


#: 50 slots, 40 after the first round. The most that `Told` allows.
EVICTION = {"policy": "random", "budget": 32, "window": 8, "prompt": "evict"}
NEED = Need(tuple(range(10)), max_new_tokens=90, eviction=EVICTION, reads_queries=False)


@asynccontextmanager
async def routed(
    *workers: Told, on_room: Callable[[], None] = lambda: None, **settings: Any
) -> AsyncIterator[WorkerRouter]:
    """A router that has looked at each of its workers once."""

    async def ignore(ready: bool) -> None:
        """Nobody asks."""

    section = WorkerSection(urls=("http://x:1",), **settings)
    watched = Workers(workers, section, on_change=ignore, on_room=on_room)  # type: ignore[arg-type]
    await watched.check_all()
    yield WorkerRouter(watched)
    await watched.close()


def taken(router: WorkerRouter, **options: Any) -> Lease:
    lease = router.take(NEED, **options)
    assert lease is not None
    return lease


@pytest.mark.parametrize("less", [{"max_budget": 31}, {"max_window": 7}, {"context_length": 99}])
async def test_a_worker_that_allows_less_gets_nothing(less: dict[str, int]) -> None:
    async with routed(Told("less", **less), Told("more")) as router:
        assert {taken(router).worker.name for _ in range(4)} == {"more"}
        with pytest.raises(WorkerUnavailable, match="allow less than this request needs"):
            router.take(NEED, exclude=["more"])


async def test_an_idle_worker_always_has_room() -> None:
    """What others reserve of it is no reason to wait: nothing of this gateway would ever end."""
    async with routed(Told(reserved_slots=1000)) as router:
        for _ in range(2):
            lease = taken(router)
            assert router.take(NEED) is None
            lease.release()


async def test_room_that_a_first_round_makes_is_told_at_once() -> None:
    """Not only with the next check, which may be seconds away."""
    told: list[None] = []
    async with routed(Told(), on_room=lambda: told.append(None)) as router:
        lease = taken(router)
        told.clear()
        for slots, times in ((50, 0), (40, 1), (40, 1)):
            cache = CacheStats(50, 50, 0, 0, reserved_slots=slots, digest="")
            lease.answered(WorkerChunk("a", [1], cache))
            assert len(told) == times
        assert router._fleet.statuses()[0].reserved_slots == 40
        lease.release()


async def test_a_worker_may_be_lost_while_the_metrics_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are read in a thread of their own."""
    async with routed(Told(reserved_slots=7)) as router:
        told = router._fleet.loads["told"].info
        for count in range(4):
            reads = itertools.chain([told] * count, itertools.repeat(None))
            with monkeypatch.context() as patch:
                patch.setattr(
                    WorkerLoad, "info", property(lambda _, reads=reads: next(reads)), raising=False
                )
                (status,) = router._fleet.statuses()
            assert status.reserved_slots in (0, 7)


async def test_a_worker_that_failed_is_looked_at_once_and_soon() -> None:
    worker = Told()
    async with routed(worker, health_interval_seconds=60) as router:
        router._fleet.start()
        await until(lambda: worker.checks == 2)
        worker.healthy = False
        lease = taken(router)
        lease.failed()
        lease.release()
        await until(lambda: not router._fleet.statuses()[0].ready)
        await asyncio.sleep(0.3)
        assert worker.checks == 3


async def test_a_worker_that_left_is_closed_after_its_last_request() -> None:
    looks: asyncio.Queue[list[Told]] = asyncio.Queue()

    async def discovered() -> AsyncIterator[Sequence[Any]]:
        while True:
            yield await looks.get()

    worker = Told()
    async with routed(health_interval_seconds=0.02) as router:
        router._fleet.start(discovered())
        looks.put_nowait([worker])
        await until(lambda: worker.checks > 1)
        leases = [taken(router), taken(router)]
        looks.put_nowait([])
        await until(lambda: not router._fleet.statuses())
        for lease in leases:
            await asyncio.sleep(0.01)
            assert not worker.closed
            lease.release()
        await until(lambda: worker.closed)
        checks = worker.checks
        await asyncio.sleep(0.1)
        assert worker.checks == checks


async def test_a_worker_that_left_is_not_closed_in_the_name_of_its_last_request() -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")
    seen: list[str] = []

    class Closing(Told):
        async def close(self) -> None:
            seen.append(name.get())

    async with routed(Closing()) as router:
        lease = taken(router)
        router._fleet._let_go(router._fleet.loads.pop("told"))
        name.set("alice")
        lease.release()
        await until(lambda: seen)
        assert seen == ["nobody"]


async def test_the_client_may_come_back_when_the_first_breaker_lets_it_through() -> None:
    breaker = {"failures": 1, "open_seconds": 20}
    async with routed(Told("one"), Told("two"), breaker=breaker) as router:
        for name in ("one", "two"):
            lease = taken(router, only=name)
            lease.failed()
            lease.release()
        opened = router._fleet.loads["two"].breaker
        assert opened._opened is not None
        opened._opened -= 15
        with pytest.raises(WorkerUnavailable, match="in 5 s") as error:
            router.take(NEED)
        assert error.value.retry_seconds == pytest.approx(5, abs=0.5)


async def test_requests_wait_for_a_trial_and_its_first_output_lets_the_next_through() -> None:
    told: list[None] = []
    breaker = {"failures": 1, "open_seconds": 20, "successes": 2}
    output = WorkerChunk("a", [1])
    async with routed(Told(), on_room=lambda: told.append(None), breaker=breaker) as router:
        lost = taken(router)
        lost.failed()
        lost.release()
        with pytest.raises(WorkerUnavailable, match="every worker failed too often"):
            router.take(NEED)
        opened = router._fleet.loads["told"].breaker
        assert opened._opened is not None
        opened._opened -= 20
        trials = []
        for _ in range(2):
            trials.append(taken(router))
            assert router.take(NEED) is None and router.take(NEED, only="told") is None
            assert len(router.ready()) == 1 and router.has_other(NEED, ())
            told.clear()
            trials[-1].answered(output)
            trials[-1].answered(output)
            assert len(told) == 1
        assert [status.breaker for status in router._fleet.statuses()] == [BreakerState.CLOSED]
        trials += [taken(router), taken(router)]
        for trial in trials:
            trial.release()


async def test_a_trial_that_fails_sends_away_who_waited_for_it() -> None:
    breaker = {"failures": 1, "open_seconds": 20, "successes": 2}
    async with routed(Told(), breaker=breaker) as router:
        for failure in range(2):
            trial = taken(router)
            if failure:
                assert router.take(NEED) is None
            trial.failed()
            trial.release()
            opened = router._fleet.loads["told"].breaker
            with pytest.raises(WorkerUnavailable, match="in 20 s"):
                router.take(NEED)
            assert opened._opened is not None
            opened._opened -= 20


async def test_a_worker_that_is_back_serves_others_beside_a_long_trial(tmp_path: Path) -> None:
    section = {"breaker": {"failures": 2, "open_seconds": 1, "successes": 2}}
    async with run_gateway(tmp_path, worker=section) as running:
        worker, client = running.worker, running.client

        def state() -> BreakerState:
            return running.gateway._fleet.statuses()[0].breaker

        async def cut_off() -> None:
            with pytest.raises(Unavailable):
                await client.generate_once("tell me", max_new_tokens=5)

        worker.faults.cut_after_tokens = 1
        await asyncio.gather(cut_off(), cut_off())
        assert state() is BreakerState.OPEN
        worker.faults.cut_after_tokens = None
        worker.token_seconds = 0.3
        await until(lambda: state() is BreakerState.HALF_OPEN)
        long = asyncio.create_task(client.generate_once("tell me", max_new_tokens=4000))
        await until(lambda: bool(worker.running))
        others = [client.generate_once("tell me", max_new_tokens=1) for _ in range(5)]
        async with asyncio.timeout(5):
            await asyncio.gather(*others)
        assert state() is BreakerState.CLOSED and not long.done()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)


async def test_the_least_reserved_worker_comes_first(tmp_path: Path) -> None:
    async with fleet(tmp_path) as f:
        f.one.token_seconds = f.two.token_seconds = 0.01
        long = {"max_new_tokens": 4000, "budget": 2000, "window": 64}
        stream = f.running.client.generate("tell me", **long)  # type: ignore[arg-type]
        await stream.started()
        for _ in range(4):
            await f.running.client.generate_once("tell me", max_new_tokens=1)
        assert sorted((len(f.one.bodies), len(f.two.bodies))) == [1, 4]
        stream.cancel()


async def test_a_prompt_that_takes_too_long_to_tokenize_goes_to_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep one after the other busy."""
    async with fleet(tmp_path) as f:
        monkeypatch.setattr(worker_http, "SHORT_TIMEOUT", 0.3)
        f.one.faults.tokenizing_seconds = f.two.faults.tokenizing_seconds = 30
        with pytest.raises(Unavailable, match=r"did not tokenize the prompt in 0\.3 s; shorten it"):
            await f.running.client.generate_once("tell me", max_new_tokens=1)
        assert f.one.tokenized + f.two.tokenized == 1


async def test_equal_prefixes_go_to_the_same_worker_while_it_has_room(tmp_path: Path) -> None:
    async with fleet(tmp_path, affinity_tokens=4, max_in_flight=1) as f:
        homes = set()
        for topic in "abcdefgh":
            before = len(f.one.bodies)
            for tail in ("x", "y", "z"):
                await f.running.client.generate_once(f"{topic} 1 2 3 {tail}", max_new_tokens=1)
            at_one = len(f.one.bodies) - before
            assert at_one in (0, 3)
            homes.add(at_one)
        assert homes == {0, 3}
        f.one.token_seconds = f.two.token_seconds = 0.01
        stream = f.running.client.generate("a 1 2 3 x", max_new_tokens=4000)
        await stream.started()
        await until(lambda: f.one.running or f.two.running)
        busy, idle = (f.one, f.two) if f.one.running else (f.two, f.one)
        count = len(idle.bodies)
        await f.running.client.generate_once("a 1 2 3 x", max_new_tokens=1)
        assert len(idle.bodies) == count + 1 and busy.running
        stream.cancel()


@dataclasses.dataclass
class Named(Fleet):
    #: Where the name of the workers leads; empty: there is no DNS.
    addresses: list[str]

    async def move(self) -> None:
        """The name leads to the second worker alone, and the gateway has seen it."""
        self.addresses[:] = ["127.0.0.2"]
        await until(lambda: list(self.states()) == [self.two.url])


@asynccontextmanager
async def named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **worker: Any
) -> AsyncIterator[Named]:
    """Two workers on one port of two loopback addresses; their name leads to the first."""
    addresses = ["127.0.0.1"]

    async def answer(host: str) -> Sequence[str]:
        assert host == "workers.test"
        if not addresses:
            raise socket.gaierror("no DNS")
        return list(addresses)

    monkeypatch.setattr("vase_sgl.gateway.server.resolve", answer)
    async with ScriptedWorker() as one:
        port = int(one.url.rpartition(":")[2])
        async with ScriptedWorker(port, host="127.0.0.2") as two:
            name = {"dns": [f"http://workers.test:{port}"], "dns_interval_seconds": 0.1}
            async with run_gateway(folder, worker={"urls": [], **name, **worker}) as running:
                yield Named(running, one, two, addresses)


async def test_workers_are_found_by_name_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The scripted workers' reserved slots do not follow what runs.
    async with named(tmp_path, monkeypatch, health_interval_seconds=30) as f:
        client = f.running.client
        assert list(f.states()) == [f.one.url]
        f.addresses.append("127.0.0.2")
        await until(lambda: len(f.running.gateway._router.ready()) == 2)
        for _ in range(4):
            await client.generate_once("tell me", max_new_tokens=1)
        assert len(f.one.bodies) == len(f.two.bodies) == 2
        f.one.token_seconds = f.two.token_seconds = 0.01
        streams = [client.generate("a", max_new_tokens=60) for _ in range(2)]
        for stream in streams:
            await stream.started()
        await f.move()
        for stream in streams:  # the one on the worker that is gone runs on
            assert sum([len(c.token_ids) async for c in stream]) == 60
        f.addresses.clear()  # a DNS outage takes nothing away
        await asyncio.sleep(0.3)
        await client.generate_once("tell me", max_new_tokens=1)
        assert (len(f.one.bodies), len(f.two.bodies)) == (3, 4)


async def test_a_worker_that_leaves_tokenizes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with named(tmp_path, monkeypatch) as f:
        f.one.faults.tokenizing_seconds = 1
        answer = asyncio.create_task(f.running.client.generate_once("tell me", max_new_tokens=2))
        await until(lambda: f.one.tokenized)
        await f.move()
        assert len((await answer).token_ids) == 2
        assert len(f.two.bodies) == 1 and not f.two.tokenized


async def test_a_worker_that_leaves_is_told_that_its_last_request_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with named(tmp_path, monkeypatch) as f:
        f.one.token_seconds = 0.05
        stream = f.running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        await f.move()
        stream.cancel()
        await until(lambda: bool(f.one.aborted))


def replays_that_wait(monkeypatch: pytest.MonkeyPatch) -> list[Need]:
    """Filled with what a replay needs whenever its worker has no room for it."""
    found: list[Need] = []
    has_room = ReplayGate._has_room

    def look(gate: ReplayGate[Any], need: Need, info: WorkerInfo) -> bool:
        room = has_room(gate, need, info)
        if not room:
            found.append(need)
        return room

    monkeypatch.setattr(ReplayGate, "_has_room", look)
    return found


@pytest.mark.parametrize("equal", [True, False])
async def test_a_replay_whose_worker_leaves_while_it_waits_goes_to_its_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: bool
) -> None:
    async with named(tmp_path, monkeypatch) as f:
        done = await f.running.client.generate_once("tell me", max_new_tokens=20)
        f.one.available_slots = 0
        f.one.running.add("another gateway's")
        waits = replays_that_wait(monkeypatch)
        verdict = asyncio.create_task(f.running.client.replay(done.request_id).verdict())
        await until(lambda: waits)
        f.two.fingerprint["sglang"] = "0" if equal else "1"
        await f.move()
        if equal:
            assert (await verdict).outcome == "MATCH"
            assert len(f.two.bodies) == 1
        else:
            with pytest.raises(Unavailable, match=f"worker {f.one.url} is gone; try again"):
                await verdict


async def test_a_replay_does_not_wait_for_a_worker_that_left_and_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs what it has to the end, and is given nothing more."""
    async with named(tmp_path, monkeypatch) as f:
        client = f.running.client
        done = await client.generate_once("tell me", max_new_tokens=20)
        f.one.token_seconds = 0.05
        stream = client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        await until(lambda: bool(f.one.running))
        f.one.available_slots = 0
        waits = replays_that_wait(monkeypatch)
        verdict = asyncio.create_task(client.replay(done.request_id).verdict())
        await until(lambda: waits)
        await f.move()
        assert (await asyncio.wait_for(verdict, 10)).outcome == "MATCH"
        assert len(f.two.bodies) == 1 and f.one.running
        stream.cancel()


async def test_a_closed_worker_opens_no_connection_again() -> None:
    async with ScriptedWorker() as one:
        for used in (True, False):
            worker = HttpWorker(one.url, stall_seconds=1)
            if used:
                await worker.info()
            await worker.close()
            with pytest.raises(WorkerUnavailable, match="is gone"):
                await worker.info()
            assert worker._session is None or worker._session.closed


def freeze(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let the gateway's health checks of one worker get no answer."""
    check_health = HttpWorker.check_health

    async def check(worker: HttpWorker) -> None:
        if worker.name == url:
            await asyncio.Event().wait()
        await check_health(worker)

    monkeypatch.setattr(HttpWorker, "check_health", check)


async def test_a_worker_that_hangs_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path, health_interval_seconds=0.1) as f:
        freeze(monkeypatch, f.one.url)
        names = [f.one.url, f.two.url]
        for healthy in (False, True, False):
            f.two.faults.healthy = healthy
            expected = names[: 1 + healthy]
            await until(lambda expected=expected: ready_names(f.running) == expected)


def ready_names(running: Running) -> list[str]:
    return [status.name for status in running.gateway._fleet.statuses() if status.ready]


async def test_a_worker_that_hangs_when_it_is_found_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(host: str) -> Sequence[str]:
        return ["127.0.0.1", "127.0.0.2"]

    monkeypatch.setattr("vase_sgl.gateway.server.resolve", answer)
    async with ScriptedWorker() as one:
        freeze(monkeypatch, one.url)
        port = int(one.url.rpartition(":")[2])
        async with ScriptedWorker(port, host="127.0.0.2") as two:
            section = {"urls": [], "dns": [f"http://workers.test:{port}"]}
            async with run_gateway(tmp_path, worker=section) as running:
                assert ready_names(running) == [two.url]


async def test_readiness_is_told_change_by_change() -> None:
    """Also when a second worker's check brings the next one before the last was told."""
    told: list[str] = []
    going_on = asyncio.Event()

    async def tell(ready: bool) -> None:
        told.append(f"begins: {ready}")
        await going_on.wait()
        told.append(f"ends: {ready}")

    async with ScriptedWorker() as one:
        worker = HttpWorker(one.url, stall_seconds=1)
        watched = Workers([worker], WorkerSection(urls=(one.url,)), on_change=tell)
        first = asyncio.create_task(watched.check_all())
        await until(lambda: told)
        one.faults.healthy = False
        second = asyncio.create_task(watched.check_all())
        await until(lambda: not watched.statuses()[0].ready)
        going_on.set()
        await asyncio.gather(first, second)
        assert told == ["begins: True", "ends: True", "begins: False", "ends: False"]
        await watched.close()


async def test_a_real_name_is_resolved() -> None:
    assert "127.0.0.1" in await resolve("localhost")
    for unknown in ("name.invalid", "a..b"):
        with pytest.raises(OSError):
            await resolve(unknown)


async def test_workers_that_are_replaced_leave_no_gap() -> None:
    """The name leads to the new one at once; that takes a moment to answer for the first time."""
    looks: asyncio.Queue[list[HttpWorker]] = asyncio.Queue()

    async def discovered() -> AsyncIterator[Sequence[HttpWorker]]:
        while True:
            yield await looks.get()

    told: list[bool] = []

    async def tell(ready: bool) -> None:
        told.append(ready)

    async with ScriptedWorker() as one, ScriptedWorker() as two:
        old, new = (HttpWorker(w.url, stall_seconds=1) for w in (one, two))
        check = new.check_health

        async def slow_check() -> None:
            await asyncio.sleep(0.3)
            await check()

        new.check_health = slow_check  # type: ignore[method-assign]
        watched = Workers([], WorkerSection(dns=("http://x:1",)), on_change=tell)
        router = WorkerRouter(watched)
        watched.start(discovered())
        looks.put_nowait([old])
        await until(lambda: told == [True])
        looks.put_nowait([new])
        names = {name.name for name, _ in router.ready()}
        while names != {new.name}:
            names = {name.name for name, _ in router.ready()}  # raises if there is none
            await asyncio.sleep(0.01)
        assert told == [True]
        await watched.close()


async def test_discovery_that_ends_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> AsyncIterator[Sequence[HttpWorker]]:
        yield []
        raise LookupError("a defect")

    async def tell(ready: bool) -> None:
        raise AssertionError("no worker is there")

    watched = Workers([], WorkerSection(dns=("http://x:1",)), on_change=tell)
    watched.start(broken())
    await until(lambda: bool(caplog.records))
    assert "workers are looked up no more" in caplog.text and "a defect" in caplog.text
    await watched.close()


def test_data_parallel_ranks_are_one_worker() -> None:
    state = {
        "fingerprint": {"model": "m"},
        "limits": {"max_budget": 32, "max_window": 8, "max_requests": 2},
        "context_length": 100,
        "slots": {"total": 10, "available": 6, "reserved": 3},
        "running_requests": 1,
        "rounds": 4,
        "evicted_tokens": 5,
        "max_running_requests": 7,
    }
    told = Told(
        max_running_requests=14,
        max_query_requests=4,
        rank_slots=10,
        fingerprint={"model": "m"},
        model_name="m",
        total_slots=20,
        available_slots=12,
        reserved_slots=6,
        running_requests=2,
        rounds=8,
        evicted_tokens=10,
    )
    assert worker_info({"internal_states": [{"vase": state}] * 2}) == told.answer
    reading = {"not_ready": "the weights are being read"}
    with pytest.raises(WorkerUnavailable, match="not ready: the weights"):
        worker_info({"internal_states": [{"vase": state}, {"vase": reading}]})


async def test_a_worker_is_made_once_per_address() -> None:
    made: list[str] = []

    def connect(url: str) -> HttpWorker:
        made.append(url)
        return HttpWorker(url, stall_seconds=1)

    async def answer(host: str) -> Sequence[str]:
        return ["10.0.0.1", "::1"]

    found = discover(["http://x:1"], interval_seconds=0.01, connect=connect, resolve=answer)
    first, second = await anext(found), await anext(found)
    assert [w.name for w in first] == ["http://10.0.0.1:1", "http://[::1]:1"] == made
    assert all(a is b for a, b in zip(first, second, strict=True))
