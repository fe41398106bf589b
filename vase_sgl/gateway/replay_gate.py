"""Replays wait for tenants' traffic: few run at once, and only where a worker has slots to spare.

SGLang knows priorities within its own queue only with --enable-priority-scheduling. A replay that
never queues there needs none: it starts when no generation waits at this gateway, and when its
worker could take it and still keep a share of its slots free for the next generations.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.fair_queue import Releasable
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.workers import WorkerInfo

#: Seconds between looks at a busy worker.
_LOOK_SECONDS = 0.2

T = TypeVar("T", bound=Releasable)


class ReplayGate(Generic[T]):
    """Lets replays through one by one, in the order they came."""

    def __init__(self, *, max_concurrent: int, spare_share: float, max_wait_seconds: float) -> None:
        """spare_share: share of a worker's slots that a replay leaves free, unless it is alone."""
        self._slots = asyncio.Semaphore(max_concurrent)
        self._max_concurrent = max_concurrent
        self._spare_share = spare_share
        self._max_wait = max_wait_seconds

    @asynccontextmanager
    async def turn(
        self, need: Need, look: Callable[[], Awaitable[WorkerInfo]], take: Callable[[], T | None]
    ) -> AsyncIterator[T]:
        """What `take` returned, for the time that the replay runs; it is released afterwards.

        look: tells the state of the worker now.
        take: a lease on it, or None while generations come first.
        Raises `WorkerUnavailable` if the turn does not come in time, and what the two raise.
        """
        deadline = time.monotonic() + self._max_wait
        try:
            async with asyncio.timeout(self._max_wait):
                await self._slots.acquire()
        except TimeoutError as error:
            raise WorkerUnavailable(
                f"{self._max_concurrent} replays are running and others wait; try again later, or "
                "raise replay.max_concurrent"
            ) from error
        try:
            lease = await self._wait(need, look, take, deadline)
            try:
                yield lease
            finally:
                lease.release()
        finally:
            self._slots.release()

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
        if info.running_requests == 0:
            return True
        left = info.unreserved_slots - need.slots_at_most(info)
        return left >= self._spare_share * info.total_slots
