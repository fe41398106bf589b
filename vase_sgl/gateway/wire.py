"""From the gateway's own types to protobuf messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vase_sgl.gateway import audit, workers
from vase_sgl.gateway.seeds import Seeds
from vase_sgl.gateway.tenants import Retention
from vase_sgl.rpc.v1 import gateway_pb2 as pb

_FINISH = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}
#: Prompt modes by the names that `EvictionParams` gives them.
PROMPT_MODES = {"evict": pb.PROMPT_MODE_EVICT, "keep": pb.PROMPT_MODE_KEEP}
_STATUS = {
    audit.RecordStatus.COMPLETED: pb.RECORD_STATUS_COMPLETED,
    audit.RecordStatus.ABORTED: pb.RECORD_STATUS_ABORTED,
    audit.RecordStatus.FAILED: pb.RECORD_STATUS_FAILED,
}
_RETENTION = {
    Retention.FULL: pb.RETENTION_FULL,
    Retention.HASH: pb.RETENTION_HASH,
}


def finish_reason(reason: str) -> pb.FinishReason.ValueType:
    """The enum of a worker's finish reason."""
    return _FINISH.get(reason, pb.FINISH_REASON_UNSPECIFIED)


def cache(stats: workers.CacheStats | None) -> pb.CacheStats | None:
    """Cache statistics, or None, which leaves the field absent."""
    return None if stats is None else pb.CacheStats(**vars(stats))


def seeds(value: Seeds) -> pb.Seeds:
    """Seeds and their origin."""
    return pb.Seeds(
        sampling=value.sampling,
        eviction=value.eviction,
        policy=value.policy,
        master_version=value.master_version,
        origin=value.origin or "",
        request_seed=value.request_seed,
    )


def timings(value: audit.Timings) -> pb.Timings:
    """Durations in seconds."""
    return pb.Timings(**vars(value))


def result(record: audit.Record) -> pb.GenerationResult:
    """The last message of a generation."""
    return pb.GenerationResult(
        finish_reason=finish_reason(record.finish_reason),
        usage=usage(record),
        seeds=seeds(record.seeds),
        cache=cache(record.cache),
        round_digests=record.round_digests,
        timings=timings(record.timings),
        full_kv_slots=record.prompt_tokens + record.completion_tokens,
    )


def usage(record: audit.Record) -> pb.Usage:
    """Token counts."""
    return pb.Usage(prompt_tokens=record.prompt_tokens, completion_tokens=record.completion_tokens)


def sampling(params: Mapping[str, Any]) -> pb.SamplingParams:
    """Recorded sampling parameters; seed and max_new_tokens have fields of their own."""
    return pb.SamplingParams(
        **{k: v for k, v in params.items() if k not in ("max_new_tokens", "sampling_seed")}
    )


def eviction(params: Mapping[str, Any] | None) -> pb.EvictionParams | None:
    """Recorded eviction parameters; the seed has a field of its own."""
    if params is None:
        return None
    fields = {k: v for k, v in params.items() if k not in ("prompt", "seed")}
    return pb.EvictionParams(**fields, prompt_mode=PROMPT_MODES[params["prompt"]])


def record(stored: audit.StoredRecord) -> pb.Record:
    """A whole record."""
    value = stored.record
    return pb.Record(
        record_id=value.record_id,
        created_unix_micros=value.created_unix_micros,
        status=_STATUS[value.status],
        failure=value.failure,
        input_kind=value.input_kind,
        prompt_token_ids=value.prompt_token_ids,
        sampling=sampling(value.sampling),
        max_new_tokens=value.sampling["max_new_tokens"],
        eviction=eviction(value.eviction),
        seeds=seeds(value.seeds),
        sample_index=value.sample_index,
        output_token_ids=value.output_token_ids,
        text=value.text,
        finish_reason=finish_reason(value.finish_reason),
        cache=cache(value.cache),
        round_digests=value.round_digests,
        fingerprint=value.fingerprint,
        timings=timings(value.timings),
        sequence=stored.sequence,
        previous_hash=stored.previous_hash,
        hash=stored.hash,
        retention=_RETENTION[value.retention],
        usage=usage(value),
        digests=None if value.digests is None else pb.ContentDigests(**vars(value.digests)),
    )


def summary(stored: audit.StoredRecord) -> pb.RecordSummary:
    """A record in short."""
    value = stored.record
    evicted = value.eviction or {"policy": "", "budget": 0}
    return pb.RecordSummary(
        record_id=value.record_id,
        created_unix_micros=value.created_unix_micros,
        status=_STATUS[value.status],
        finish_reason=finish_reason(value.finish_reason),
        usage=usage(value),
        policy=evicted["policy"],
        budget=evicted["budget"],
        rounds=value.cache.rounds if value.cache else 0,
        digest=value.cache.digest if value.cache else "",
        retention=_RETENTION[value.retention],
    )
