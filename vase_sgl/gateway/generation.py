"""The life of one generation: check, derive seeds, tokenize, wait, stream, record."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from vase_sgl.gateway import logs, telemetry, validation, wire
from vase_sgl.gateway.admission import Passage
from vase_sgl.gateway.audit import AuditStore, Record, RecordStatus, Timings
from vase_sgl.gateway.cache_salt import cache_salt
from vase_sgl.gateway.deltas import OutputDeltas
from vase_sgl.gateway.errors import (
    ClientGone,
    ClientStalled,
    Defect,
    GatewayError,
    InvalidRequest,
    LimitExceeded,
    PermissionDenied,
    WorkerAborted,
    WorkerUnavailable,
)
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.metrics import Metrics
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.outbox import Outbox, Send
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.runs import Background, running
from vase_sgl.gateway.seeds import Seeds, seeds_for
from vase_sgl.gateway.tenants import Tenant
from vase_sgl.gateway.tokenizing import Tokenizing
from vase_sgl.gateway.workers import (
    CHANGED,
    RETRACTIONS,
    Finish,
    Model,
    Worker,
    WorkerChunk,
    WorkerInfo,
    WorkerRequest,
)
from vase_sgl.rpc.v1 import gateway_pb2 as pb

logger = logging.getLogger(__name__)


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

    def tick(self, chunk: WorkerChunk) -> float | None:
        """Output has come. The seconds to the first token, if this has it."""
        self.total_seconds = self.elapsed()
        if self.ttft_seconds is not None or not chunk.token_ids:
            return None
        self.ttft_seconds = self.total_seconds
        return self.ttft_seconds

    def timings(self) -> Timings:
        return Timings(self.queue_seconds, self.ttft_seconds, self.total_seconds)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything about a generation that is known before it runs."""

    tenant: Tenant
    request: WorkerRequest
    need: Need
    input_kind: str
    seeds: Seeds
    sample_index: int

    @property
    def operation(self) -> str:
        """What the GenAI semantic conventions call it."""
        return _operation(self.input_kind)


class Shared:
    """What all samples of one request have in common: the model, and the prompt's tokens for it."""

    def __init__(self, model_name: str | None = None) -> None:
        """`model_name`: what the request calls its model; None: it leaves the choice."""
        self.model_name = model_name
        self.model: Model | None = None
        self.token_ids: tuple[int, ...] | None = None
        #: Held while the first of them has the prompt tokenized.
        self.tokenizing = asyncio.Lock()


class _Run:
    """How a generation goes: what came so far, from which worker, and when."""

    def __init__(self) -> None:
        self.request_id = uuid.uuid4().hex
        self.clock = _Clock()
        self.latest = WorkerChunk(text="", token_ids=())
        #: The worker it runs on. None: it has not reached one.
        self.info: WorkerInfo | None = None
        self.worker = ""
        #: Names of workers that failed before their first token.
        self.failed: set[str] = set()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of the body, and its log lines, name the request.

        What was not foreseen is logged and becomes a `Defect`.
        """
        with logs.fields(request_id=self.request_id):
            try:
                yield
            except ClientGone:
                raise
            except GatewayError as error:
                raise self._error(error) from error
            except Exception as error:
                logger.exception("a defect in generation %s", self.request_id)
                defect = Defect(
                    "the generation failed inside the gateway; its log has the reason under the "
                    f"request id {self.request_id}"
                )
                raise self._error(defect) from error

    def _error(self, error: GatewayError) -> GatewayError:
        return error.of_generation(self.request_id, final=bool(self.latest.token_ids))


class Generations:
    """Runs generations on the router's workers and records each of them."""

    def __init__(
        self,
        router: WorkerRouter,
        store: AuditStore,
        background: Background,
        tokenizing: Tokenizing,
        default_eviction: Mapping[str, Any] | None,
        retries: int,
        metrics: Metrics,
        *,
        allow_inspect: bool,
        share_prefix_cache: bool,
    ) -> None:
        """`retries`: other workers that are tried when one fails before its first token.

        `allow_inspect`: tenants with the role may have what their requests keep written to a
        worker's disk. `share_prefix_cache`: tenants find each other's cached prompts.
        """
        self._router = router
        self._store = store
        self._background = background
        self._tokenizing = tokenizing
        self._default_eviction = default_eviction
        self._retries = retries
        self._metrics = metrics
        self._allow_inspect = allow_inspect
        self._share_prefix_cache = share_prefix_cache

    async def run(
        self,
        passage: Passage,
        request: pb.GenerateRequest,
        send: Send,
        *,
        clip: bool = False,
        shared: Shared | None = None,
    ) -> Record:
        """Generate, sending every message but the result; returns when the record is durable.

        `send` is awaited before more is read from the worker, so a slow client slows the worker
        and nothing piles up here. `clip`: max_new_tokens is a default, which gives way to the
        tenant's ceiling and to the context; a client's own that is above them is refused. `shared`:
        with other samples of the same request. Raises `GatewayError`. Failed and cancelled
        generations are recorded too, unless they failed before they reached a worker.
        """
        run = _Run()
        with telemetry.span("vase.generate", tenant=passage.tenant.name) as span, run.errors():
            try:
                plan = await self._plan(
                    passage.tenant, request, run.request_id, clip, shared or Shared()
                )
                telemetry.describe_eviction(span, plan.request.eviction)
                async with Outbox(send) as outbox:
                    await self._stream(passage, plan, run, outbox)
            except BaseException as error:
                if run.info is None:
                    _tell_of_none(run, error)
                else:
                    await self._store_unfinished(plan, run, error)
                raise
            record = _record(plan, run, RecordStatus.COMPLETED)
            span.set_attribute("vase.rounds", record.cache.rounds if record.cache else 0)
            # Shielded: a client that leaves now does not undo a generation that completed.
            await asyncio.shield(self._background.spawn(self._end(record, run.worker, None)))
            return record

    async def _plan(
        self,
        tenant: Tenant,
        request: pb.GenerateRequest,
        request_id: str,
        clip: bool,
        shared: Shared,
    ) -> _Plan:
        self._store.check()
        prompt = validation.prompt_of(request, tenant)
        max_new_tokens = validation.max_new_tokens_of(request, tenant, clip=clip)
        sampling = validation.sampling_of(request.sampling)
        validation.check_seed(request)
        seeds = seeds_for(
            tenant,
            request_id=request_id,
            request_seed=request.seed if request.HasField("seed") else None,
            sample_index=request.sample_index,
        )
        workers = self._workers_for(shared)
        # All workers with one model have the same flags: any one's ceilings are right.
        _, info = workers[0]
        validation.check_min_p(sampling["min_p"], info)
        validation.check_prompt_bytes(prompt, tenant, info)
        # Whatever applies is made explicit, so that the record is complete.
        fields = (
            validation.eviction_fields(request.eviction)
            if request.HasField("eviction")
            else self._default_eviction or info.default_eviction
        )
        eviction = validation.eviction_of(fields, seed=seeds.eviction, tenant=tenant, info=info)
        if request.inspect:
            validation.check_inspect(
                eviction, tenant=tenant, info=info, allowed=self._allow_inspect
            )
        async with shared.tokenizing:
            if shared.token_ids is None:
                shared.token_ids = await self._tokenizing.tokens(tenant.name, prompt, workers)
        token_ids = shared.token_ids
        validation.check_prompt_tokens(prompt.kind, token_ids, tenant, info)
        max_new_tokens = validation.within_context(max_new_tokens, len(token_ids), info, clip=clip)
        to_worker = WorkerRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling={
                "max_new_tokens": max_new_tokens,
                **sampling,
                "sampling_seed": seeds.sampling,
            },
            eviction=None if eviction is None else eviction.to_mapping(),
            inspect=request.inspect,
            cache_salt=None if self._share_prefix_cache else cache_salt(tenant),
        )
        need = Need.of(to_worker, info.model)
        validation.check_slots(need, (info for _, info in workers))
        return _Plan(
            tenant=tenant,
            request=to_worker,
            need=need,
            input_kind=prompt.kind,
            seeds=seeds,
            sample_index=request.sample_index,
        )

    def _workers_for(self, shared: Shared) -> list[tuple[Worker, WorkerInfo]]:
        """All ready workers with one model: the request's if it was chosen, else it is now.

        Each model has its own tokenizer, so there is no way from one to the other after this.
        """
        ready = self._router.ready()
        if shared.model is None:
            named = (i.model for _, i in ready if shared.model_name in (None, i.model_name))
            shared.model = next(named, None)
        workers = [(worker, info) for worker, info in ready if info.model == shared.model]
        if not workers:
            raise WorkerUnavailable(
                "no worker with the request's model is ready any more; try again", retry_seconds=1.0
            )
        return workers

    async def _stream(self, passage: Passage, plan: _Plan, run: _Run, outbox: Outbox) -> None:
        """Stream to the client from one worker, or from others while nothing has come yet.

        Each gets the very same request, seeds and budget included: which of them answers makes no
        difference to a replay.
        """
        while True:
            async with passage.worker(plan.need, exclude=run.failed) as lease:
                if run.info is None:
                    run.clock.queue_seconds = run.clock.elapsed()
                    outbox.announce(_started(plan.request))
                run.info, run.worker = lease.info, lease.worker.name
                try:
                    await self._stream_from(lease, passage, plan, run, outbox)
                    return
                except WorkerUnavailable as error:
                    if not run.latest.token_ids:
                        passage.tokens = 0  # no tenant pays for a worker that gave it nothing
                    run.failed.add(lease.worker.name)
                    if not self._may_retry(plan, run):
                        raise
                    self._metrics.retried()
                    logger.warning(
                        "generation %s goes from worker %s to another: %s",
                        run.request_id,
                        run.worker,
                        error.own_words,
                    )

    def _may_retry(self, plan: _Plan, run: _Run) -> bool:
        return (
            not run.latest.token_ids
            and len(run.failed) <= self._retries
            and self._router.has_other(plan.need, run.failed)
        )

    async def _stream_from(
        self, lease: Lease, passage: Passage, plan: _Plan, run: _Run, outbox: Outbox
    ) -> None:
        deltas = OutputDeltas(plan.request.sampling["stop"])
        name, info, request = lease.worker.name, lease.info, plan.request
        with telemetry.on_worker(plan.operation, name, info, request) as span:
            async with running(lease, request, self._background) as chunks:
                # Not only with the first chunk: who leaves before it has had its prompt computed.
                passage.used(request, run.latest)
                async for chunk in chunks:
                    run.latest = chunk
                    if (seconds := run.clock.tick(chunk)) is not None:
                        self._metrics.answered(
                            plan.tenant.name, plan.operation, info.fingerprint, seconds
                        )
                    span.see(chunk)
                    passage.used(request, chunk)
                    raise_if_aborted(chunk.finish)
                    text = deltas.take_text(chunk.text, final=chunk.finish is not None)
                    tokens = deltas.take_tokens(chunk.token_ids)
                    if text or tokens:
                        await outbox.send(
                            pb.GenerateResponse(
                                chunk=pb.GenerationChunk(
                                    text=text, token_ids=tokens, cache=wire.cache(chunk.cache)
                                )
                            )
                        )

    async def _store_unfinished(self, plan: _Plan, run: _Run, error: BaseException) -> None:
        """Record a generation that reached a worker and did not complete."""
        run.clock.total_seconds = run.clock.elapsed()
        failed = isinstance(error, Exception) and not isinstance(error, (ClientGone, ClientStalled))
        if failed:
            failure = str(error) if isinstance(error, GatewayError) else _DEFECT
            record = _record(plan, run, RecordStatus.FAILED, failure)
        else:
            record = _record(plan, run, RecordStatus.ABORTED)
        storing = self._background.spawn(self._end(record, run.worker, error))
        if failed:
            await asyncio.wait({storing})  # whose own failure does not take the place of this one

    async def _end(self, record: Record, worker: str, error: BaseException | None) -> None:
        """Store the record, then tell how its generation ended: one that is lost did not complete.

        Raises what the store raises.
        """
        begun = time.monotonic()
        try:
            await self._store.append(record)
        except Exception as unstored:
            self._tell(record, worker, error or unstored)
            raise
        else:
            self._tell(record, worker, error)
        finally:
            self._metrics.stored(time.monotonic() - begun)

    def _tell(self, record: Record, worker: str, error: BaseException | None) -> None:
        """Count the generation, and log one line about it."""
        status, code = record.status, None if error is None else _code(error)
        if code is not None and status is RecordStatus.COMPLETED:
            status = RecordStatus.FAILED
        self._metrics.generated(record, _operation(record.input_kind), code)
        timings = record.timings
        logger.log(
            logging.WARNING if status is RecordStatus.FAILED else logging.INFO,
            "generation %s %s on worker %s%s",
            record.record_id,
            status,
            worker,
            "" if error is None else f": {_reason(error)}",
            extra={
                "vase": {
                    "status": status.value,
                    "worker": worker,
                    **({} if code is None else {"code": code}),
                    "prompt_tokens": len(record.prompt_token_ids),
                    "output_tokens": len(record.output_token_ids),
                    "queue_seconds": round(timings.queue_seconds, 6),
                    "ttft_seconds": timings.ttft_seconds and round(timings.ttft_seconds, 6),
                    "total_seconds": round(timings.total_seconds, 6),
                    "rounds": record.cache.rounds if record.cache else 0,
                }
            },
        )


#: What a record and the log say of an error that was not foreseen; the log has its stack, too.
_DEFECT = "a defect inside the gateway"

#: What the caller or a limit caused: no fault of gateway or workers.
_EXPECTED = (InvalidRequest, LimitExceeded, PermissionDenied)


def _tell_of_none(run: _Run, error: BaseException) -> None:
    """Log one line about a generation that ended before it had a worker, which has no record."""
    expected = isinstance(error, _EXPECTED) or _code(error) == "CANCELLED"
    logger.log(
        logging.INFO if expected else logging.WARNING,
        "generation %s ended before it had a worker: %s",
        run.request_id,
        _reason(error),
        extra={"vase": {"code": _code(error)}},
    )


def _code(error: BaseException) -> str:
    """The name of the gRPC status that belongs to an error."""
    if isinstance(error, GatewayError):
        return error.code.name
    if isinstance(error, Exception) and not isinstance(error, ClientGone):
        return "INTERNAL"
    return "CANCELLED"


def _reason(error: BaseException) -> str:
    """Why a generation ended, for the log."""
    code = _code(error)
    if isinstance(error, GatewayError):
        return f"{code}: {error.own_words}"
    return f"{code}: {_DEFECT}" if code == "INTERNAL" else code


def _operation(input_kind: str) -> str:
    return "chat" if input_kind == "chat" else "text_completion"


def _started(request: WorkerRequest) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.GenerationStarted(
            request_id=request.request_id, prompt_tokens=len(request.prompt_token_ids)
        )
    )


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


def incidents(info: WorkerInfo, last: WorkerChunk) -> dict[str, str]:
    """What happened to an answer that began at a worker of this fingerprint; no worker has it."""
    found = {RETRACTIONS: str(last.retractions)} if last.retractions else {}
    if last.stamp is not None and info.stamp is not None and last.stamp != info.stamp:
        found[CHANGED] = last.stamp
    return found


def _record(plan: _Plan, run: _Run, status: RecordStatus, failure: str = "") -> Record:
    assert run.info is not None  # only what reached a worker is recorded
    latest = run.latest
    return Record(
        record_id=plan.request.request_id,
        tenant=plan.tenant.name,
        created_unix_micros=run.clock.created_unix_micros,
        status=status,
        failure=failure,
        input_kind=plan.input_kind,
        prompt_token_ids=plan.request.prompt_token_ids,
        sampling=plan.request.sampling,
        eviction=plan.request.eviction,
        seeds=plan.seeds,
        sample_index=plan.sample_index,
        output_token_ids=tuple(latest.token_ids),
        text=latest.text,
        finish_reason=latest.finish.reason if latest.finish else "",
        cache=latest.cache,
        round_digests=latest.round_digests,
        fingerprint={**run.info.fingerprint, **incidents(run.info, latest)},
        timings=run.clock.timings(),
        retention=plan.tenant.retention,
        prompt_tokens=len(plan.request.prompt_token_ids),
        completion_tokens=len(latest.token_ids),
    )
