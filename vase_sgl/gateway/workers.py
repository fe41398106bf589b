"""What the gateway asks of a worker."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, overload


@dataclasses.dataclass(frozen=True)
class WorkerRequest:
    """One generation as a worker gets it.

    request_id: 32 hex digits. A worker aborts by prefix, so ids have one width.
    sampling: SGLang sampling parameters, complete, `sampling_seed` included.
    eviction: `EvictionParams.to_mapping()`, or None for a request without eviction.
    inspect: have the worker write what the request keeps. It decides nothing of the answer, so it
        is no part of a record.
    cache_salt: requests with the same one share cached prompts. No part of a record either.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    eviction: Mapping[str, Any] | None
    inspect: bool = False
    cache_salt: str | None = None


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


class TokenPrefix(Sequence[int]):
    """The first tokens of a sequence that only grows: chunks of a long answer share it."""

    def __init__(self, growing: Sequence[int]) -> None:
        self._growing = growing
        self._length = len(growing)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return islice(self._growing, self._length)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        place = range(self._length)[index]
        if isinstance(place, int):
            return self._growing[place]
        return [self._growing[one] for one in place]


@dataclasses.dataclass(frozen=True)
class WorkerChunk:
    """The state of a generation. `text` and `token_ids` are cumulative.

    round_digests: digest after each round; only in the last chunk.
    retractions: how often the worker took the request's memory away, to prefill it again later.
    stamp: of the fingerprint that the worker had in the end; only in the last chunk.
    queue_seconds: how long the worker had it wait; None if it does not measure that.
    """

    text: str
    token_ids: Sequence[int]
    cache: CacheStats | None = None
    finish: Finish | None = None
    round_digests: tuple[str, ...] = ()
    retractions: int = 0
    stamp: str | None = None
    queue_seconds: float | None = None


#: Entries of a record's fingerprint that no worker has: of an answer with retractions, how many;
#: of one whose worker was another in the end (new weights, another process at its address), which.
RETRACTIONS = "num_retractions"
CHANGED = "changed_to"


#: What clients call a model, its weights and its tokenizer; by digest, or where a worker could not
#: read them by the weights' folder, and not at all.
Model = tuple[str, str, str]

_DIGEST = re.compile("[0-9a-f]{32}")


def weights_are_known(fingerprint: Mapping[str, str]) -> bool:
    """Whether the weights were read, and are those of no other digest."""
    return _DIGEST.fullmatch(fingerprint.get("weights_digest", "")) is not None


@dataclasses.dataclass(frozen=True)
class WorkerInfo:
    """What a worker is and how busy it is. Lengths and slots in tokens.

    stamp: short for the fingerprint; the worker's answers bear it.
    default_eviction: eviction parameters it would give a request that brings none.
    available_slots: slots that no running request owns.
    reserved_slots: slots that its running requests may come to own.
    model_name: what clients call its model.
    waiting_requests: requests it has that do not decode yet: in its queue or their prefill.
    max_running_requests: requests its scheduler runs at once, if it says so.
    max_query_requests: of these, requests whose policy reads queries, if it says so.
    query_requests: such requests that it has, if it says so.
    query_ring_slots: what each of them has beside its slots, in slots, if it says so.
    prefix_cache, page_size: how its slots are shared and handed out.
    can_inspect: it has a folder for what inspected requests kept.
    rank_slots: of `total_slots` those of one data-parallel rank, as a request does not span two.
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
    stamp: str | None = None
    model_name: str = ""
    waiting_requests: int = 0
    max_running_requests: int | None = None
    max_query_requests: int | None = None
    query_requests: int | None = None
    query_ring_slots: float | None = None
    prefix_cache: bool = True
    page_size: int = 1
    can_inspect: bool = False
    rank_slots: int | None = None

    def became(self, stamp: str | None) -> bool:
        """Whether an answer with this stamp ended at another worker than this; None: unknown."""
        return None not in (stamp, self.stamp) and stamp != self.stamp

    @cached_property
    def model(self) -> Model:
        """Which model it serves. A request stays with the one that it was tokenized for."""
        told = self.fingerprint
        tokenizer = told.get("tokenizer_digest", "")
        return (
            self.model_name,
            told["weights_digest"] if weights_are_known(told) else told.get("model", ""),
            tokenizer if _DIGEST.fullmatch(tokenizer) else "",
        )

    @property
    def unreserved_slots(self) -> int:
        """Slots that a further request could reserve."""
        return max(min(self.available_slots, self.total_slots - self.reserved_slots), 0)


@dataclasses.dataclass(frozen=True)
class Thinking:
    """What is before and after a thought in a model's text; neither is empty.

    begun: the prompt ends in `start`, so that the answer begins in a thought.
    end_ids: `end` as the tokenizer writes it; empty: older workers do not tell.
    """

    start: str
    end: str
    begun: bool
    end_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A prompt's tokens. `thinking`: of the answer to a chat, if the worker can tell."""

    token_ids: tuple[int, ...]
    thinking: Thinking | None = None


class Worker(Protocol):
    """A running model. Methods raise `WorkerUnavailable` if it cannot be reached, and
    `LimitExceeded` if this gateway can open no further connection."""

    @property
    def name(self) -> str:
        """For logs and error texts."""

    async def tokenize_text(self, text: str, *, max_tokens: int) -> Tokenized:
        """Token ids of `text`, special tokens included.

        max_tokens: the model's context length; of far more tokens the answer is not read.
        Raises `InvalidRequest`, and `TokenizingTimeout` if it takes too long.
        """

    async def tokenize_chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int
    ) -> Tokenized:
        """Token ids of a conversation with the assistant's turn opened. Raises the same.

        messages: `role`, `content`, and an assistant's `reasoning_content`.
        """

    def generate(self, request: WorkerRequest) -> AsyncGenerator[WorkerChunk, None]:
        """Run `request`; the last chunk has `finish`. Does not abort when closed early."""

    async def abort(self, request_id: str) -> None:
        """Give the request up and free its slots; unknown ids are ignored."""

    async def check_health(self) -> None:
        """Raise `WorkerUnavailable` unless the model answers. May take seconds."""

    async def info(self) -> WorkerInfo:
        """The worker's state now."""

    async def close(self) -> None:
        """Release connections and processes, once short calls under way have ended."""
