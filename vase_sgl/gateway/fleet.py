"""The workers there are: found, watched, and let go of when they leave."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from vase_sgl.gateway.breaker import BreakerState
from vase_sgl.gateway.config import WorkerSection
from vase_sgl.gateway.errors import GatewayError, LimitExceeded
from vase_sgl.gateway.leases import WorkerLoad
from vase_sgl.gateway.workers import Worker

logger = logging.getLogger(__name__)

#: Seconds between a request that failed and the extra look at its worker.
_RECHECK_SECONDS = 0.1
#: Seconds that workers which leave are kept for those that come. SGLang's health takes over one.
_FIRST_CHECK_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class WorkerStatus:
    """A worker for metrics."""

    name: str
    ready: bool
    breaker: BreakerState
    in_flight: int
    reserved_slots: int


class Fleet:
    """The workers, each with its load, by name. They may come and go while it runs.

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
        self.loads: dict[str, WorkerLoad] = {}
        self._watches: dict[WorkerLoad, asyncio.Task[None]] = {}
        #: Those that left, and what closes them after their last request.
        self._leaving: dict[WorkerLoad, asyncio.Task[None]] = {}
        self._discovery: asyncio.Task[None] | None = None
        self._was_ready = False
        self._reporting = asyncio.Lock()
        for worker in workers:
            self._add(worker)

    def start(self, discovered: AsyncIterator[Sequence[Worker]] | None = None) -> None:
        """Begin to watch; `discovered` yields the remote workers there are, again and again."""
        for load in self.loads.values():
            self._watch(load)
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
        for load in self._leaving:
            load.idle.set()  # nobody waits for what they still run
        for load in (*self.loads.values(), *self._leaving):
            load.state.close()
        closing = [load.worker.close() for load in self.loads.values()]
        await asyncio.gather(*closing, *self._leaving.values())

    def statuses(self) -> list[WorkerStatus]:
        """Every worker, for metrics."""
        return [
            WorkerStatus(
                load.worker.name,
                load.info is not None,
                load.breaker.state,
                load.in_flight,
                load.reserved,
            )
            for load in tuple(self.loads.values())  # may be called from another thread
        ]

    async def check_all(self) -> None:
        """Probe every worker once and report a change of readiness."""
        await asyncio.gather(*(self._check(load) for load in list(self.loads.values())))
        await self._report()

    async def _report(self) -> None:
        async with self._reporting:  # one after the other, so that what is told last is true
            ready = any(load.info is not None for load in self.loads.values())
            if ready != self._was_ready:
                self._was_ready = ready
                await self._on_change(ready)
        self._on_room()

    def _add(self, worker: Worker) -> WorkerLoad:
        load = self.loads[worker.name] = WorkerLoad(worker, self._settings, self._on_room)
        return load

    async def _follow(self, discovered: AsyncIterator[Sequence[Worker]]) -> None:
        """Take in new workers and let go of those that are gone; their requests run on."""
        fixed = set(self.loads)
        async for workers in discovered:
            names = {worker.name for worker in workers}
            found = []
            for worker in workers:
                if worker.name not in self.loads:
                    logger.info("worker %s was found", worker.name)
                    found.append(self._add(worker))
                    self._watch(found[-1])
            gone = self.loads.keys() - names - fixed
            if gone:
                await self._first_checks(found, [self.loads[n] for n in names | fixed])
            for name in gone:
                logger.info("worker %s is gone from its name", name)
                async with self._reporting:  # its watch may be about to tell of a change
                    load = self.loads.pop(name)
                    self._watches.pop(load).cancel()
                self._let_go(load)
            await self._report()

    async def _first_checks(self, found: list[WorkerLoad], staying: list[WorkerLoad]) -> None:
        """Wait for them, if workers leave and none of those that stay is ready.

        Of two workers that are replaced in turn, the one that leaves still answers while the other
        is asked for the first time. Without either, all that waits would be refused.
        """
        if found and not any(load.info for load in staying):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_CHECK_SECONDS):
                    await asyncio.gather(*(load.checked.wait() for load in found))

    def _let_go(self, load: WorkerLoad) -> None:
        """Close a worker that left once it is idle; not in the name of its last request."""

        async def close() -> None:
            await load.idle.wait()
            await load.worker.close()

        task = self._leaving[load] = asyncio.create_task(close())
        task.add_done_callback(lambda _: self._leaving.pop(load))

    async def _check(self, load: WorkerLoad) -> None:
        worker = load.worker
        try:
            await worker.check_health()
            info = await load.state.now()
        except LimitExceeded as error:  # of this gateway
            logger.warning("worker %s was not checked: %s", worker.name, error)
        except GatewayError as error:
            if load.info is not None:
                logger.error("worker %s is lost: %s", worker.name, error)
            elif str(error) != load.failure:
                logger.warning("worker %s is not ready: %s", worker.name, error)
            load.found_lost(str(error))
        else:
            if load.info is None:
                logger.info("worker %s is ready", worker.name)
            load.found_ready(info)
        finally:
            load.checked.set()

    def _watch(self, load: WorkerLoad) -> None:
        """Begin to watch one worker. Each has a watch of its own: one that hangs holds up none."""
        self._watches[load] = asyncio.create_task(
            self._watch_forever(load), name=f"vase-worker-health {load.worker.name}"
        )

    async def _watch_forever(self, load: WorkerLoad) -> None:
        while True:
            try:
                await self._check(load)
                await self._report()
            except Exception:
                # A defect in one probe must not end the watch: health would freeze unnoticed.
                logger.exception("health check failed")
            load.suspect.clear()
            try:
                async with asyncio.timeout(self._settings.health_interval_seconds):
                    await load.suspect.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_RECHECK_SECONDS)


def _report_defect(discovery: asyncio.Task[None]) -> None:
    """Nobody waits for discovery, and one that ended finds no worker any more."""
    if not discovery.cancelled() and (error := discovery.exception()) is not None:
        logger.critical("workers are looked up no more", exc_info=error)
