"""The way of a request to a worker: the tenant's limits, the fair queue, the router."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection
from contextlib import ExitStack, asynccontextmanager

from vase_sgl.gateway.fair_queue import FairQueue, Place
from vase_sgl.gateway.limits.usage import Usage
from vase_sgl.gateway.router import Lease, Need, WorkerRouter
from vase_sgl.gateway.runs import Background
from vase_sgl.gateway.tenants import Tenant
from vase_sgl.gateway.workers import WorkerChunk, WorkerRequest


class Passage:
    """One request on its way. Made by `Admissions.admit`."""

    def __init__(
        self, tenant: Tenant, router: WorkerRouter, place: Place[Lease], waiting: ExitStack
    ) -> None:
        self.tenant = tenant
        #: Prompt and output tokens used so far; what the tenant is charged at the end.
        self.tokens = 0
        self._router = router
        self._place = place
        self._waiting = waiting

    @asynccontextmanager
    async def worker(
        self, need: Need, *, exclude: Collection[str] = (), only: str | None = None
    ) -> AsyncIterator[Lease]:
        """A worker for the body, when it is this request's turn; not one of `exclude`.

        Raises `WorkerUnavailable`, and `LimitExceeded` after the longest wait.
        """
        lease = await self._place.wait(lambda: self._router.take(need, exclude=exclude, only=only))
        self._waiting.close()
        try:
            yield lease
        finally:
            lease.release()

    def used(self, request: WorkerRequest, chunk: WorkerChunk) -> None:
        """Note what the request has used so far: its prompt and the output in `chunk`."""
        self.tokens = len(request.prompt_token_ids) + len(chunk.token_ids)


class Admissions:
    """Lets requests in, within the limits of their tenants."""

    def __init__(
        self,
        usage: Usage,
        queue: FairQueue[Lease],
        router: WorkerRouter,
        background: Background,
    ) -> None:
        self._usage = usage
        self._queue = queue
        self._router = router
        self._background = background

    @asynccontextmanager
    async def admit(self, tenant: Tenant) -> AsyncIterator[Passage]:
        """Let one request in for the body; the tenant is charged when it ends, however it ends.

        Raises `LimitExceeded` and `LimitsUnavailable`.
        """
        limits, ticket = tenant.limits.usage, uuid.uuid4().hex
        with ExitStack() as waiting:
            place = waiting.enter_context(self._queue.place(tenant.name))
            passage = Passage(tenant, self._router, place, waiting)
            if limits.unlimited:
                yield passage
                return
            try:
                await self._usage.enter(tenant.name, limits, ticket)
            except asyncio.CancelledError:
                self._leave(passage, ticket)  # it may have been counted already
                raise
            try:
                yield passage
            finally:
                await asyncio.shield(self._leave(passage, ticket))

    def _leave(self, passage: Passage, ticket: str) -> asyncio.Task[None]:
        tenant = passage.tenant
        return self._background.spawn(
            self._usage.leave(tenant.name, tenant.limits.usage, ticket, passage.tokens)
        )
