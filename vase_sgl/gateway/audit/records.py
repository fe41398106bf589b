"""What is recorded of one generation: everything a replay needs."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from vase_sgl import __version__
from vase_sgl.gateway.errors import FailedPrecondition
from vase_sgl.gateway.seeds import Seeds
from vase_sgl.gateway.tenants import Retention
from vase_sgl.gateway.workers import CacheStats


class RecordStatus(enum.StrEnum):
    """How a generation ended."""

    #: It ran to its end and can be replayed.
    COMPLETED = "completed"
    #: The client cancelled, disconnected, did not read or passed its deadline, or the gateway
    #: stopped.
    ABORTED = "aborted"
    #: The worker failed or refused the request, or the gateway failed.
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class ContentDigests:
    """Stand for content that is not kept: they prove it to whoever has it. All in hex.

    Each is SHA-256 over the salt's 16 bytes and the content: token ids as little-endian int32,
    text as UTF-8. The salt keeps equal prompts apart; it does not hide a prompt one can guess.
    """

    salt: str
    prompt: str
    output: str
    text: str


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds since the request arrived. None: that point was not reached."""

    queue_seconds: float
    ttft_seconds: float | None
    total_seconds: float


@dataclasses.dataclass(frozen=True)
class Record:
    """One generation.

    created_unix_micros: arrival of the request.
    sampling: SGLang sampling parameters, complete, `max_new_tokens` and `sampling_seed` included.
    eviction: `EvictionParams.to_mapping()`, or None without eviction.
    finish_reason: `stop`, `length`, `abort`, or empty if the worker did not say.
    failure: what went wrong, for a failed generation.
    retention: what the store keeps of the content. Read back with `hash`, prompt_token_ids,
        output_token_ids and text are empty, sampling has no `stop`, and digests are there.
    """

    record_id: str
    tenant: str
    created_unix_micros: int
    status: RecordStatus
    failure: str
    input_kind: str
    prompt_token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    eviction: Mapping[str, Any] | None
    seeds: Seeds
    sample_index: int
    output_token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    cache: CacheStats | None
    round_digests: tuple[str, ...]
    fingerprint: Mapping[str, str]
    timings: Timings
    retention: Retention
    prompt_tokens: int
    completion_tokens: int
    digests: ContentDigests | None = None


@dataclasses.dataclass(frozen=True)
class StoredRecord:
    """A record and its place in the tenant's chain. Hashes are SHA-256 in hex."""

    record: Record
    sequence: int
    previous_hash: str
    hash: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """A stored record in short, and its place.

    Of one that a newer gateway wrote, what this one does not know is None or empty.
    """

    record_id: str
    created_unix_micros: int
    sequence: int
    hash: str
    status: RecordStatus | None = None
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    policy: str = ""
    budget: int = 0
    rounds: int = 0
    digest: str = ""
    retention: Retention | None = None


def newer_record(record_id: str, what: str) -> FailedPrecondition:
    """The error for a record with something that this version does not know, so that it can neither
    say what is in it nor do it again."""
    return FailedPrecondition(
        f"record {record_id} has {what}, which this gateway, of vase_sgl {__version__}, does not "
        "know; ask one of the version that recorded it"
    )
