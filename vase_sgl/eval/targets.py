"""Where questions go: a worker over SGLang's HTTP interface, or a gateway through the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vase_sgl.client.types import Message
from vase_sgl.eval.arms import Arm
from vase_sgl.eviction.params import MAX_SEED, EvictionLimits, EvictionParams

if TYPE_CHECKING:
    from vase_sgl.client import AsyncClient
    from vase_sgl.gateway.worker_http import HttpWorker
    from vase_sgl.gateway.workers import WorkerChunk

logger = logging.getLogger(__name__)

#: A worker that sends nothing for so long is given up, in seconds.
STALL_SECONDS = 600.0


class TargetError(Exception):
    """A question has no answer, or the target cannot be used. The text says why.

    request_id: of the request, if it got as far as having one. partial: what had come of its
    answer, if anything.
    """

    def __init__(
        self, message: str, request_id: str | None = None, partial: Answer | None = None
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.partial = partial


class RequestAborted(TargetError):
    """The worker gave the request up, for lack of memory for instance."""


class TargetChanged(TargetError):
    """Another model answers than at the connection."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn, and how they begin. top_k -1: all.

    opens_think: the model's chat template ends in an open think block, so answers begin inside it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    opens_think: bool = False

    def options(self) -> dict[str, Any]:
        """As the SDK names them, but for max_new_tokens."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came. Fields as in `vase_sgl.eval.rows.Row`."""

    request_id: str
    text: str
    finish_reason: str | None
    seeds: Mapping[str, int]
    prompt_tokens: int
    output_tokens: int
    rounds: int
    evicted_tokens: int
    physical_length: int
    reserved_slots: int
    full_kv_slots: int
    ttft_seconds: float | None
    queue_seconds: float | None
    digest: str | None


@dataclasses.dataclass(frozen=True)
class TargetInfo:
    """What the target is. fingerprint: of its worker. counters: totals since it started, by name;
    those that it does not report are not there. query_ring_slots: memory of a request's query
    ring, in slots; None if it does not report that."""

    fingerprint: Mapping[str, str]
    max_budget: int
    max_window: int
    total_slots: int
    counters: Mapping[str, float]
    query_ring_slots: float | None


class Target(Protocol):
    """A model that answers. Methods raise `TargetError`.

    `answer` also raises `RequestAborted`, and `TargetChanged` where answers tell who gave them.
    """

    @property
    def name(self) -> str:
        """Address, for people."""

    async def info(self) -> TargetInfo:
        """What it is, and its counters now."""

    async def answer(
        self, messages: Sequence[Message], arm: Arm, sampling: Sampling, seed: int
    ) -> Answer:
        """Ask under an arm. Cancelling aborts the request."""

    async def empty_prefix_cache(self) -> bool:
        """Forget prompts that were asked before; whether it could."""

    async def close(self) -> None:
        """Release connections."""


def request_seed(run_seed: int, task: str, item_id: str, seed_index: int) -> int:
    """Seed of one sample, 0 to 2^63 - 1, the same in every arm.

    First 8 bytes, big-endian and without the highest bit, of SHA-256 over the four, each preceded
    by its length.
    """
    return _hash63("vase-sgl eval request v1", run_seed, task, item_id, seed_index)


def eviction_seed(seed: int) -> int:
    """The eviction seed that belongs to a request seed where no gateway derives it."""
    return _hash63("vase-sgl eval eviction v1", seed)


class WorkerTarget:
    """A worker, asked directly. Needs the gateway's packages, but no gateway."""

    def __init__(self, worker: HttpWorker) -> None:
        self._worker = worker
        #: What its model and it allow, once it was asked.
        self._limits: EvictionLimits | None = None
        self._context_length = 0
        #: Of the fingerprint at the connection; None also for a worker that does not tell.
        self._stamp: str | None = None

    @property
    def name(self) -> str:
        return self._worker.name

    async def info(self) -> TargetInfo:
        from vase_sgl.gateway.errors import GatewayError

        try:
            info = await self._worker.info()
        except GatewayError as error:
            raise TargetError(str(error)) from error
        counters: dict[str, float] = {"rounds": info.rounds, "evicted_tokens": info.evicted_tokens}
        if self._limits is None:
            self._stamp = info.stamp
        self._limits = EvictionLimits(info.max_budget, info.max_window)
        self._context_length = info.context_length
        retractions = await _retractions(self._worker.name)
        if retractions is not None:
            counters["retractions"] = retractions
        return TargetInfo(
            fingerprint=dict(info.fingerprint),
            max_budget=info.max_budget,
            max_window=info.max_window,
            total_slots=info.total_slots,
            counters=counters,
            query_ring_slots=info.query_ring_slots,
        )

    async def answer(
        self, messages: Sequence[Message], arm: Arm, sampling: Sampling, seed: int
    ) -> Answer:
        from vase_sgl.gateway.errors import GatewayError
        from vase_sgl.gateway.workers import WorkerRequest

        seeds = {
            "request": seed,
            "sampling": _hash63("vase-sgl eval sampling v1", seed),
            "eviction": eviction_seed(seed),
        }
        request_id = uuid.uuid4().hex
        if self._limits is None:
            await self.info()
        # Every field explicit: nothing is left to the worker's defaults.
        eviction = EvictionParams.parse(arm.params(seeds["eviction"]), self._limits).to_mapping()
        start, ttft, last, done = time.monotonic(), None, None, False
        tokens: Sequence[int] = ()

        def answer_so_far() -> Answer | None:
            if last is None or not last.token_ids:
                return None
            return _worker_answer(request_id, seeds, len(tokens), last, ttft)

        try:
            tokenized = await self._worker.tokenize_chat(
                [dict(m) for m in messages],  # type: ignore[arg-type]
                max_tokens=self._context_length,
            )
            tokens = tokenized.token_ids
            request = WorkerRequest(
                request_id=request_id,
                prompt_token_ids=tokens,
                sampling={
                    "max_new_tokens": sampling.max_new_tokens,
                    **sampling.options(),
                    "stop": [],
                    "sampling_seed": seeds["sampling"],
                },
                eviction=eviction,
            )
            async for last in self._worker.generate(request):
                if ttft is None and last.token_ids:
                    ttft = time.monotonic() - start
            done = True
            await self._check_stamp(last.stamp if last else None, request_id)
        except GatewayError as error:
            raise TargetError(str(error), request_id, answer_so_far()) from error
        finally:
            if not done:
                await self._give_up(request_id)
        assert last is not None and last.finish is not None  # `generate` raises otherwise
        if last.finish.reason == "abort":
            reason = last.finish.message or "aborted by the worker"
            raise RequestAborted(reason, request_id, answer_so_far())
        return _worker_answer(request_id, seeds, len(tokens), last, ttft)

    async def empty_prefix_cache(self) -> bool:
        from vase_sgl.gateway.errors import GatewayError

        try:
            await self._worker.empty_prefix_cache()
        except GatewayError as error:
            logger.warning("the prefix cache was not emptied before an arm: %s", error)
            return False
        return True

    async def close(self) -> None:
        await self._worker.close()

    async def _check_stamp(self, stamp: str | None, request_id: str) -> None:
        """Refuse an answer that bears another stamp than the worker had at the connection."""
        if self._stamp is None:
            return
        if stamp is None:  # of a process that nobody has asked for its fingerprint yet
            stamp = (await self._worker.info()).stamp
        if stamp != self._stamp:
            raise TargetChanged(
                f"{self.name} has other weights or is another worker than when the run connected "
                f"(stamp {stamp}, then {self._stamp}); its answer was not kept. Start the worker "
                "as it was and give the same command, or choose another --output",
                request_id,
            )

    async def _give_up(self, request_id: str) -> None:
        """Free the request's slots, even while this task is being cancelled."""
        from vase_sgl.gateway.errors import GatewayError

        async def abort() -> None:
            with contextlib.suppress(GatewayError):  # it is gone, and the request with it
                await self._worker.abort(request_id)

        await asyncio.shield(asyncio.ensure_future(abort()))


class GatewayTarget:
    """A gateway. It records every request, so that each row can be replayed by its request id.

    Where it has no room for a request, for the tenant's limits or a full queue, `answer` waits as
    long as it says and asks again: that says nothing about the question. `say` is told why.
    """

    def __init__(self, target: str, client: AsyncClient, say: Callable[[str], None]) -> None:
        self._target = target
        self._client = client
        self._say = say

    @property
    def name(self) -> str:
        return self._target

    async def info(self) -> TargetInfo:
        from vase_sgl.client import VaseError

        try:
            capacity = await self._client.capacity()
        except VaseError as error:
            raise TargetError(str(error)) from error
        return TargetInfo(
            fingerprint=dict(capacity.fingerprint),
            max_budget=capacity.max_budget,
            max_window=capacity.max_window,
            total_slots=capacity.total_slots,
            counters={"rounds": capacity.rounds, "evicted_tokens": capacity.evicted_tokens},
            query_ring_slots=capacity.query_ring_slots,
        )

    async def answer(
        self, messages: Sequence[Message], arm: Arm, sampling: Sampling, seed: int
    ) -> Answer:
        from vase_sgl.client import RateLimited, VaseError

        eviction = dict(arm.eviction)
        if "prompt" in eviction:
            eviction["prompt_mode"] = eviction.pop("prompt")
        start = time.monotonic()
        while True:
            stream = self._client.generate(
                list(messages),
                max_new_tokens=sampling.max_new_tokens,
                seed=seed,
                **sampling.options(),
                **eviction,
            )
            request_id, text = None, []
            try:
                async with stream:
                    request_id = await stream.started()
                    text = [chunk.text async for chunk in stream]
                break
            except VaseError as error:
                pause = error.retry_seconds
                if not isinstance(error, RateLimited) or error.final or pause is None:
                    kind = RequestAborted if error.code == "ABORTED" else TargetError
                    raise kind(f"{error.code}: {error}", request_id) from error
                waited = time.monotonic() - start
                self._say(f"no room for {waited:.0f} s ({error}); a lower --concurrency asks less")
                await asyncio.sleep(pause)
        seconds = time.monotonic() - start
        result = stream.result
        cache, timings = result.cache, result.timings
        return Answer(
            request_id=request_id,
            text="".join(text),
            finish_reason=result.finish_reason,
            seeds={
                "request": seed,
                "sampling": result.seeds.sampling,
                "eviction": result.seeds.eviction,
            },
            prompt_tokens=result.usage.prompt_tokens,
            output_tokens=result.usage.completion_tokens,
            rounds=cache.rounds if cache else 0,
            evicted_tokens=cache.evicted_tokens if cache else 0,
            physical_length=cache.physical_length if cache else result.full_kv_slots,
            reserved_slots=cache.reserved_slots if cache else result.full_kv_slots,
            full_kv_slots=result.full_kv_slots,
            ttft_seconds=timings.ttft_seconds,
            # The gateway knows this attempt alone, neither earlier ones nor the waits after them.
            queue_seconds=seconds - (timings.total_seconds - timings.queue_seconds),
            digest=cache.digest if cache else None,
        )

    async def empty_prefix_cache(self) -> bool:
        return False  # it is the workers', which a gateway's clients do not reach

    async def close(self) -> None:
        await self._client.close()


def _worker_answer(
    request_id: str,
    seeds: Mapping[str, int],
    prompt_tokens: int,
    last: WorkerChunk,
    ttft: float | None,
) -> Answer:
    """Of the last chunk that came."""
    cache, full = last.cache, prompt_tokens + len(last.token_ids)
    return Answer(
        request_id=request_id,
        text=last.text,
        finish_reason=last.finish.reason if last.finish else None,
        seeds=seeds,
        prompt_tokens=prompt_tokens,
        output_tokens=len(last.token_ids),
        rounds=cache.rounds if cache else 0,
        evicted_tokens=cache.evicted_tokens if cache else 0,
        physical_length=cache.physical_length if cache else full,
        reserved_slots=cache.reserved_slots if cache else full,
        full_kv_slots=full,
        ttft_seconds=ttft,
        queue_seconds=last.queue_seconds,
        digest=cache.digest if cache else None,
    )


async def _retractions(url: str) -> float | None:
    """`sglang:num_retracted_requests_total`, summed; None if the worker shows no metrics."""
    import aiohttp
    from prometheus_client.parser import text_string_to_metric_families

    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.get(f"{url}/metrics") as response,
        ):
            if response.status != 200:
                return None
            text = await response.text()
    except aiohttp.ClientError as error:
        raise TargetError(f"worker {url} does not answer /metrics: {error}") from error
    if "sglang:" not in text:
        return None  # metrics are off
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "sglang:num_retracted_requests_total"
    )


def _hash63(*parts: str | int) -> int:
    encoded = [str(part).encode() for part in parts]
    message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "big") & MAX_SEED
