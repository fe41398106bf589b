"""A request while it runs on a worker, and work that must outlive the call that caused it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from vase_sgl.gateway.errors import (
    GatewayError,
    InvalidRequest,
    WorkerAborted,
    WorkerUnavailable,
)
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.workers import Finish, Worker, WorkerChunk, WorkerRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Tasks that go on when the call that spawned them is cancelled."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `work`. Await the task under `asyncio.shield` to have it survive."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def settle(self) -> None:
        """Wait until nothing is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, GatewayError):  # those were logged already
            logger.error("background work failed", exc_info=error)


@asynccontextmanager
async def running(
    lease: Lease, request: WorkerRequest, background: Background
) -> AsyncIterator[AsyncGenerator[WorkerChunk, None]]:
    """The chunks of `request` on the leased worker; the lease learns how the worker did.

    Left before the last chunk, for whatever reason, the request is aborted in the worker at once.

    A full cache is asked for by name where the worker would give a request without eviction its
    default: that is for callers who know nothing of budgets. What applies here was recorded.
    """
    finished = False
    if request.eviction is None and lease.info.default_eviction is not None:
        request = dataclasses.replace(request, eviction={"policy": "full"})

    async def chunks() -> AsyncGenerator[WorkerChunk, None]:
        nonlocal finished
        async with aclosing(lease.worker.generate(request)) as stream:
            try:
                async for chunk in stream:
                    lease.answered(chunk)
                    finished = chunk.finish is not None
                    yield chunk
            except WorkerUnavailable:
                lease.failed()
                raise

    async with aclosing(chunks()) as stream:
        try:
            yield stream
        finally:
            if not finished:
                background.spawn(_abort(lease.worker, request.request_id))


def raise_if_aborted(finish: Finish | None) -> None:
    """Raise the `GatewayError` that belongs to a worker's own abort."""
    if finish is None or finish.reason != "abort":
        return
    reason = finish.message or "it gave no reason"
    match finish.status_code:
        case 400:
            raise InvalidRequest("the worker refused the request", said=reason)
        case 503:
            raise WorkerUnavailable("the worker is overloaded; try again later", said=reason)
        case _:
            raise WorkerAborted("the worker gave the request up", said=reason)


async def _abort(worker: Worker, request_id: str) -> None:
    try:
        await worker.abort(request_id)
    except GatewayError as error:
        logger.warning("request %s could not be aborted: %s", request_id, error)
