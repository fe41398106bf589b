"""Replay: run a record again on a worker as the one recorded, and compare."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from vase_sgl.gateway import telemetry
from vase_sgl.gateway.admission import Admissions
from vase_sgl.gateway.audit import AuditStore, Record, RecordStatus
from vase_sgl.gateway.cache_salt import CacheSalts
from vase_sgl.gateway.comparison import (
    Comparison,
    Difference,
    Outcome,
    Progress,
    Verdict,
    fingerprint_differences,
    under_change,
)
from vase_sgl.gateway.errors import FailedPrecondition, NotFound, WorkerUnavailable
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.replay_gate import ReplayGate, Waiting
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.runs import Background, raise_if_aborted, running
from vase_sgl.gateway.seeds import check_seeds
from vase_sgl.gateway.shutdown import Shutdown
from vase_sgl.gateway.tenants import Retention, Tenant
from vase_sgl.gateway.workers import Worker, WorkerInfo, WorkerRequest

Send = Callable[[Progress], Awaitable[None]]


class _Incomparable(Exception):
    """No worker is as the one recorded; `differences` are those of the nearest."""

    def __init__(self, differences: tuple[Difference, ...]) -> None:
        super().__init__()
        self.differences = differences


class Replays:
    """Replays records of the audit store on the router's workers."""

    def __init__(
        self,
        router: WorkerRouter,
        admissions: Admissions,
        store: AuditStore,
        background: Background,
        shutdown: Shutdown,
        gate: ReplayGate[Lease],
        salts: CacheSalts,
    ) -> None:
        self._router = router
        self._admissions = admissions
        self._store = store
        self._background = background
        self._shutdown = shutdown
        self._gate = gate
        self._salts = salts

    async def run(self, tenant: Tenant, record_id: str, send: Send) -> Verdict:
        """Replay one of the tenant's own records, sending progress. Raises `GatewayError`.

        It counts against none of the tenant's limits, but few may wait.
        """
        with (
            telemetry.span("vase.replay", tenant=tenant.name) as span,
            self._gate.place(tenant.name) as waiting,
        ):
            record = await self._load(tenant, record_id)
            telemetry.describe_eviction(span, record.eviction)
            seed_check = check_seeds(
                tenant,
                record.seeds,
                sampling=record.sampling,
                eviction=record.eviction,
                request_id=record_id,
                sample_index=record.sample_index,
            )
            try:
                async with self._shutdown.ends("the replay; try again"):
                    verdict = await self._run(tenant, record, waiting, send)
            except _Incomparable as error:
                verdict = Verdict(Outcome.INCOMPARABLE, differences=error.differences)
            span.set_attribute("vase.outcome", verdict.outcome.value)
            span.set_attribute("vase.rounds", verdict.rounds_compared)
            return dataclasses.replace(verdict, seed_check=seed_check)

    async def _load(self, tenant: Tenant, record_id: str) -> Record:
        stored = await self._store.get(tenant.name, record_id)
        if stored is None:
            raise NotFound(
                f"there is no record {record_id!r} of tenant {tenant.name}; `vase-sgl records "
                "list` shows those there are"
            )
        record = stored.record
        if record.status is not RecordStatus.COMPLETED:
            raise FailedPrecondition(
                f"record {record_id} is of a generation that was {record.status}; only a "
                "completed one can be replayed"
            )
        if record.retention is Retention.HASH:
            raise FailedPrecondition(
                f"record {record_id} cannot be replayed: it was kept with the retention `hash`, so "
                "only digests of its prompt and answer are there"
            )
        return record

    async def _run(self, tenant: Tenant, record: Record, waiting: Waiting, send: Send) -> Verdict:
        max_new_tokens = int(record.sampling["max_new_tokens"])
        if record.finish_reason == "length":
            # A ceiling of the worker may have clipped it, and another one's may be elsewhere.
            max_new_tokens = len(record.output_token_ids) or max_new_tokens
        request = WorkerRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=record.prompt_token_ids,
            sampling={**record.sampling, "max_new_tokens": max_new_tokens},
            eviction=record.eviction,
            cache_salt=self._salts.of(tenant),
        )
        comparison = Comparison(record, max_new_tokens)
        async with (
            self._turn(record, request, waiting) as (lease, info),
            running(lease, request, self._background) as chunks,
        ):
            async for chunk in chunks:
                raise_if_aborted(chunk.finish)
                verdict = comparison.see(chunk)
                if verdict is not None:
                    if verdict.outcome is Outcome.DIVERGED:
                        # Only the last chunk has the stamp.
                        last = chunk if chunk.finish is not None else await lease.worker.info()
                        if last.stamp is not None and info.became(last.stamp):
                            return under_change(verdict, last.stamp)
                    return verdict
                await send(comparison.progress())
        raise AssertionError("a worker's last chunk has a finish reason")

    @asynccontextmanager
    async def _turn(
        self, record: Record, request: WorkerRequest, waiting: Waiting
    ) -> AsyncIterator[tuple[Lease, WorkerInfo]]:
        """A lease on a worker as the one recorded, and its state, once it can spare what is needed.

        Raises `_Incomparable`, at once if there is none now, later if it is gone by its turn.
        """
        need = Need.of(request)  # of any model: the recorded fingerprint is looked for
        worker, info = await self._worker_for(record)

        async def look() -> WorkerInfo:
            nonlocal worker, info
            try:
                info = await worker.info()
                # One that left its name, or fails its checks, may answer this all the same.
                if all(worker is not ready for ready, _ in self._router.ready()):
                    raise WorkerUnavailable(
                        f"worker {worker.name} is no longer ready; try again later"
                    )
            except WorkerUnavailable as lost:
                try:
                    worker, info = await self._worker_for(record)
                except _Incomparable:
                    raise lost from None  # its equal may be back soon
            if fingerprint_differences(record.fingerprint, info.fingerprint):
                # Another one runs at that address by now.
                worker, info = await self._worker_for(record)
            return self._router.with_leases(worker, info)

        async with AsyncExitStack() as turn:
            with telemetry.waiting():
                lease = await turn.enter_async_context(
                    self._gate.turn(
                        waiting,
                        need,
                        look=look,
                        take=lambda: self._admissions.take_spare(need, worker.name),
                    )
                )
            yield lease, info

    async def _worker_for(self, record: Record) -> tuple[Worker, WorkerInfo]:
        """A worker with the recorded fingerprint, and its state. Raises `_Incomparable`."""
        candidates = [
            (fingerprint_differences(record.fingerprint, info.fingerprint), worker, info)
            for worker, info in await self._router.current()
        ]
        differences, worker, info = min(candidates, key=lambda candidate: len(candidate[0]))
        if differences:
            raise _Incomparable(differences)
        return worker, info
