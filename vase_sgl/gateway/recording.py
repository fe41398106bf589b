"""How a generation goes, and what is kept and told of it: record, metrics, a line of the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterator

from vase_sgl.gateway import logs
from vase_sgl.gateway.audit import AuditStore, Record, RecordStatus, Timings
from vase_sgl.gateway.errors import (
    ClientGone,
    ClientStalled,
    Defect,
    GatewayError,
    GatewayStopped,
    InvalidRequest,
    LimitExceeded,
    PermissionDenied,
)
from vase_sgl.gateway.metrics import Metrics
from vase_sgl.gateway.planning import Plan, operation
from vase_sgl.gateway.runs import Background
from vase_sgl.gateway.workers import CHANGED, RETRACTIONS, WorkerChunk, WorkerInfo

logger = logging.getLogger(__name__)


class Clock:
    """Times of one generation. Seconds count from the making of this object."""

    def __init__(self) -> None:
        self.created_unix_micros = time.time_ns() // 1000
        self._start = time.monotonic()
        self.queue_seconds = 0.0
        self.ttft_seconds: float | None = None
        self.total_seconds = 0.0

    def elapsed(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    def tick(self, chunk: WorkerChunk) -> float | None:
        """Output has come. The seconds to the first token, if this has it."""
        self.total_seconds = self.elapsed()
        if self.ttft_seconds is not None or not chunk.token_ids:
            return None
        self.ttft_seconds = self.total_seconds
        return self.ttft_seconds

    def timings(self) -> Timings:
        """As a record has them."""
        return Timings(self.queue_seconds, self.ttft_seconds, self.total_seconds)


class Run:
    """How a generation goes: what came so far, from which worker, and when."""

    def __init__(self) -> None:
        self.request_id = uuid.uuid4().hex
        self.clock = Clock()
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


class Recorder:
    """Stores the records of generations, then tells how each ended."""

    def __init__(self, store: AuditStore, background: Background, metrics: Metrics) -> None:
        self._store = store
        self._background = background
        self._metrics = metrics

    def check(self) -> None:
        """Raise `AuditUnavailable` if nothing could be recorded just now."""
        self._store.check()

    async def completed(self, plan: Plan, run: Run) -> Record:
        """The record of a generation that completed, once it is durable."""
        record = _record(plan, run, RecordStatus.COMPLETED)
        # Shielded: a client that leaves now does not undo a generation that completed.
        await asyncio.shield(self._background.spawn(self._end(record, run.worker, None)))
        return record

    async def unfinished(self, plan: Plan, run: Run, error: BaseException) -> None:
        """Record a generation that reached a worker and did not complete."""
        run.clock.total_seconds = run.clock.elapsed()
        failed = isinstance(error, Exception) and not isinstance(error, _GIVEN_UP)
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
        self._metrics.generated(record, operation(record.input_kind), code)
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


#: What ends a generation without a fault of its own or of its worker's.
_GIVEN_UP = (ClientGone, ClientStalled, GatewayStopped)

#: What a record and the log say of an error that was not foreseen; the log has its stack, too.
_DEFECT = "a defect inside the gateway"

#: What the caller or a limit caused: no fault of gateway or workers.
_EXPECTED = (InvalidRequest, LimitExceeded, PermissionDenied)


def tell_of_none(run: Run, error: BaseException) -> None:
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


def _incidents(info: WorkerInfo, last: WorkerChunk) -> dict[str, str]:
    """What happened to an answer that began at a worker of this fingerprint; no worker has it."""
    found = {RETRACTIONS: str(last.retractions)} if last.retractions else {}
    if last.stamp is not None and info.became(last.stamp):
        found[CHANGED] = last.stamp
    return found


def _record(plan: Plan, run: Run, status: RecordStatus, failure: str = "") -> Record:
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
        fingerprint={**run.info.fingerprint, **_incidents(run.info, latest)},
        timings=run.clock.timings(),
        retention=plan.tenant.retention,
        prompt_tokens=len(plan.request.prompt_token_ids),
        completion_tokens=len(latest.token_ids),
    )
