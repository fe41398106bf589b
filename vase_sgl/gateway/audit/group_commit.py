"""Group commit: what arrives while a commit is under way goes into the next one together."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class GroupCommit(Generic[T, R]):
    """One task that commits items in batches, in the order they came.

    There is no timer: a lone item is committed at once, and the busier the store, the larger the
    batches. Nothing is dropped: once `capacity` items wait, `submit` waits as well.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[T]], Awaitable[Sequence[R]]],
        *,
        retry_alone: Callable[[Exception], bool],
        size: Callable[[T], int],
        max_bytes: int,
        max_items: int = 64,
        capacity: int = 1024,
    ) -> None:
        """`commit` stores a batch whole or not at all, and returns a result per item.

        retry_alone: whether an exception may be the fault of one item, so that the others of its
            batch deserve a commit of their own. size: an item's bytes; a batch is complete when it
            has `max_bytes`.
        """
        self._commit = commit
        self._retry_alone = retry_alone
        self._size = size
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._queue: asyncio.Queue[tuple[T, asyncio.Future[R]]] = asyncio.Queue(capacity)
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: T) -> R:
        """The item's result, once it is committed. Raises what `commit` raised."""
        if self._task is None:
            # Its log lines are not the first caller's: they would bear that one's tenant for ever.
            self._task = asyncio.create_task(
                self._run(), name="vase-group-commit", context=contextvars.Context()
            )
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        await self._queue.put((item, future))
        return await future

    async def close(self) -> None:
        """Commit what waits, then end."""
        await self._queue.join()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            size = self._size(batch[0][0])
            while (
                len(batch) < self._max_items and size < self._max_bytes and not self._queue.empty()
            ):
                batch.append(self._queue.get_nowait())
                size += self._size(batch[-1][0])
            await self._settle(batch)
            for _ in batch:
                self._queue.task_done()

    async def _settle(self, batch: Sequence[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._commit([item for item, _ in batch])
            settled = list(zip(batch, results, strict=True))
        except Exception as error:
            if len(batch) > 1 and self._retry_alone(error):
                logger.warning("a batch of %d failed; each is tried alone", len(batch))
                for entry in batch:
                    await self._settle([entry])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in settled:
                if not future.done():  # else its caller was cancelled
                    future.set_result(result)
