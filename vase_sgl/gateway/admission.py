"""The way of a request to a worker: the tenant's limits, the fair queue, the router."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

from vase_sgl.gateway import logs, telemetry
from vase_sgl.gateway.errors import ClientGone, GatewayError, LimitExceeded, LimitsUnavailable
from vase_sgl.gateway.fair_queue import FairQueue, Party, Place
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.limits.usage import Usage
from vase_sgl.gateway.metrics import Metrics
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.runs import Background
from vase_sgl.gateway.tenants import Tenant
from vase_sgl.gateway.workers import WorkerChunk, WorkerRequest

logger = logging.getLogger(__name__)


class Passage:
    """One request on its way. Made by `Admissions.admit`."""

    def __init__(
        self,
        tenant: Tenant,
        router: WorkerRouter,
        place: Place[Lease],
        waiting: ExitStack,
        metrics: Metrics,
    ) -> None:
        self.tenant = tenant
        #: Prompt and output tokens used so far; what the tenant is charged at the end.
        self.tokens = 0
        self._router = router
        self._place = place
        self._waiting = waiting
        self._metrics = metrics

    @asynccontextmanager
    async def worker(self, need: Need, *, exclude: Collection[str] = ()) -> AsyncIterator[Lease]:
        """A worker for the body, when it is this request's turn; not one of `exclude`.

        Raises `WorkerUnavailable`, and `LimitExceeded` after the longest wait.
        """
        arrived = time.monotonic()
        try:
            with telemetry.waiting(), self._router.claim(need, exclude=exclude) as claim:
                lease = await self._place.wait(claim.take, claim.keep)
        finally:
            # Of those too that waited in vain: they are what a full fleet looks like.
            self._metrics.waited(self.tenant.name, time.monotonic() - arrived)
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
        metrics: Metrics,
    ) -> None:
        self._usage = usage
        self._queue = queue
        self._router = router
        self._background = background
        self._metrics = metrics

    @asynccontextmanager
    async def admit(
        self, tenant: Tenant, operation: str, party: Party | None = None
    ) -> AsyncIterator[Passage]:
        """Let one request in for the body; the tenant is charged when it ends, however it ends.

        `operation` is its metric label; `party`: those that end with it. Raises `LimitExceeded` and
        `LimitsUnavailable`.
        """
        with self.unlimited(tenant, operation), ExitStack() as waiting:
            place = waiting.enter_context(self._queue.place(tenant.name, party))
            passage = Passage(tenant, self._router, place, waiting, self._metrics)
            if tenant.limits.usage.unlimited:
                yield passage
                return
            ticket = uuid.uuid4().hex
            try:
                await self._usage.enter(tenant.name, tenant.limits.usage, ticket)
            except asyncio.CancelledError:
                self._leave(passage, ticket)  # it may have been counted already
                raise
            try:
                yield passage
            finally:
                await asyncio.shield(self._leave(passage, ticket))

    def take_spare(self, need: Need, worker: str) -> Lease | None:
        """A lease on that worker for work that makes way: None while any request waits.

        Raises `WorkerUnavailable` if the worker is gone.
        """
        if self._queue.waiting:
            return None
        return self._router.take(need, only=worker)

    @contextmanager
    def unlimited(self, tenant: Tenant, operation: str) -> Iterator[None]:
        """Count a request and how it ended in the metrics; the tenant's limits do not apply."""
        with logs.fields(tenant=tenant.name), self._counted(tenant.name, operation):
            yield

    @contextmanager
    def _counted(self, tenant: str, operation: str) -> Iterator[None]:
        outcome = "INTERNAL"
        self._metrics.open_requests += 1
        try:
            yield
            outcome = "OK"
        except GatewayError as error:
            outcome = error.code.name
            if isinstance(error, LimitExceeded):
                logger.info("refused: %s", error.reason)
                self._metrics.rejected(error.reason, tenant)
            elif isinstance(error, LimitsUnavailable):
                self._metrics.rejected("limits_unavailable", tenant)
            raise
        except (asyncio.CancelledError, ClientGone):
            outcome = "CANCELLED"
            raise
        finally:
            self._metrics.open_requests -= 1
            self._metrics.ended(tenant, operation, outcome)

    def _leave(self, passage: Passage, ticket: str) -> asyncio.Task[None]:
        tenant = passage.tenant
        return self._background.spawn(
            self._usage.leave(tenant.name, tenant.limits.usage, ticket, passage.tokens)
        )
