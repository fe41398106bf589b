"""The life of one generation: plan, wait, stream, record."""

from __future__ import annotations

import logging

from vase_sgl.gateway import telemetry, wire
from vase_sgl.gateway.admission import Passage
from vase_sgl.gateway.audit import Record
from vase_sgl.gateway.deltas import OutputDeltas
from vase_sgl.gateway.errors import LimitExceeded, WorkerUnavailable
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.metrics import Metrics
from vase_sgl.gateway.outbox import Outbox, Send
from vase_sgl.gateway.planning import Plan, Planner, Shared
from vase_sgl.gateway.recording import Recorder, Run, tell_of_none
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.runs import Background, raise_if_aborted, running
from vase_sgl.gateway.shutdown import Shutdown
from vase_sgl.gateway.workers import WorkerRequest
from vase_sgl.rpc.v1 import gateway_pb2 as pb

logger = logging.getLogger(__name__)

_ANSWER = "the answer; how far it came says its record, if it reached a worker"


class Generations:
    """Runs generations on the router's workers and has each of them recorded."""

    def __init__(
        self,
        router: WorkerRouter,
        planner: Planner,
        recorder: Recorder,
        background: Background,
        shutdown: Shutdown,
        metrics: Metrics,
        *,
        retries: int,
    ) -> None:
        """`retries`: other workers that are tried when one fails before its first token."""
        self._router = router
        self._planner = planner
        self._recorder = recorder
        self._background = background
        self._shutdown = shutdown
        self._metrics = metrics
        self._retries = retries

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
        run = Run()
        with telemetry.span("vase.generate", tenant=passage.tenant.name) as span, run.errors():
            try:
                self._recorder.check()
                # Not around the record at the end: an answer that is whole by then is given out.
                async with self._shutdown.ends(_ANSWER):
                    plan = await self._planner.plan(
                        passage.tenant,
                        request,
                        run.request_id,
                        clip=clip,
                        shared=shared or Shared(),
                    )
                    telemetry.describe_eviction(span, plan.request.eviction)
                    async with Outbox(send) as outbox:
                        await self._stream(passage, plan, run, outbox)
            except BaseException as error:
                if run.info is None:
                    tell_of_none(run, error)
                else:
                    await self._recorder.unfinished(plan, run, error)
                raise
            cache = run.latest.cache
            span.set_attribute("vase.rounds", cache.rounds if cache else 0)
            return await self._recorder.completed(plan, run)

    async def _stream(self, passage: Passage, plan: Plan, run: Run, outbox: Outbox) -> None:
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
                except LimitExceeded:  # this gateway could not even connect
                    passage.tokens = 0
                    if not run.failed:
                        run.info = None
                    raise
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

    def _may_retry(self, plan: Plan, run: Run) -> bool:
        return (
            not run.latest.token_ids
            and len(run.failed) <= self._retries
            and self._router.has_other(plan.need, run.failed)
        )

    async def _stream_from(
        self, lease: Lease, passage: Passage, plan: Plan, run: Run, outbox: Outbox
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


def _started(request: WorkerRequest) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.GenerationStarted(
            request_id=request.request_id, prompt_tokens=len(request.prompt_token_ids)
        )
    )
