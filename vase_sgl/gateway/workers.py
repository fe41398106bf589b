"""What the gateway asks of a worker, and the router over several of them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from vase_sgl.gateway.errors import GatewayError, WorkerUnavailable

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WorkerRequest:
    """One generation as a worker gets it.

    request_id: 32 hex digits. A worker aborts by prefix, so ids have one width.
    sampling: SGLang sampling parameters, complete, `sampling_seed` included.
    eviction: `EvictionParams.to_mapping()`, or None for a request without eviction.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    eviction: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """A request's KV cache at one moment, in tokens (= slots) per layer."""

    logical_length: int
    physical_length: int
    rounds: int
    evicted_tokens: int
    reserved_slots: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Finish:
    """Why a worker ended a request: `stop`, `length` or `abort`, the latter with a message."""

    reason: str
    message: str = ""
    status_code: int | None = None


@dataclasses.dataclass(frozen=True)
class WorkerChunk:
    """The state of a generation. `text` and `token_ids` are cumulative.

    round_digests: digest after each round; only in the last chunk.
    """

    text: str
    token_ids: tuple[int, ...]
    cache: CacheStats | None = None
    finish: Finish | None = None
    round_digests: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class WorkerInfo:
    """What a worker is and how busy it is. Lengths and slots in tokens.

    default_eviction: eviction parameters it would give a request that brings none.
    """

    fingerprint: Mapping[str, str]
    default_eviction: Mapping[str, Any] | None
    max_budget: int
    max_window: int
    context_length: int
    vocab_size: int | None
    total_slots: int
    available_slots: int
    reserved_slots: int
    running_requests: int
    rounds: int
    evicted_tokens: int


class Worker(Protocol):
    """A running model. Methods raise `WorkerUnavailable` if it cannot be reached."""

    @property
    def name(self) -> str:
        """For logs and error texts."""

    async def tokenize_text(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, special tokens included. Raises `InvalidRequest`."""

    async def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a conversation with the assistant's turn opened. Raises `InvalidRequest`."""

    def generate(self, request: WorkerRequest) -> AsyncGenerator[WorkerChunk, None]:
        """Run `request`; the last chunk has `finish`. Does not abort when closed early."""

    async def abort(self, request_id: str) -> None:
        """Give the request up and free its slots; unknown ids are ignored."""

    async def check_health(self) -> None:
        """Raise `WorkerUnavailable` unless the model answers. May take seconds."""

    async def info(self) -> WorkerInfo:
        """The worker's state now."""

    async def close(self) -> None:
        """Release connections and processes."""


class WorkerRouter:
    """Hands out healthy workers in turn and watches their health.

    `on_change(ready)` is awaited whenever the answer to "is any worker ready?" changes.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        interval_seconds: float,
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._workers = tuple(workers)
        self._interval = interval_seconds
        self._on_change = on_change
        self._ready: dict[str, WorkerInfo] = {}
        self._failures: dict[str, str] = {}
        self._turn = itertools.count()
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch. Needs a running event loop."""
        self._watch = asyncio.create_task(self._watch_forever(), name="vase-worker-health")

    async def close(self) -> None:
        """Stop watching and close every worker."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))

    def pick(self) -> tuple[Worker, WorkerInfo]:
        """The next ready worker and its last known state. Raises `WorkerUnavailable`."""
        return self.ready()[0]

    def ready(self) -> list[tuple[Worker, WorkerInfo]]:
        """Every ready worker, the next in turn first. Raises `WorkerUnavailable` if there is none.

        The states are those of the last health check; lengths, limits and fingerprint hold.
        """
        ready = [
            (worker, self._ready[worker.name])
            for worker in self._workers
            if worker.name in self._ready
        ]
        if not ready:
            reasons = "; ".join(self._failures.values()) or "none has answered yet; try again later"
            raise WorkerUnavailable(f"no worker is ready: {reasons}")
        first = next(self._turn) % len(ready)
        return ready[first:] + ready[:first]

    async def current(self) -> list[tuple[Worker, WorkerInfo]]:
        """As `ready`, but with states fetched now; a worker that does not answer is left out."""
        ready = self.ready()
        infos = await asyncio.gather(
            *(worker.info() for worker, _ in ready), return_exceptions=True
        )
        current: list[tuple[Worker, WorkerInfo]] = []
        for (worker, _), info in zip(ready, infos, strict=True):
            if isinstance(info, WorkerInfo):
                current.append((worker, info))
            elif not isinstance(info, GatewayError):
                raise info
        if not current:
            raise WorkerUnavailable("no worker answers; try again later")
        return current

    async def check_all(self) -> None:
        """Probe every worker once and report a change of readiness."""
        before = bool(self._ready)
        await asyncio.gather(*(self._check(worker) for worker in self._workers))
        if bool(self._ready) != before:
            await self._on_change(bool(self._ready))

    async def _check(self, worker: Worker) -> None:
        try:
            await worker.check_health()
            info = await worker.info()
        except GatewayError as error:
            if self._ready.pop(worker.name, None) is not None:
                logger.error("worker %s is lost: %s", worker.name, error)
            self._failures[worker.name] = str(error)
        else:
            if worker.name not in self._ready:
                logger.info("worker %s is ready", worker.name)
            self._ready[worker.name] = info
            self._failures.pop(worker.name, None)

    async def _watch_forever(self) -> None:
        while True:
            try:
                await self.check_all()
            except Exception:
                # A defect in one probe must not end the watch: health would freeze unnoticed.
                logger.exception("health check failed")
            await asyncio.sleep(self._interval)
