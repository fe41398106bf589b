"""Load on one worker: streamed `/generate` requests, all submitted at once, by token ids."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

_QUIET_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Request:
    """input_ids: the prompt. vase: eviction parameters, or None for a full KV cache."""

    input_ids: tuple[int, ...]
    max_new_tokens: int
    vase: dict[str, Any] | None = None
    temperature: float = 0.0
    seed: int | None = None
    logprobs: bool = False

    def body(self, *, stream: bool) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
        }
        if self.seed is not None:
            sampling["sampling_seed"] = self.seed
        if self.vase is not None:
            sampling["custom_params"] = {"vase": self.vase}
        body = {"input_ids": list(self.input_ids), "stream": stream, "sampling_params": sampling}
        return body | ({"return_logprob": True} if self.logprobs else {})


@dataclasses.dataclass
class Arrivals:
    """What came for one request: (seconds since submission of the set, tokens) per message."""

    messages: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    finish: str | None = None
    statistics: dict[str, Any] | None = None

    @property
    def first(self) -> float | None:
        """Time to first token."""
        return self.messages[0][0] if self.messages else None

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.messages)

    def before(self, end: float) -> Arrivals:
        """The messages up to a moment."""
        kept = [message for message in self.messages if message[0] <= end]
        return Arrivals(kept, self.finish if len(kept) == len(self.messages) else None)

    def per_token(self) -> float | None:
        """Time per output token: first to last, over the tokens after the first message."""
        if len(self.messages) < 2:
            return None
        after = self.tokens - self.messages[0][1]
        return (self.messages[-1][0] - self.messages[0][0]) / after


@dataclasses.dataclass
class Burst:
    """A set of requests submitted at once.

    seconds: until the last finished, or until the load was cut.
    complete: every request has finished.
    gauges: from the worker's /metrics, every second, at first more often: (seconds, running,
        waiting, retracted in total, share of KV slots in use).
    """

    arrivals: list[Arrivals]
    seconds: float
    complete: bool
    gauges: list[tuple[float, float, float, float, float]]

    def tokens_between(self, start: float, end: float) -> int:
        return sum(n for one in self.arrivals for t, n in one.messages if start < t <= end)

    def tokens_by_second(self) -> list[int]:
        bins = [0] * (int(self.seconds) + 1)
        for one in self.arrivals:
            for moment, count in one.messages:
                bins[min(int(moment), len(bins) - 1)] += count
        return bins

    @property
    def peak_running(self) -> int:
        return int(max((gauge[1] for gauge in self.gauges), default=0))

    @property
    def retractions(self) -> int:
        """Of this set; the worker's counter only grows."""
        return int(self.gauges[-1][3] - self.gauges[0][3]) if self.gauges else 0


def prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts, no two alike, the same for the same seed."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(2, vocabulary) for _ in range(tokens)) for _ in range(count)]


async def burst(url: str, requests: Sequence[Request], *, seconds: float | None = None) -> Burst:
    """Submit all at once and read their streams; after `seconds` abort what is left.

    Returns when the worker is idle again and its prefix cache is empty. Raises RuntimeError if a
    request ends with an error.
    """
    arrivals = [Arrivals() for _ in requests]
    gauges: list[tuple[float, float, float, float, float]] = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        started = time.perf_counter()
        gauges.append(await _gauges(http, url, started))
        watcher = asyncio.create_task(_watch(http, url, started, gauges))
        tasks = [
            asyncio.create_task(_stream(http, url, request, started, into))
            for request, into in zip(requests, arrivals, strict=True)
        ]
        done, left = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        elapsed = time.perf_counter() - started
        watcher.cancel()
        for task in left:
            task.cancel()
        await asyncio.gather(*left, watcher, return_exceptions=True)
        await _quiet(http, url)
        for task in done:
            task.result()  # raises what it raised
        gauges.append(await _gauges(http, url, started))
    last = max((one.messages[-1][0] for one in arrivals if one.messages), default=elapsed)
    return Burst(arrivals, elapsed if left else last, not left, gauges)


async def answer(http: aiohttp.ClientSession, url: str, request: Request) -> dict[str, Any]:
    """One whole answer, not streamed."""
    async with http.post(f"{url}/generate", json=request.body(stream=False)) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:400]}")
        return dict(await response.json())


async def state(url: str) -> dict[str, Any]:
    """`internal_states[0]` of /server_info."""
    async with aiohttp.ClientSession() as http, http.get(f"{url}/server_info") as response:
        response.raise_for_status()
        return dict((await response.json())["internal_states"][0])


async def _stream(
    http: aiohttp.ClientSession, url: str, request: Request, started: float, into: Arrivals
) -> None:
    async with http.post(f"{url}/generate", json=request.body(stream=True)) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:400]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the worker answered {event['error']}")
            if count := len(event["output_ids"]):
                into.messages.append((time.perf_counter() - started, count))
            meta = event["meta_info"]
            into.statistics = meta.get("vase", into.statistics)
            if (finish := meta["finish_reason"]) is not None:
                into.finish = finish["type"]
                if into.finish == "abort":
                    raise RuntimeError(f"the worker ended a request: {finish}")


async def _quiet(http: aiohttp.ClientSession, url: str) -> None:
    """Abort everything, and wait until the worker can empty its prefix cache: it is idle."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while time.monotonic() < deadline:
        async with http.post(f"{url}/abort_request", json={"rid": "", "abort_all": True}):
            pass
        async with http.post(f"{url}/flush_cache", params={"timeout": "5"}) as response:
            if response.status == 200:
                return
        await asyncio.sleep(0.2)
    raise RuntimeError(f"the worker was still busy after {_QUIET_SECONDS} s")


async def _watch(
    http: aiohttp.ClientSession,
    url: str,
    started: float,
    gauges: list[tuple[float, float, float, float, float]],
) -> None:
    while True:
        # Short runs are over before a second is.
        await asyncio.sleep(0.1 if time.perf_counter() - started < 2 else 1)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            gauges.append(await _gauges(http, url, started))


async def _gauges(
    http: aiohttp.ClientSession, url: str, started: float
) -> tuple[float, float, float, float, float]:
    async with http.get(f"{url}/metrics") as response:
        response.raise_for_status()
        text = await response.text()
    now = time.perf_counter() - started
    return (
        now,
        metric(text, "sglang:num_running_reqs"),
        metric(text, "sglang:num_queue_reqs"),
        metric(text, "sglang:num_retracted_requests_total"),
        metric(text, "sglang:token_usage"),
    )


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels; 0 before its first value."""
    pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$"
    return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))
