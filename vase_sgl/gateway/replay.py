"""Replay: run a record again and find the first place where it differs."""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from vase_sgl.gateway import telemetry
from vase_sgl.gateway.admission import Admissions
from vase_sgl.gateway.audit import AuditStore, Record, RecordStatus
from vase_sgl.gateway.cache_salt import cache_salt
from vase_sgl.gateway.errors import FailedPrecondition, NotFound, WorkerUnavailable
from vase_sgl.gateway.generation import raise_if_aborted
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.replay_gate import ReplayGate, Waiting
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.runs import Background, running
from vase_sgl.gateway.seeds import SeedCheck, check_seeds
from vase_sgl.gateway.tenants import Retention, Tenant
from vase_sgl.gateway.workers import (
    RETRACTIONS,
    Finish,
    Worker,
    WorkerChunk,
    WorkerInfo,
    WorkerRequest,
    weights_are_known,
)

#: Entry of the fingerprint: whether equal requests have equal answers there, in any company.
DETERMINISTIC = "deterministic"
#: Characters of a text that a verdict quotes.
_EXCERPT = 32


class Outcome(enum.Enum):
    """What a replay can find."""

    MATCH = "match"
    DIVERGED = "diverged"
    INCOMPARABLE = "incomparable"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One entry of the fingerprint, or of how the answer ended, that differs. None: not there."""

    key: str
    recorded: str | None
    current: str | None


@dataclasses.dataclass(frozen=True)
class TokenDifference:
    """The first output position that differs. None: that side had ended."""

    position: int
    expected: int | None
    actual: int | None


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a comparison has come; everything so far was equal."""

    tokens_compared: int
    tokens_total: int
    rounds_compared: int
    rounds_total: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a replay. Rounds count from 1. seed_check is set for every verdict sent."""

    outcome: Outcome
    token: TokenDifference | None = None
    round: int | None = None
    differences: tuple[Difference, ...] = ()
    tokens_compared: int = 0
    rounds_compared: int = 0
    seed_check: SeedCheck = SeedCheck.ORIGIN_UNKNOWN


Send = Callable[[Progress], Awaitable[None]]


def fingerprint_differences(
    recorded: Mapping[str, str], current: Mapping[str, str]
) -> tuple[Difference, ...]:
    """Every entry of a worker that differs or is on one side only, by key.

    Also that the recorded one was not deterministic: an equal worker need not answer equally. Not
    the folder's name of a model whose weights were read: their digest says more.
    """
    ignored = {RETRACTIONS}
    if weights_are_known(recorded):
        ignored.add("model")
    return tuple(
        Difference(key, recorded.get(key), current.get(key))
        for key in sorted({*recorded, *current} - ignored)
        if recorded.get(key) != current.get(key)
        or (key == DETERMINISTIC and recorded.get(key) == "false")
    )


class Comparison:
    """Compares a running replay with its record. `see` mutates the state."""

    def __init__(self, record: Record, max_new_tokens: int) -> None:
        """max_new_tokens: what the replay asks for."""
        self._record = record
        self._max_new_tokens = max_new_tokens
        self._tokens = record.output_token_ids
        self._digests = record.round_digests
        self._tokens_compared = 0
        self._rounds_compared = 0

    def progress(self) -> Progress:
        """How far it has come."""
        return Progress(
            self._tokens_compared, len(self._tokens), self._rounds_compared, len(self._digests)
        )

    def see(self, chunk: WorkerChunk) -> Verdict | None:
        """The verdict, as soon as `chunk` decides it."""
        token = self._token_difference(chunk)
        round_ = self._round_difference(chunk)
        differences: tuple[Difference, ...] = ()
        if token is not None or round_ is not None:
            outcome = Outcome.DIVERGED
        elif chunk.finish is None:
            return None
        elif self._clipped(chunk):
            outcome, differences = Outcome.INCOMPARABLE, (self._ends(chunk.finish, chunk),)
        else:
            differences = self._end_differences(chunk.finish, chunk)
            outcome = Outcome.DIVERGED if differences else Outcome.MATCH
        return Verdict(
            outcome,
            token=token,
            round=round_,
            differences=differences,
            tokens_compared=self._tokens_compared,
            rounds_compared=self._rounds_compared,
        )

    def _clipped(self, chunk: WorkerChunk) -> bool:
        """Whether a ceiling of the worker ended the replay before it had what it asked for."""
        ended_by_length = chunk.finish is not None and chunk.finish.reason == "length"
        return ended_by_length and len(chunk.token_ids) < self._max_new_tokens

    def _ends(self, finish: Finish, chunk: WorkerChunk) -> Difference:
        return Difference(
            "finish_reason",
            f"{self._record.finish_reason} after {len(self._tokens)} tokens",
            f"{finish.reason} after {len(chunk.token_ids)} tokens",
        )

    def _end_differences(self, finish: Finish, chunk: WorkerChunk) -> tuple[Difference, ...]:
        """What differs though all tokens are equal: why the answer ended, and its text."""
        found = []
        if finish.reason != self._record.finish_reason:
            found.append(self._ends(finish, chunk))
        left, right = self._record.text, chunk.text
        if left != right:
            pairs = enumerate(zip(left, right, strict=False))
            start = next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))
            found.append(Difference("text", _excerpt(left, start), _excerpt(right, start)))
        return tuple(found)

    def _token_difference(self, chunk: WorkerChunk) -> TokenDifference | None:
        actual = chunk.token_ids
        end = len(actual)
        if chunk.finish is not None and not self._clipped(chunk):
            end = max(end, len(self._tokens))
        for position in range(self._tokens_compared, end):
            left = self._tokens[position] if position < len(self._tokens) else None
            right = actual[position] if position < len(actual) else None
            if left != right:
                return TokenDifference(position, left, right)
            self._tokens_compared += 1
        return None

    def _round_difference(self, chunk: WorkerChunk) -> int | None:
        """The first round seen to differ.

        Digests are chained: an equal one vouches for every round before it. While the answer
        streams only the latest is known; the last chunk brings them all.
        """
        if chunk.finish is not None:
            actual = chunk.round_digests
            last = len(actual)
            if not self._clipped(chunk):
                last = max(last, len(self._digests))
            for number in range(1, last + 1):
                if actual[number - 1 : number] != self._digests[number - 1 : number]:
                    return number
                self._rounds_compared = max(self._rounds_compared, number)
            return None
        if chunk.cache is None or chunk.cache.rounds <= self._rounds_compared:
            return None
        number = chunk.cache.rounds
        if self._digests[number - 1 : number] != (chunk.cache.digest,):
            return number
        self._rounds_compared = number
        return None


def _excerpt(text: str, start: int) -> str:
    return f"{text[start : start + _EXCERPT]!r} from character {start}"


def _without_retractions(verdict: Verdict, record: Record, chunk: WorkerChunk) -> Verdict:
    """`verdict`, but no DIVERGED where the recorded answer or this one was retracted.

    What a retracted answer goes on from is a prefill of what it had, which rounds differently.
    """
    recorded = record.fingerprint.get(RETRACTIONS)
    current = str(chunk.retractions) if chunk.retractions else None
    retracted = recorded is not None or current is not None
    if verdict.outcome is not Outcome.DIVERGED or not retracted:
        return verdict
    return Verdict(
        Outcome.INCOMPARABLE,
        differences=(Difference(RETRACTIONS, recorded, current),),
        tokens_compared=verdict.tokens_compared,
        rounds_compared=verdict.rounds_compared,
    )


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
        gate: ReplayGate[Lease],
        *,
        share_prefix_cache: bool,
    ) -> None:
        """`share_prefix_cache`: tenants find each other's cached prompts."""
        self._router = router
        self._admissions = admissions
        self._store = store
        self._background = background
        self._gate = gate
        self._share_prefix_cache = share_prefix_cache

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
            cache_salt=None if self._share_prefix_cache else cache_salt(tenant),
        )
        comparison = Comparison(record, max_new_tokens)
        async with (
            self._turn(record, request, waiting) as lease,
            running(lease, request, self._background) as chunks,
        ):
            async for chunk in chunks:
                raise_if_aborted(chunk.finish)
                verdict = comparison.see(chunk)
                if verdict is not None:
                    return _without_retractions(verdict, record, chunk)
                await send(comparison.progress())
        raise AssertionError("a worker's last chunk has a finish reason")

    @asynccontextmanager
    async def _turn(
        self, record: Record, request: WorkerRequest, waiting: Waiting
    ) -> AsyncIterator[Lease]:
        """A lease on a worker as the one recorded, once it can spare what the replay needs.

        Raises `_Incomparable`, at once if there is none now, later if it is gone by its turn.
        """
        need = Need.of(request)  # of any model: the recorded fingerprint is looked for
        worker, _ = await self._worker_for(record)

        async def look() -> WorkerInfo:
            nonlocal worker
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
            return info

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
            yield lease

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
