"""Which worker gets a request: health, breaker, room, load and prefix affinity.

Room: a worker has fewer requests of this gateway in flight than it may, its KV slots suffice for
one more, and so do its query rings if the policy reads queries; an idle worker always has room. A
worker whose breaker is half-open has none while a request tries it.
Among those with room the one with the smallest share of reserved slots wins; among equals the one
with fewer requests in flight; then they take turns. With affinity the worker that the prompt's
first tokens hash to (rendezvous hashing: when a worker comes or goes, only its own prompts move)
goes first.

A request that finds no room for long while others do may keep one worker from them: `Claim.keep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import hashlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence

from vase_sgl.gateway.breaker import BreakerState, CircuitBreaker
from vase_sgl.gateway.config import WorkerSection
from vase_sgl.gateway.errors import GatewayError, WorkerUnavailable
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.workers import Worker, WorkerChunk, WorkerInfo

logger = logging.getLogger(__name__)

#: Requests in flight for a worker that does not report its own maximum.
DEFAULT_IN_FLIGHT = 64


class Lease:
    """The right to run one request on `worker`. Ends with `release`."""

    def __init__(self, router: WorkerRouter, entry: _Entry, info: WorkerInfo, need: Need) -> None:
        self._router = router
        self._entry: _Entry | None = entry
        self._outcome: bool | None = None
        self._output = 0
        self.need = need
        self.slots = need.slots(info)
        #: Of all leases in the order they were taken.
        self.number = next(router._lease_numbers)
        self.worker = entry.worker
        self.info = info
        entry.leases.add(self)
        entry.in_flight += 1
        entry.query_readers += need.reads_queries
        entry.slots += self.slots
        self._trial = entry.breaker.enter()

    def answered(self, chunk: WorkerChunk) -> None:
        """The worker has sent output: it works, and says what it still reserves.

        From the first round on that is less, and the breaker may let the next one through, so
        others may find room.
        """
        entry = self._entry
        if entry is None:
            return
        room = False
        if self._outcome is None:
            self._outcome = True
            entry.breaker.answered(self._trial)
            room = self._trial is not None
        self._output = len(chunk.token_ids)
        if self.need.eviction is not None and chunk.cache is not None:
            fewer = self.slots - chunk.cache.reserved_slots
            self.slots -= fewer
            entry.slots -= fewer
            room = room or fewer > 0
        if room:
            self._router._on_room()

    @property
    def frees(self) -> int:
        """Slots that the worker no longer counts as reserved when this request is over."""
        return self.slots + (self._output if self.need.eviction is None else 0)

    def failed(self) -> None:
        """The worker was lost or gave an answer that makes no sense."""
        self._outcome = False

    def release(self) -> None:
        """The request is over. Further calls do nothing."""
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.leases.discard(self)
            entry.in_flight -= 1
            entry.query_readers -= self.need.reads_queries
            entry.slots -= self.slots
            entry.breaker.leave(self._trial, self._outcome)
            self._router._released(entry, failed=self._outcome is False)


class Claim:
    """One request's way to a lease. Made by `WorkerRouter.claim`."""

    def __init__(self, router: WorkerRouter, need: Need, exclude: Collection[str]) -> None:
        self._router = router
        self._need = need
        self._exclude = exclude
        #: Leases from this number on were taken after this request had found no room.
        self._overtaken_from: int | None = None
        self._kept: _Entry | None = None

    def take(self) -> Lease | None:
        """As `WorkerRouter.take`; takes what is kept too."""
        lease = self._router.take(self._need, exclude=self._exclude, claim=self)
        if lease is not None:
            self.drop()
        elif self._overtaken_from is None:
            self._overtaken_from = next(self._router._lease_numbers)
        return lease

    def keep(self) -> None:
        """Keep a worker from others, so that this request gets room there; after a `take` in vain.

        One that would have room if this request had not been overtaken: there waiting helps, as
        soon as those are done that overtook it. Of several the one where least is missing. If
        there is none, none is kept.
        """
        able = [
            entry
            for entry in self._router._able(self._need, self._exclude)
            if entry.kept_for in (None, self)
            and entry.has_room(
                self._need,
                self._router._settings.max_in_flight,
                without_leases_from=self._overtaken_from,
            )
        ]
        if self._kept not in able:
            self.drop()
            if able:
                self._kept = min(
                    able,
                    # One that is being tried has no room until the trial has output, if ever.
                    key=lambda entry: (not entry.breaker.allows, entry.missing_slots(self._need)),
                )
                self._kept.kept_for = self

    def drop(self) -> bool:
        """Keep nothing any more; whether anything was kept."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.kept_for = None
        return kept is not None


class _Entry:
    """One worker as the router sees it. Slots are in tokens."""

    def __init__(self, worker: Worker, breaker: CircuitBreaker) -> None:
        self.worker = worker
        self.breaker = breaker
        self.info: WorkerInfo | None = None
        self.failure = f"worker {worker.name} has not answered yet"
        self.in_flight = 0
        #: Of these, requests whose policy reads queries.
        self.query_readers = 0
        self.leases: set[Lease] = set()
        #: The only request that gets a lease.
        self.kept_for: Claim | None = None
        #: Slots of the requests this gateway has in flight, now and at the last check.
        self.slots = 0
        self.slots_at_check = 0
        #: Set: its first check has ended.
        self.checked = asyncio.Event()
        #: Set: look at the worker without waiting for the next check.
        self.look_again = asyncio.Event()

    @property
    def reserved(self) -> int:
        """Reserved slots: as reported, corrected by what this gateway did since."""
        assert self.info is not None
        return max(self.info.reserved_slots + self.slots - self.slots_at_check, self.slots)

    def has_room(
        self, need: Need, max_in_flight: int | None, *, without_leases_from: int | None = None
    ) -> bool:
        """Whether one more request with that need may be sent.

        without_leases_from: as if leases from this number on were over.
        """
        assert self.info is not None
        over: list[Lease] = []
        if without_leases_from is not None:
            over = [lease for lease in self.leases if lease.number >= without_leases_from]
        in_flight = self.in_flight - len(over)
        if in_flight == 0:
            return True
        most = max_in_flight or self.info.max_running_requests or DEFAULT_IN_FLIGHT
        readers = self.query_readers - sum(lease.need.reads_queries for lease in over)
        max_readers = self.info.max_query_requests
        return (
            in_flight < most
            and not (need.reads_queries and max_readers and readers >= max_readers)
            and self.missing_slots(need) <= sum(lease.frees for lease in over)
        )

    def missing_slots(self, need: Need) -> int:
        """How many more slots would have to be free for that need; below zero: fewer would do."""
        assert self.info is not None
        return self.reserved + need.slots(self.info) - self.info.total_slots


@dataclasses.dataclass(frozen=True)
class WorkerStatus:
    """A worker for metrics."""

    name: str
    ready: bool
    breaker: BreakerState
    in_flight: int
    reserved_slots: int


class WorkerRouter:
    """Hands out workers and watches their health. The set of workers may change while it runs.

    `on_change(ready)` is awaited whenever the answer to "is any worker ready?" changes; `on_room()`
    is called whenever a worker may have got room.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        settings: WorkerSection,
        *,
        on_change: Callable[[bool], Awaitable[None]],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._on_change = on_change
        self._on_room = on_room
        self._entries: dict[str, _Entry] = {}
        self._leaving: set[_Entry] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._was_ready = False
        #: Whose turn it is to be asked, and to be leased.
        self._turn, self._lease_turn = itertools.count(), itertools.count()
        self._lease_numbers = itertools.count()
        self._reporting = asyncio.Lock()
        self._watches: dict[_Entry, asyncio.Task[None]] = {}
        self._discovery: asyncio.Task[None] | None = None
        for worker in workers:
            self._add(worker)

    def start(self, discovered: AsyncIterator[Sequence[Worker]] | None = None) -> None:
        """Begin to watch; `discovered` yields the remote workers there are, again and again."""
        for entry in self._entries.values():
            self._watch(entry)
        if discovered is not None:
            self._discovery = asyncio.create_task(self._follow(discovered), name="vase-discovery")
            self._discovery.add_done_callback(_report_defect)

    async def close(self) -> None:
        """Stop watching and close every worker."""
        if self._discovery is not None:  # first: it begins watches
            self._discovery.cancel()
            await asyncio.gather(self._discovery, return_exceptions=True)
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        entries = (*self._entries.values(), *self._leaving)
        await asyncio.gather(*(entry.worker.close() for entry in entries), *self._closing)

    def take(
        self,
        need: Need,
        *,
        exclude: Collection[str] = (),
        only: str | None = None,
        claim: Claim | None = None,
    ) -> Lease | None:
        """A lease on a worker, or None while none that could serve has room.

        claim: whose request it is; workers that are kept for others have no room for it.
        Raises `WorkerUnavailable` if no worker could serve, however long one waits.
        """
        able = [entry for entry in self._able(need, exclude, only) if entry.breaker.allows]
        for entry in self._order(able, need.prompt_token_ids):
            if entry.kept_for in (None, claim) and entry.has_room(
                need, self._settings.max_in_flight
            ):
                assert entry.info is not None
                return Lease(self, entry, entry.info, need)
        return None

    @contextlib.contextmanager
    def claim(self, need: Need, *, exclude: Collection[str] = ()) -> Iterator[Claim]:
        """A claim to a worker outside `exclude`. After the body nothing is kept for it."""
        claim = Claim(self, need, exclude)
        try:
            yield claim
        finally:
            if claim.drop():
                self._on_room()

    def _able(self, need: Need, exclude: Collection[str], only: str | None = None) -> list[_Entry]:
        """Those that could serve. Raises `WorkerUnavailable` if there is none."""
        possible = [
            entry
            for entry in self._available()
            if entry.worker.name not in exclude and only in (None, entry.worker.name)
        ]
        if only is not None and not possible:
            raise WorkerUnavailable(f"worker {only} is no longer ready; try again later")
        if not possible:
            raise WorkerUnavailable("no other worker is ready; try again later", retry_seconds=1.0)
        able = [entry for entry in possible if entry.info and need.fits(entry.info)]
        if not any(entry.info and need.is_for(entry.info) for entry in possible):
            raise WorkerUnavailable(
                "no other worker with the model that the request was tokenized for is ready; try "
                "again",
                retry_seconds=1.0,
            )
        if not able:
            raise WorkerUnavailable(
                "the workers that are ready allow less than this request needs; try again later, "
                "or give all workers the same flags"
            )
        return able

    def ready(self) -> list[tuple[Worker, WorkerInfo]]:
        """Every worker that takes requests, the next in turn first.

        The states are those of the last health check; lengths, limits and fingerprint hold.
        Raises `WorkerUnavailable` if there is none.
        """
        entries = self._available()
        first = next(self._turn) % len(entries)
        return [(e.worker, e.info) for e in entries[first:] + entries[:first] if e.info]

    def has_other(self, need: Need, exclude: Collection[str]) -> bool:
        """Whether a worker outside `exclude` could serve."""
        try:
            return bool(self._able(need, exclude))
        except WorkerUnavailable:
            return False

    async def current(self) -> list[tuple[Worker, WorkerInfo]]:
        """As `ready`, but with states fetched now; a worker that does not answer is left out."""
        ready = self.ready()
        infos = await asyncio.gather(
            *(worker.info() for worker, _ in ready), return_exceptions=True
        )
        current: list[tuple[Worker, WorkerInfo]] = []
        for (worker, _), info in zip(ready, infos, strict=True):
            if isinstance(info, WorkerInfo):
                current.append((worker, info))
            elif not isinstance(info, GatewayError):
                raise info
        if not current:
            raise WorkerUnavailable("no worker answers; try again later")
        return current

    def statuses(self) -> list[WorkerStatus]:
        """Every worker, for metrics."""
        return [
            WorkerStatus(
                entry.worker.name,
                entry.info is not None,
                entry.breaker.state,
                entry.in_flight,
                entry.reserved if entry.info else 0,
            )
            for entry in tuple(self._entries.values())  # may be called from another thread
        ]

    async def check_all(self) -> None:
        """Probe every worker once and report a change of readiness."""
        await asyncio.gather(*(self._check(entry) for entry in list(self._entries.values())))
        await self._report()

    async def _report(self) -> None:
        async with self._reporting:  # one after the other, so that what is told last is true
            ready = any(entry.info is not None for entry in self._entries.values())
            if ready != self._was_ready:
                self._was_ready = ready
                await self._on_change(ready)
        self._on_room()

    def _available(self) -> list[_Entry]:
        ready = [entry for entry in self._entries.values() if entry.info is not None]
        if not ready:
            reasons = "; ".join(entry.failure for entry in self._entries.values())
            raise WorkerUnavailable(
                f"no worker is ready: {reasons or 'none was found yet; try again later'}",
                retry_seconds=1.0,
            )
        # One whose breaker is half-open while another request tries it is worth waiting for.
        tried = [entry for entry in ready if entry.breaker.state is not BreakerState.OPEN]
        if not tried:
            seconds = max(min(entry.breaker.open_seconds for entry in ready), 1.0)
            raise WorkerUnavailable(
                "every worker failed too often lately and is left alone for a while; come back "
                f"in {seconds:.0f} s",
                retry_seconds=seconds,
            )
        return tried

    def _order(self, entries: list[_Entry], prompt: tuple[int, ...]) -> list[_Entry]:
        turn = next(self._lease_turn) % max(len(entries), 1)
        rotated = entries[turn:] + entries[:turn]
        ordered = sorted(rotated, key=_load)  # stable: equals keep their turn
        width = self._settings.affinity_tokens
        if entries and width and len(prompt) >= width:
            prefix = b"".join(token.to_bytes(4, "little") for token in prompt[:width])
            own = max(entries, key=lambda entry: _weight(prefix, entry))
            ordered.sort(key=lambda entry: entry is not own)
        return ordered

    def _add(self, worker: Worker) -> None:
        self._entries[worker.name] = _Entry(worker, CircuitBreaker(self._settings.breaker))

    def _released(self, entry: _Entry, *, failed: bool) -> None:
        if failed:
            entry.look_again.set()
        if entry in self._leaving and entry.in_flight == 0:
            self._dismiss(entry)
        self._on_room()

    def _dismiss(self, entry: _Entry) -> None:
        self._leaving.discard(entry)
        # Not in the context of the request that happens to be its last.
        task = asyncio.create_task(entry.worker.close(), context=contextvars.Context())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _follow(self, discovered: AsyncIterator[Sequence[Worker]]) -> None:
        """Take in new workers and let go of those that are gone; their requests run on."""
        fixed = set(self._entries)
        async for workers in discovered:
            names = {worker.name for worker in workers}
            found = []
            for worker in workers:
                if worker.name not in self._entries:
                    logger.info("worker %s was found", worker.name)
                    self._add(worker)
                    found.append(self._entries[worker.name])
                    self._watch(found[-1])
            gone = self._entries.keys() - names - fixed
            if gone:
                await self._first_checks(found, [self._entries[n] for n in names | fixed])
            for name in gone:
                logger.info("worker %s is gone from its name", name)
                async with self._reporting:  # its watch may be about to tell of a change
                    entry = self._entries.pop(name)
                    self._watches.pop(entry).cancel()
                self._leaving.add(entry)
                if entry.in_flight == 0:
                    self._dismiss(entry)
            await self._report()

    async def _first_checks(self, found: list[_Entry], staying: list[_Entry]) -> None:
        """Wait for them, if workers leave and none of those that stay is ready.

        Of two workers that are replaced in turn, the one that leaves still answers while the other
        is asked for the first time. Without either, all that waits would be refused.
        """
        if found and not any(entry.info for entry in staying):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_CHECK_SECONDS):
                    await asyncio.gather(*(entry.checked.wait() for entry in found))

    async def _check(self, entry: _Entry) -> None:
        worker = entry.worker
        try:
            await worker.check_health()
            info = await worker.info()
        except GatewayError as error:
            if entry.info is not None:
                logger.error("worker %s is lost: %s", worker.name, error)
            elif str(error) != entry.failure:
                logger.warning("worker %s is not ready: %s", worker.name, error)
            entry.info, entry.failure = None, str(error)
        else:
            if entry.info is None:
                logger.info("worker %s is ready", worker.name)
            entry.info, entry.slots_at_check = info, entry.slots
        finally:
            entry.checked.set()

    def _watch(self, entry: _Entry) -> None:
        """Begin to watch one worker. Each has a watch of its own: one that hangs holds up none."""
        self._watches[entry] = asyncio.create_task(
            self._watch_forever(entry), name=f"vase-worker-health {entry.worker.name}"
        )

    async def _watch_forever(self, entry: _Entry) -> None:
        while True:
            try:
                await self._check(entry)
                await self._report()
            except Exception:
                # A defect in one probe must not end the watch: health would freeze unnoticed.
                logger.exception("health check failed")
            entry.look_again.clear()
            try:
                async with asyncio.timeout(self._settings.health_interval_seconds):
                    await entry.look_again.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_RECHECK_SECONDS)


#: Seconds between a request that failed and the extra look at its worker.
_RECHECK_SECONDS = 0.1
#: Seconds that workers which leave are kept for those that come. SGLang's health takes over one.
_FIRST_CHECK_SECONDS = 5.0


def _report_defect(discovery: asyncio.Task[None]) -> None:
    """Nobody waits for discovery, and one that ended finds no worker any more."""
    if not discovery.cancelled() and (error := discovery.exception()) is not None:
        logger.critical("workers are looked up no more", exc_info=error)


def _load(entry: _Entry) -> tuple[float, int]:
    """The reserved share of a worker's slots, then requests of this gateway."""
    assert entry.info is not None
    return entry.reserved / max(entry.info.total_slots, 1), entry.in_flight


def _weight(prefix: bytes, entry: _Entry) -> bytes:
    """Rendezvous weight: the worker with the greatest one is the prefix's own."""
    return hashlib.blake2b(prefix + entry.worker.name.encode(), digest_size=8).digest()
