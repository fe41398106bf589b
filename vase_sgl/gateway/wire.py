"""From the gateway's own types to protobuf messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor

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
_STATUS: dict[audit.RecordStatus | None, pb.RecordStatus.ValueType] = {
    None: pb.RECORD_STATUS_UNSPECIFIED,
    audit.RecordStatus.COMPLETED: pb.RECORD_STATUS_COMPLETED,
    audit.RecordStatus.ABORTED: pb.RECORD_STATUS_ABORTED,
    audit.RecordStatus.FAILED: pb.RECORD_STATUS_FAILED,
}
_RETENTION: dict[Retention | None, pb.Retention.ValueType] = {
    None: pb.RETENTION_UNSPECIFIED,
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


def usage(record: audit.Record | audit.Summary) -> pb.Usage:
    """Token counts."""
    return pb.Usage(prompt_tokens=record.prompt_tokens, completion_tokens=record.completion_tokens)


def _sampling(value: audit.Record) -> pb.SamplingParams:
    """Recorded sampling parameters; seed and max_new_tokens have fields of their own."""
    known = {
        k: v for k, v in value.sampling.items() if k not in ("max_new_tokens", "sampling_seed")
    }
    _check_known(value, "sampling", known, pb.SamplingParams.DESCRIPTOR)
    return pb.SamplingParams(**known)


def _eviction(value: audit.Record) -> pb.EvictionParams | None:
    """Recorded eviction parameters; the seed has a field of its own."""
    if value.eviction is None:
        return None
    fields = {k: v for k, v in value.eviction.items() if k not in ("prompt", "seed")}
    _check_known(value, "eviction", fields, pb.EvictionParams.DESCRIPTOR)
    mode = value.eviction["prompt"]
    if mode not in PROMPT_MODES:
        raise audit.newer_record(value.record_id, f"the prompt mode `{mode}`")
    return pb.EvictionParams(**fields, prompt_mode=PROMPT_MODES[mode])


def _check_known(
    value: audit.Record, part: str, params: Mapping[str, Any], kind: Descriptor
) -> None:
    """A replay gives them all to the worker as they are, but here none is left out."""
    unknown = sorted(params.keys() - kind.fields_by_name.keys())
    if unknown:
        raise audit.newer_record(value.record_id, f"in its {part} {', '.join(unknown)}")


def record(stored: audit.StoredRecord) -> pb.Record:
    """A whole record. Raises `FailedPrecondition` for parameters of a newer version."""
    value = stored.record
    return pb.Record(
        record_id=value.record_id,
        created_unix_micros=value.created_unix_micros,
        status=_STATUS[value.status],
        failure=value.failure,
        input_kind=value.input_kind,
        prompt_token_ids=value.prompt_token_ids,
        sampling=_sampling(value),
        max_new_tokens=value.sampling["max_new_tokens"],
        eviction=_eviction(value),
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


def summary(value: audit.Summary) -> pb.RecordSummary:
    """A record in short."""
    return pb.RecordSummary(
        record_id=value.record_id,
        created_unix_micros=value.created_unix_micros,
        status=_STATUS[value.status],
        finish_reason=finish_reason(value.finish_reason),
        usage=usage(value),
        policy=value.policy,
        budget=value.budget,
        rounds=value.rounds,
        digest=value.digest,
        retention=_RETENTION[value.retention],
    )
