"""What the client takes and gives: frozen dataclasses."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


#: Text, token ids or a conversation. One sequence of the two kinds, not one of each, so that type
#: checkers take a list of plain dicts for messages.
Prompt = str | Sequence[int | Message]

#: What happens to the prompt's KV entries: the budget covers them, or they are never evicted and
#: the budget covers generated tokens alone.
PromptMode = Literal["evict", "keep"]

# `unknown` and `UNKNOWN` stand for what the gateway does not say, or says in a word that is newer
# than this client.
FinishReason = Literal["stop", "length", "abort", "unknown"]
RecordStatus = Literal["completed", "aborted", "failed", "unknown"]
Retention = Literal["full", "hash", "unknown"]
SeedCheck = Literal["VERIFIED", "MISMATCH", "VERSION_REMOVED", "ORIGIN_UNKNOWN", "UNKNOWN"]


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """A request's KV cache at one moment, in tokens (= slots) per layer.

    logical_length: tokens of prompt and output so far.
    physical_length: tokens whose KV entries are cached.
    rounds: eviction rounds so far; evicted_tokens: tokens they evicted, per layer and KV head.
    reserved_slots: slots reserved now, the most it may still own; from the first round on budget
    and window, and with prompt mode `keep` the prompt.
    digest: 16 hex digits that identify what was evicted.
    """

    logical_length: int
    physical_length: int
    rounds: int
    evicted_tokens: int
    reserved_slots: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New output. `cache` is None for a request without eviction."""

    text: str
    token_ids: tuple[int, ...]
    cache: CacheStats | None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Seeds:
    """The seeds that were used, the tenant's seed policy and the version of its secret.

    origin: what they were derived from, `request-seed`, `request-id` or `tenant`; empty in old
    records. request_seed: None with another origin.
    """

    sampling: int
    eviction: int
    policy: str
    master_version: int
    origin: str
    request_seed: int | None


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds from the request's arrival at the gateway: until it was handed to the worker, until
    the first token (None: there was none), until the last."""

    queue_seconds: float
    ttft_seconds: float | None
    total_seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """How a generation ended. `full_kv_slots`: what a full cache would have held at the end."""

    finish_reason: FinishReason
    usage: Usage
    seeds: Seeds
    cache: CacheStats | None
    round_digests: tuple[str, ...]
    timings: Timings
    full_kv_slots: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """One whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    result: Result


@dataclasses.dataclass(frozen=True)
class ReplayProgress:
    """How far a replay has come; everything so far was equal."""

    tokens_compared: int
    tokens_total: int
    rounds_compared: int
    rounds_total: int


@dataclasses.dataclass(frozen=True)
class FingerprintDifference:
    """One entry of the fingerprint, or of how the answer ended, that differs. None: not there."""

    key: str
    recorded: str | None
    current: str | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a replay.

    first_differing_token: index from 0; expected_token or actual_token is None where that side
    had ended. first_differing_round: from 1. differences: why it is INCOMPARABLE, or how the
    answers ended where all tokens are equal and it is DIVERGED. seed_check: whether the recorded
    seeds are what the tenant's master secret gives.
    """

    outcome: Literal["MATCH", "DIVERGED", "INCOMPARABLE"]
    first_differing_token: int | None
    expected_token: int | None
    actual_token: int | None
    first_differing_round: int | None
    differences: tuple[FingerprintDifference, ...]
    tokens_compared: int
    rounds_compared: int
    seed_check: SeedCheck


@dataclasses.dataclass(frozen=True)
class ContentDigests:
    """Salted SHA-256 of content that was not kept, in hex; the proto file says of what."""

    salt: str
    prompt: str
    output: str
    text: str


@dataclasses.dataclass(frozen=True)
class Eviction:
    """Eviction parameters of a record; fields of other policies are None."""

    policy: str
    budget: int
    window: int
    prompt_mode: PromptMode | Literal["unknown"]
    num_sinks: int | None
    protected_share: float | None
    pool_width: int | None
    projection_dim: int | None
    mix_lambda: float | None


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything recorded of one generation, and its place in the tenant's hash chain.

    With the retention `hash`, prompt, output, text and stop strings are empty and digests is there.
    """

    record_id: str
    created: datetime.datetime
    status: RecordStatus
    failure: str
    input_kind: str
    prompt_token_ids: tuple[int, ...]
    sampling: Mapping[str, object]
    max_new_tokens: int
    eviction: Eviction | None
    seeds: Seeds
    sample_index: int
    output_token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    cache: CacheStats | None
    round_digests: tuple[str, ...]
    fingerprint: Mapping[str, str]
    timings: Timings
    sequence: int
    previous_hash: str
    hash: str
    retention: Retention
    usage: Usage
    digests: ContentDigests | None


@dataclasses.dataclass(frozen=True)
class RecordSummary:
    """A record in short. Policy and digest are empty and budget is 0 without eviction."""

    record_id: str
    created: datetime.datetime
    status: RecordStatus
    finish_reason: FinishReason
    usage: Usage
    policy: str
    budget: int
    rounds: int
    digest: str
    retention: Retention


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Slots and ceilings.

    context_length: the model's; answers end two tokens before it. slots_per_request,
    requests_that_fit: None unless a budget was asked about; the latter of a policy that reads
    queries. query_ring_slots: memory that a request has beside its slots if its policy reads
    queries, in slots; None if no worker says.
    """

    total_slots: int
    available_slots: int
    reserved_slots: int
    running_requests: int
    rounds: int
    evicted_tokens: int
    context_length: int
    max_budget: int
    max_window: int
    max_new_tokens: int
    max_prompt_tokens: int
    policies: tuple[str, ...]
    fingerprint: Mapping[str, str]
    slots_per_request: int | None
    requests_that_fit: int | None
    query_ring_slots: float | None
