"""What this gateway gives each worker: leases, and claims of requests that wait for one.

Room: a worker has fewer requests of this gateway in flight than it may, its KV slots suffice for
one more, and so do its query rings if the policy reads queries; an idle worker always has room.

A request that finds no room for long while others do may keep one worker from them: `Claim.keep`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable

from vase_sgl.gateway.breaker import CircuitBreaker
from vase_sgl.gateway.config import WorkerSection
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.refusals import Refusals
from vase_sgl.gateway.shared_state import SharedState
from vase_sgl.gateway.workers import Worker, WorkerChunk, WorkerInfo

#: Requests in flight for a worker that does not report its own maximum.
DEFAULT_IN_FLIGHT = 64

#: Numbers leases and claims in the order they came, at whichever worker.
_arrivals = itertools.count()


class WorkerLoad:
    """One worker, its state and what it has of this gateway. Slots are in tokens.

    Its leases change what it has; the fleet's checks change its state.
    """

    def __init__(
        self, worker: Worker, settings: WorkerSection, on_room: Callable[[], None]
    ) -> None:
        """`on_room()` is called whenever the worker may have got room."""
        self.worker = worker
        self.state = SharedState(worker)
        self.breaker = CircuitBreaker(settings.breaker)
        #: As at the last check. None: it is not ready.
        self.info: WorkerInfo | None = None
        self.failure = f"worker {worker.name} has not answered yet"
        #: Set: its first check has ended.
        self.checked = asyncio.Event()
        #: In the order they came; none has a value.
        self.leases: dict[Lease, None] = {}
        #: Slots of these leases, and how many are of requests whose policy reads queries. Not
        #: summed when asked: each choice of a worker asks for each.
        self.slots = self.query_readers = 0
        #: The only request that gets a lease.
        self.kept_for: Claim | None = None
        #: Set: a request failed, so look at the worker without waiting for the next check.
        self.suspect = asyncio.Event()
        #: Set: no lease is left.
        self.idle = asyncio.Event()
        self.idle.set()
        self.on_room = on_room
        self._max_in_flight = settings.max_in_flight
        self._slots_at_check = 0

    def found_ready(self, info: WorkerInfo) -> None:
        """A check has found the worker ready."""
        self.info, self._slots_at_check = info, self.slots

    def found_lost(self, failure: str) -> None:
        """A check has found it not ready."""
        self.info, self.failure = None, failure

    @property
    def in_flight(self) -> int:
        """Requests of this gateway that it has."""
        return len(self.leases)

    @property
    def reserved(self) -> int:
        """Reserved slots: as reported, corrected by what this gateway did since. Not ready: 0."""
        info = self.info  # which the metrics' thread may see change
        if info is None:
            return 0
        return max(info.reserved_slots + self.slots - self._slots_at_check, self.slots)

    def with_leases(self, told: WorkerInfo) -> WorkerInfo:
        """What the worker told just now, and what it has of this gateway, known to it or not."""
        return dataclasses.replace(
            told,
            reserved_slots=max(told.reserved_slots, self.reserved),
            running_requests=max(told.running_requests, self.in_flight),
            query_requests=(
                None
                if told.query_requests is None
                else max(told.query_requests, self.query_readers)
            ),
        )

    def has_room(self, need: Need, *, without_leases_from: int | None = None) -> bool:
        """Whether one more request with that need may be sent.

        without_leases_from: as if leases from this number on were over.
        """
        assert self.info is not None
        over: list[Lease] = []
        if without_leases_from is not None:
            for lease in reversed(self.leases):
                if lease.number < without_leases_from:
                    break
                over.append(lease)
        in_flight = self.in_flight - len(over)
        if in_flight == 0:
            return True
        if in_flight >= (
            self._max_in_flight or self.info.max_running_requests or DEFAULT_IN_FLIGHT
        ):
            return False
        if need.reads_queries and self.info.max_query_requests:
            readers = self.query_readers - sum(lease.need.reads_queries for lease in over)
            if readers >= self.info.max_query_requests:
                return False
        return self.missing_slots(need) <= sum(lease.frees for lease in over)

    def missing_slots(self, need: Need) -> int:
        """How many more slots would have to be free for that need; below zero: fewer would do."""
        assert self.info is not None
        return self.reserved + need.slots(self.info) - self.info.total_slots


class Lease:
    """The right to run one request on the worker of `load`, which has it until `release`."""

    def __init__(self, load: WorkerLoad, need: Need) -> None:
        """Enters `load`, whose worker is ready, and its breaker."""
        assert load.info is not None
        self._load: WorkerLoad | None = load
        self._outcome: bool | None = None
        self._output = 0
        self.need = need
        self.info = load.info
        self.slots = need.slots(load.info)
        self.worker = load.worker
        self.number = next(_arrivals)
        load.leases[self] = None
        load.slots += self.slots
        load.query_readers += need.reads_queries
        load.idle.clear()
        self._trial = load.breaker.enter()

    def answered(self, chunk: WorkerChunk) -> None:
        """The worker has sent output: it works, and says what it still reserves.

        From the first round on that is less, and the breaker may let the next one through, so
        others may find room.
        """
        load = self._load
        if load is None:
            return
        room = False
        if self._outcome is None:
            self._outcome = True
            load.breaker.answered(self._trial)
            room = self._trial is not None
        self._output = len(chunk.token_ids)
        if self.need.eviction is not None and chunk.cache is not None:
            fewer = self.slots - chunk.cache.reserved_slots
            self.slots -= fewer
            load.slots -= fewer
            room = room or fewer > 0
        if room:
            load.on_room()

    @property
    def frees(self) -> int:
        """Slots that the worker no longer counts as reserved when this request is over."""
        return self.slots + (self._output if self.need.eviction is None else 0)

    def failed(self) -> None:
        """The worker was lost or gave an answer that makes no sense."""
        self._outcome = False

    def release(self) -> None:
        """The request is over. Further calls do nothing."""
        load, self._load = self._load, None
        if load is None:
            return
        del load.leases[self]
        load.slots -= self.slots
        load.query_readers -= self.need.reads_queries
        load.breaker.leave(self._trial, self._outcome)
        if self._outcome is False:
            load.suspect.set()
        if not load.leases:
            load.idle.set()
        load.on_room()


class Claim:
    """One request's way to a lease. It keeps at most one worker from others, until `end`."""

    def __init__(
        self,
        need: Need,
        take: Callable[[Claim], Lease | None],
        able: Callable[[], list[WorkerLoad]],
        refusals: Refusals,
        *,
        anywhere: bool,
    ) -> None:
        """`take` gives this claim a lease, `able` the workers that could; see `WorkerRouter`.

        refusals: of all claims, and true of this one if it may go `anywhere`.
        """
        self._need = need
        self._take = take
        self._able = able
        self._refusals = refusals
        self._anywhere = anywhere
        #: Leases from this number on were taken after this request had found no room.
        self._overtaken_from: int | None = None
        self._kept: WorkerLoad | None = None

    def take(self) -> Lease | None:
        """A lease, on the worker that is kept too; None while none that could serve has room.

        Raises `WorkerUnavailable` if no worker could serve, however long one waits.
        """
        lease = None
        if not self._covered("room"):
            lease = self._take(self)
            if lease is None:
                self._refused("room")
        if lease is not None:
            self._drop()
        elif self._overtaken_from is None:
            self._overtaken_from = next(_arrivals)
        return lease

    def keep(self) -> None:
        """Keep a worker from others, so that this request gets room there; after a `take` in vain.

        One that would have room if this request had not been overtaken: there waiting helps, as
        soon as those are done that overtook it. Of several the one where least is missing. If
        there is none, none is kept.
        """
        assert self._overtaken_from is not None
        since = self._overtaken_from
        if self._covered("help", since):
            return
        able = self._able()
        if self._kept in able and self._helps(self._kept):
            return
        helpful = [load for load in able if load.kept_for in (None, self) and self._helps(load)]
        self._drop()
        if helpful:
            self._kept = min(
                helpful,
                # One that is being tried has no room until the trial has output, if ever.
                key=lambda load: (not load.breaker.allows, load.missing_slots(self._need)),
            )
            self._kept.kept_for = self
        else:
            self._refused("help", since)

    def end(self) -> None:
        """Keep nothing any more; others may find room."""
        kept = self._drop()
        if kept is not None:
            kept.on_room()

    def _helps(self, load: WorkerLoad) -> bool:
        return load.has_room(self._need, without_leases_from=self._overtaken_from)

    def _covered(self, question: str, since: int = 0) -> bool:
        """Whether one that needs as much or less was refused, and this has no worker of its own."""
        return (
            self._anywhere
            and self._kept is None
            and self._refusals.cover(question, self._need, since)
        )

    def _refused(self, question: str, since: int = 0) -> None:
        if self._anywhere:
            self._refusals.add(question, self._need, since)

    def _drop(self) -> WorkerLoad | None:
        """The worker that was kept."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.kept_for = None
            self._refusals.forget()
        return kept
