"""The life of one generation: check, tokenize, derive seeds, stream, record."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vase_sgl.gateway import telemetry, validation, wire
from vase_sgl.gateway.audit import AuditStore, Record, RecordStatus, Timings
from vase_sgl.gateway.deltas import OutputDeltas
from vase_sgl.gateway.errors import (
    GatewayError,
    InvalidRequest,
    WorkerAborted,
    WorkerUnavailable,
)
from vase_sgl.gateway.runs import Background, running
from vase_sgl.gateway.seeds import Seeds, seeds_for
from vase_sgl.gateway.tenants import Tenant
from vase_sgl.gateway.validation import Prompt
from vase_sgl.gateway.workers import (
    Finish,
    Worker,
    WorkerChunk,
    WorkerInfo,
    WorkerRequest,
    WorkerRouter,
)
from vase_sgl.rpc.v1 import gateway_pb2 as pb

logger = logging.getLogger(__name__)

Send = Callable[[pb.GenerateResponse], Awaitable[None]]


class _Clock:
    """Times of one generation. Seconds count from the making of this object."""

    def __init__(self) -> None:
        self.created_unix_micros = time.time_ns() // 1000
        self._start = time.monotonic()
        self.queue_seconds = 0.0
        self.ttft_seconds: float | None = None
        self.total_seconds = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def timings(self) -> Timings:
        return Timings(self.queue_seconds, self.ttft_seconds, self.total_seconds)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything about a generation that is known before it runs."""

    tenant: Tenant
    worker: Worker
    info: WorkerInfo
    request: WorkerRequest
    input_kind: str
    seeds: Seeds
    sample_index: int


class Generations:
    """Runs generations on the router's workers and records each of them."""

    def __init__(
        self,
        router: WorkerRouter,
        store: AuditStore,
        background: Background,
        default_eviction: Mapping[str, Any] | None,
    ) -> None:
        self._router = router
        self._store = store
        self._background = background
        self._default_eviction = default_eviction

    async def run(self, tenant: Tenant, request: pb.GenerateRequest, send: Send) -> Record:
        """Generate, sending every message but the result; returns when the record is durable.

        `send` is awaited before more is read from the worker, so a slow client slows the worker
        and nothing piles up here. Raises `GatewayError`. Failed and cancelled generations are
        recorded too, unless they failed before they reached a worker.
        """
        clock = _Clock()
        with telemetry.span("vase.generate", tenant=tenant.name) as span:
            plan = await self._plan(tenant, request)
            telemetry.describe_eviction(span, plan.request.eviction)
            clock.queue_seconds = clock.elapsed()
            record = await self._stream(plan, clock, send)
            span.set_attribute("vase.rounds", record.cache.rounds if record.cache else 0)
            # Shielded: a client that leaves now does not undo a generation that completed.
            await asyncio.shield(self._background.spawn(self._store.append(record)))
            return record

    async def _plan(self, tenant: Tenant, request: pb.GenerateRequest) -> _Plan:
        self._store.check()
        request_id = uuid.uuid4().hex
        prompt = validation.prompt_of(request)
        max_new_tokens = validation.max_new_tokens_of(request, tenant)
        sampling = validation.sampling_of(request.sampling)
        validation.check_seed(request)
        seeds = seeds_for(
            tenant,
            request_id=request_id,
            request_seed=request.seed if request.HasField("seed") else None,
            sample_index=request.sample_index,
        )
        worker, info = self._router.pick()
        # Whatever applies is made explicit, so that the record is complete.
        fields = (
            validation.eviction_fields(request.eviction)
            if request.HasField("eviction")
            else self._default_eviction or info.default_eviction
        )
        eviction = validation.eviction_of(fields, seed=seeds.eviction, tenant=tenant, info=info)
        token_ids = await _tokenize(worker, prompt)
        validation.check_prompt_tokens(prompt.kind, token_ids, max_new_tokens, tenant, info)
        return _Plan(
            tenant=tenant,
            worker=worker,
            info=info,
            request=WorkerRequest(
                request_id=request_id,
                prompt_token_ids=token_ids,
                sampling={
                    "max_new_tokens": max_new_tokens,
                    **sampling,
                    "sampling_seed": seeds.sampling,
                },
                eviction=None if eviction is None else eviction.to_mapping(),
            ),
            input_kind=prompt.kind,
            seeds=seeds,
            sample_index=request.sample_index,
        )

    async def _stream(self, plan: _Plan, clock: _Clock, send: Send) -> Record:
        """Stream to the client; the record of the completed generation, not stored yet."""
        request = plan.request
        latest = WorkerChunk(text="", token_ids=())
        try:
            await send(
                pb.GenerateResponse(
                    started=pb.GenerationStarted(
                        request_id=request.request_id, prompt_tokens=len(request.prompt_token_ids)
                    )
                )
            )
            deltas = OutputDeltas(request.sampling["stop"])
            async with running(plan.worker, request, self._background) as chunks:
                async for latest in chunks:
                    clock.total_seconds = clock.elapsed()
                    if clock.ttft_seconds is None and latest.token_ids:
                        clock.ttft_seconds = clock.total_seconds
                    raise_if_aborted(latest.finish)
                    text = deltas.take_text(latest.text, final=latest.finish is not None)
                    tokens = deltas.take_tokens(latest.token_ids)
                    if text or tokens:
                        await send(
                            pb.GenerateResponse(
                                chunk=pb.GenerationChunk(
                                    text=text, token_ids=tokens, cache=wire.cache(latest.cache)
                                )
                            )
                        )
        except BaseException as error:
            clock.total_seconds = clock.elapsed()
            failed = isinstance(error, GatewayError)
            status = RecordStatus.FAILED if failed else RecordStatus.ABORTED
            logger.info("generation %s %s", request.request_id, status)
            record = _record(plan, clock, latest, status, str(error) if failed else "")
            storing = self._background.spawn(self._store.append(record))
            if failed:
                await asyncio.shield(storing)
            raise
        return _record(plan, clock, latest, RecordStatus.COMPLETED)


async def _tokenize(worker: Worker, prompt: Prompt) -> tuple[int, ...]:
    match prompt.kind:
        case "text":
            return await worker.tokenize_text(prompt.text)
        case "chat":
            return await worker.tokenize_chat(prompt.chat)
        case "token_ids":
            return prompt.token_ids


def raise_if_aborted(finish: Finish | None) -> None:
    """Raise the `GatewayError` that belongs to a worker's own abort."""
    if finish is None or finish.reason != "abort":
        return
    reason = finish.message or "it gave no reason"
    match finish.status_code:
        case 400:
            raise InvalidRequest(f"the worker refused the request: {reason}")
        case 503:
            raise WorkerUnavailable(f"the worker is overloaded: {reason}; try again later")
        case _:
            raise WorkerAborted(f"the worker gave the request up: {reason}")


def _record(
    plan: _Plan, clock: _Clock, latest: WorkerChunk, status: RecordStatus, failure: str = ""
) -> Record:
    return Record(
        record_id=plan.request.request_id,
        tenant=plan.tenant.name,
        created_unix_micros=clock.created_unix_micros,
        status=status,
        failure=failure,
        input_kind=plan.input_kind,
        prompt_token_ids=plan.request.prompt_token_ids,
        sampling=plan.request.sampling,
        eviction=plan.request.eviction,
        seeds=plan.seeds,
        sample_index=plan.sample_index,
        output_token_ids=latest.token_ids,
        text=latest.text,
        finish_reason=latest.finish.reason if latest.finish else "",
        cache=latest.cache,
        round_digests=latest.round_digests,
        fingerprint=plan.info.fingerprint,
        timings=clock.timings(),
        retention=plan.tenant.retention,
        prompt_tokens=len(plan.request.prompt_token_ids),
        completion_tokens=len(latest.token_ids),
    )
