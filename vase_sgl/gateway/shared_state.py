"""A worker's state for many who ask: one question at a time, however many wait for its answer.

A worker answers one such question per step of its scheduler, for all gateways, in the order they
came, and also when nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import contextvars
import time

from vase_sgl.gateway.workers import Worker, WorkerInfo

#: Seconds for which an answer is good enough for who asks for a recent one.
RECENT_SECONDS = 1.0


class SharedState:
    """The state of one worker. Methods raise what its `info` raises, to all who wait for it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._under_way: asyncio.Task[WorkerInfo] | None = None
        self._answer: WorkerInfo | None = None
        self._answered = 0.0

    async def recent(self) -> WorkerInfo:
        """The state now, or as it was told up to `RECENT_SECONDS` ago."""
        if self._answer is not None and time.monotonic() - self._answered < RECENT_SECONDS:
            return self._answer
        return await self._join()

    async def now(self) -> WorkerInfo:
        """The state after this call."""
        before = self._under_way
        if before is not None:
            await asyncio.wait([before])
        return await self._join()

    def close(self) -> None:
        """Nobody waits any more."""
        if self._under_way is not None:
            self._under_way.cancel()

    async def _join(self) -> WorkerInfo:
        if self._under_way is None:
            # A task, as who asked first may go, and in the name of nobody.
            self._under_way = asyncio.create_task(
                self._worker.info(), context=contextvars.Context()
            )
            self._under_way.add_done_callback(self._ended)
        return await asyncio.shield(self._under_way)

    def _ended(self, asked: asyncio.Task[WorkerInfo]) -> None:
        self._under_way = self._answer = None
        if not asked.cancelled() and asked.exception() is None:
            self._answer, self._answered = asked.result(), time.monotonic()
