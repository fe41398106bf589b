"""Replays wait for tenants' traffic: few run at once, and only where a worker has slots to spare.

Tenants take turns, and few replays wait: each of them is a call and holds a record.

SGLang knows priorities within its own queue only with --enable-priority-scheduling. A replay that
does not queue there needs none: it starts when no generation waits, neither at this gateway nor at
its worker, and when the worker could take it and still keep a share of its slots free for the next
generations.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Generic, TypeVar

from vase_sgl.gateway.errors import LimitExceeded, WorkerUnavailable
from vase_sgl.gateway.fair_queue import FairQueue, Place, Releasable
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.workers import WorkerInfo

#: Replays that may wait for a turn: in all, and of one tenant.
MAX_WAITING = 256
MAX_WAITING_PER_TENANT = 64
#: Seconds between looks at a busy worker.
_LOOK_SECONDS = 0.2

T = TypeVar("T", bound=Releasable)


class _Slot:
    """The right to be one of the replays that run."""

    def __init__(self, on_release: Callable[[], None]) -> None:
        self.release = on_release


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A replay in the line, until `left` is closed. Made by `ReplayGate.place`."""

    place: Place[_Slot]
    left: ExitStack


class ReplayGate(Generic[T]):
    """Lets few replays through at once, of each tenant in the order they came."""

    def __init__(self, *, max_concurrent: int, spare_share: float, max_wait_seconds: float) -> None:
        """spare_share: share of a worker's slots that a replay leaves free, unless it is alone."""
        self._line: FairQueue[_Slot] = FairQueue(
            max_waiting=MAX_WAITING,
            max_waiting_per_tenant=MAX_WAITING_PER_TENANT,
            max_wait_seconds=max_wait_seconds,
        )
        self._free = self._max_concurrent = max_concurrent
        self._spare_share = spare_share
        self._max_wait = max_wait_seconds

    @contextmanager
    def place(self, tenant: str) -> Iterator[Waiting]:
        """A place in the line for one replay. Raises `LimitExceeded` if too many wait."""
        with ExitStack() as left:
            try:
                place = left.enter_context(self._line.place(tenant))
            except LimitExceeded as error:
                raise _of_replays(error) from error
            yield Waiting(place, left)

    @asynccontextmanager
    async def turn(
        self,
        waiting: Waiting,
        need: Need,
        look: Callable[[], Awaitable[WorkerInfo]],
        take: Callable[[], T | None],
    ) -> AsyncIterator[T]:
        """What `take` returned, for the time that the replay runs; it is released afterwards.

        look: tells the state of the worker now, with all that is known to be on its way there.
        take: a lease on it, or None while generations come first.
        Raises `WorkerUnavailable` if the turn does not come in time, `LimitExceeded` if it makes
        room for another tenant's, and what the two raise.
        """
        deadline = time.monotonic() + self._max_wait
        try:
            slot = await waiting.place.wait(self._take_slot)
        except LimitExceeded as error:
            if error.reason != "queue_time":
                raise _of_replays(error) from error
            raise WorkerUnavailable(
                f"{self._max_concurrent} replays are running and others wait; try again later, or "
                "raise replay.max_concurrent"
            ) from error
        waiting.left.close()
        try:
            lease = await self._wait(need, look, take, deadline)
            try:
                yield lease
            finally:
                lease.release()
        finally:
            slot.release()

    def _take_slot(self) -> _Slot | None:
        if not self._free:
            return None
        self._free -= 1
        return _Slot(self._free_slot)

    def _free_slot(self) -> None:
        self._free += 1
        self._line.dispatch()

    async def _wait(
        self,
        need: Need,
        look: Callable[[], Awaitable[WorkerInfo]],
        take: Callable[[], T | None],
        deadline: float,
    ) -> T:
        while True:
            if self._has_room(need, await look()) and (lease := take()) is not None:
                return lease
            if time.monotonic() >= deadline:
                raise WorkerUnavailable(
                    "the worker is busy with generations, for which replays make way; try "
                    "again later, or lower replay.spare_share"
                )
            await asyncio.sleep(_LOOK_SECONDS)

    def _has_room(self, need: Need, info: WorkerInfo) -> bool:
        if info.waiting_requests:
            return False
        if info.running_requests == 0:
            return True
        if info.running_requests >= (info.max_running_requests or math.inf):
            return False
        readers = info.query_requests
        if readers is None:  # at most all
            readers = info.running_requests
        if need.reads_queries and readers >= (info.max_query_requests or math.inf):
            return False
        left = info.unreserved_slots - need.slots_at_most(info)
        return left >= self._spare_share * info.total_slots


def _of_replays(error: LimitExceeded) -> LimitExceeded:
    assert error.retry_seconds is not None
    return LimitExceeded(
        f"replays: {error}", reason=error.reason, retry_seconds=error.retry_seconds
    )
