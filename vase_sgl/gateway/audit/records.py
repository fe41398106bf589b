"""What is recorded of one generation: everything a replay needs."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from vase_sgl.gateway.seeds import Seeds
from vase_sgl.gateway.workers import CacheStats


class RecordStatus(enum.StrEnum):
    """How a generation ended."""

    #: It ran to its end and can be replayed.
    COMPLETED = "completed"
    #: The client cancelled, disconnected or passed its deadline.
    ABORTED = "aborted"
    #: The worker failed.
    FAILED = "failed"


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


@dataclasses.dataclass(frozen=True)
class StoredRecord:
    """A record and its place in the tenant's chain. Hashes are SHA-256 in hex."""

    record: Record
    sequence: int
    previous_hash: str
    hash: str
