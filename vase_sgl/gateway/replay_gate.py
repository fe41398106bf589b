"""Replays wait for tenants' traffic: few run at once, and only where a worker has slots to spare.

SGLang knows priorities within its own queue only with --enable-priority-scheduling. A replay that
never queues there needs none: it starts when its worker could take it and still keep a share of
its slots free for the next generations.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.workers import WorkerInfo, WorkerRequest

#: Seconds between looks at a busy worker.
_LOOK_SECONDS = 0.2


class ReplayGate:
    """Lets replays through one by one, in the order they came."""

    def __init__(self, *, max_concurrent: int, spare_share: float, max_wait_seconds: float) -> None:
        """spare_share: share of a worker's slots that a replay leaves free, unless it is alone."""
        self._slots = asyncio.Semaphore(max_concurrent)
        self._max_concurrent = max_concurrent
        self._spare_share = spare_share
        self._max_wait = max_wait_seconds

    @asynccontextmanager
    async def turn(
        self, request: WorkerRequest, look: Callable[[], Awaitable[WorkerInfo]]
    ) -> AsyncIterator[None]:
        """Held while the replay runs; `look` tells the state of its worker.

        Raises `WorkerUnavailable` if the turn does not come in time.
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
            while not self._has_room(request, await look()):
                if time.monotonic() >= deadline:
                    raise WorkerUnavailable(
                        "the worker is busy with generations, for which replays make way; try "
                        "again later, or lower replay.spare_share"
                    )
                await asyncio.sleep(_LOOK_SECONDS)
            yield
        finally:
            self._slots.release()

    def _has_room(self, request: WorkerRequest, info: WorkerInfo) -> bool:
        if info.running_requests == 0:
            return True
        left = info.available_slots - slots_at_most(request)
        return left >= self._spare_share * info.total_slots


def slots_at_most(request: WorkerRequest) -> int:
    """KV slots that the request may come to own."""
    prompt, eviction = len(request.prompt_token_ids), request.eviction
    full = prompt + int(request.sampling["max_new_tokens"])
    if eviction is None or eviction["policy"] == "full":
        return full
    return min(full, max(prompt, int(eviction["budget"])) + int(eviction["window"]))
