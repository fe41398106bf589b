"""Between the client's own types and protobuf messages."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from google.protobuf.message import Message as ProtoMessage

from vase_sgl.client import types
from vase_sgl.client.errors import InvalidRequest, VaseError
from vase_sgl.rpc.v1 import gateway_pb2 as pb

T = TypeVar("T")
M = TypeVar("M", bound=ProtoMessage)

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_FINISH: dict[int, types.FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}
_STATUS: dict[int, types.RecordStatus] = {
    pb.RECORD_STATUS_COMPLETED: "completed",
    pb.RECORD_STATUS_ABORTED: "aborted",
    pb.RECORD_STATUS_FAILED: "failed",
}
_PROMPT_MODES: dict[types.PromptMode, pb.PromptMode.ValueType] = {
    "evict": pb.PROMPT_MODE_EVICT,
    "keep": pb.PROMPT_MODE_KEEP,
}
_RETENTION: dict[int, types.Retention] = {
    pb.RETENTION_FULL: "full",
    pb.RETENTION_HASH: "hash",
}
_SEED_CHECK: dict[int, types.SeedCheck] = {
    pb.SEED_CHECK_VERIFIED: "VERIFIED",
    pb.SEED_CHECK_MISMATCH: "MISMATCH",
    pb.SEED_CHECK_VERSION_REMOVED: "VERSION_REMOVED",
    pb.SEED_CHECK_ORIGIN_UNKNOWN: "ORIGIN_UNKNOWN",
}
_OUTCOME: dict[int, Literal["MATCH", "DIVERGED", "INCOMPARABLE"]] = {
    pb.ReplayVerdict.OUTCOME_MATCH: "MATCH",
    pb.ReplayVerdict.OUTCOME_DIVERGED: "DIVERGED",
    pb.ReplayVerdict.OUTCOME_INCOMPARABLE: "INCOMPARABLE",
}


class Options(TypedDict, total=False):
    """Options of a generation. None is the same as leaving one out. The gateway checks ranges.

    budget: KV entries (tokens) kept per layer and KV head after a round, the window included.
    window: recent tokens that are never evicted, also the tokens between two rounds; less than the
    budget. policy, prompt_mode, num_sinks, protected_share, pool_width, projection_dim,
    mix_lambda: how; shares from 0 to 1. Give at least a budget, or the policy `full`; with none of
    these the gateway's default applies.
    seed: 0 to 2^63 - 1. The same request with the same seed gives the same tokens, as far as the
    gateway's workers are deterministic. Without one the tenant's seed policy decides, by default a
    new seed for every request. sample_index: another sample of the same seed.
    temperature: 0 (greedy) to 100, 1 without it. top_p: above 0 to 1. top_k: -1 is all. min_p: 0 to
    1. repetition_penalty: 0.01 to 2. frequency_penalty, presence_penalty: -2 to 2.
    stop, stop_token_ids: end the answer. ignore_eos: go on to max_new_tokens, or to one of `stop`;
    not with stop_token_ids.
    inspect: have what was kept written to a file on the worker's disk, for `vase-sgl inspect`.
    """

    budget: int | None
    window: int | None
    policy: str | None
    prompt_mode: types.PromptMode | None
    num_sinks: int | None
    protected_share: float | None
    pool_width: int | None
    projection_dim: int | None
    mix_lambda: float | None
    seed: int | None
    sample_index: int
    inspect: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool


_EVICTION = tuple(pb.EvictionParams.DESCRIPTOR.fields_by_name)
_SAMPLING = tuple(pb.SamplingParams.DESCRIPTOR.fields_by_name)


def generate_request(
    prompt: types.Prompt, max_new_tokens: int, options: Options
) -> pb.GenerateRequest:
    """The request. Raises `InvalidRequest` for what cannot be put into a message at all."""
    given: dict[str, object] = {name: value for name, value in options.items() if value is not None}
    known = Options.__annotations__
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise _wrong(f"unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if "prompt_mode" in given:
        given["prompt_mode"] = _prompt_mode(given["prompt_mode"])
    eviction = {name: given.pop(name) for name in _EVICTION if name in given}
    sampling = {name: given.pop(name) for name in _SAMPLING if name in given}
    request = fitted(pb.GenerateRequest, max_new_tokens=max_new_tokens, **given)
    if eviction:
        request.eviction.CopyFrom(fitted(pb.EvictionParams, **eviction))
    if sampling:
        request.sampling.CopyFrom(fitted(pb.SamplingParams, **sampling))
    try:
        _set_prompt(request, prompt)
    except (TypeError, ValueError) as error:
        raise _wrong(f"prompt: {error}") from error
    return request


def fitted(kind: type[M], **fields: object) -> M:
    """A message of these fields; None: not given. Raises `InvalidRequest`, which names the field
    whose value does not fit."""
    made = kind()
    for name, value in fields.items():
        try:
            made.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError, OverflowError) as error:
            raise _wrong(f"{name}: {error}") from error
    return made


def _wrong(text: str) -> InvalidRequest:
    return InvalidRequest(text, "INVALID_ARGUMENT")


def _prompt_mode(name: object) -> pb.PromptMode.ValueType:
    for known, mode in _PROMPT_MODES.items():
        if name == known:
            return mode
    raise _wrong(f"unknown prompt_mode {name!r}; choose one of {', '.join(_PROMPT_MODES)}")


def capacity_request(
    budget: int | None, window: int | None, prompt_tokens: int, prompt_mode: str | None
) -> pb.GetCapacityRequest:
    """The question about a budget. Raises `InvalidRequest`."""
    return fitted(
        pb.GetCapacityRequest,
        budget=budget,
        window=window,
        prompt_tokens=prompt_tokens,
        prompt_mode=None if prompt_mode is None else _prompt_mode(prompt_mode),
    )


def _set_prompt(request: pb.GenerateRequest, prompt: types.Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, bytes | Mapping):
        kind = type(prompt).__name__
        raise TypeError(f"must be text, token ids or a list of messages, not {kind}")
    elif len(prompt) and isinstance(prompt[0], Mapping):
        request.chat.SetInParent()
        request.chat.messages.extend(map(_chat_message, prompt))
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]


def _chat_message(given: object) -> pb.ChatMessage:
    if not isinstance(given, Mapping):
        raise TypeError(f"a message is a dict, not {type(given).__name__}")
    for name in ("role", "content"):
        if not isinstance(given.get(name), str):
            raise TypeError(f"a message needs the texts role and content; {name} is not one")
    return pb.ChatMessage(**given)


def cache(holder: Any) -> types.CacheStats | None:
    """The cache statistics of a message that has the field `cache`."""
    return _plain(types.CacheStats, holder.cache) if holder.HasField("cache") else None


def chunk(message: pb.GenerationChunk) -> types.Chunk:
    """New output."""
    return types.Chunk(message.text, tuple(message.token_ids), cache(message))


def timings(message: pb.Timings) -> types.Timings:
    """Durations."""
    return _plain(types.Timings, message)


def result(message: pb.GenerationResult) -> types.Result:
    """How a generation ended."""
    return types.Result(
        finish_reason=_FINISH.get(message.finish_reason, "unknown"),
        usage=_plain(types.Usage, message.usage),
        seeds=_plain(types.Seeds, message.seeds),
        cache=cache(message),
        round_digests=tuple(message.round_digests),
        timings=timings(message.timings),
        full_kv_slots=message.full_kv_slots,
    )


def completion(message: pb.GenerateOnceResponse) -> types.Completion:
    """A whole answer."""
    return types.Completion(
        message.request_id, message.text, tuple(message.token_ids), result(message.result)
    )


def progress(message: pb.ReplayProgress) -> types.ReplayProgress:
    """How far a replay has come."""
    return _plain(types.ReplayProgress, message)


def verdict(message: pb.ReplayVerdict) -> types.Verdict:
    """The outcome of a replay. Raises `VaseError` for one that this client does not know."""
    outcome = _OUTCOME.get(message.outcome)
    if outcome is None:  # a caller that looks for the bad ones would take it for good
        raise VaseError(
            f"the gateway sent the replay outcome {message.outcome}, which this client does not "
            "know; install the gateway's version of vase-sgl"
        )
    return _plain(
        types.Verdict,
        message,
        outcome=outcome,
        differences=tuple(_plain(types.FingerprintDifference, d) for d in message.differences),
        seed_check=_SEED_CHECK.get(message.seed_check, "UNKNOWN"),
    )


def record(message: pb.Record) -> types.Record:
    """A whole record."""
    return _plain(
        types.Record,
        message,
        created=_time(message.created_unix_micros),
        status=_STATUS.get(message.status, "unknown"),
        finish_reason=_FINISH.get(message.finish_reason, "unknown"),
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        round_digests=tuple(message.round_digests),
        sampling={
            name: list(value) if name in ("stop", "stop_token_ids") else value
            for name in _SAMPLING
            for value in (getattr(message.sampling, name),)
        },
        eviction=_eviction(message.eviction) if message.HasField("eviction") else None,
        seeds=_plain(types.Seeds, message.seeds),
        cache=cache(message),
        fingerprint=dict(message.fingerprint),
        timings=timings(message.timings),
        retention=_RETENTION.get(message.retention, "unknown"),
        usage=_plain(types.Usage, message.usage),
        digests=_plain(types.ContentDigests, message.digests)
        if message.HasField("digests")
        else None,
    )


def _eviction(message: pb.EvictionParams) -> types.Eviction:
    names = {mode: name for name, mode in _PROMPT_MODES.items()}
    return _plain(types.Eviction, message, prompt_mode=names.get(message.prompt_mode, "unknown"))


def summary(message: pb.RecordSummary) -> types.RecordSummary:
    """A record in short."""
    return _plain(
        types.RecordSummary,
        message,
        created=_time(message.created_unix_micros),
        status=_STATUS.get(message.status, "unknown"),
        finish_reason=_FINISH.get(message.finish_reason, "unknown"),
        usage=_plain(types.Usage, message.usage),
        retention=_RETENTION.get(message.retention, "unknown"),
    )


def unix_micros(moment: datetime.datetime | None) -> int | None:
    """Microseconds since the epoch. Raises `InvalidRequest` without a time zone."""
    if moment is None:
        return None
    if not isinstance(moment, datetime.datetime) or moment.tzinfo is None:
        raise _wrong(f"{moment} is not a datetime with a time zone; add tzinfo=datetime.UTC")
    return (moment - _EPOCH) // datetime.timedelta(microseconds=1)


def capacity(message: pb.GetCapacityResponse) -> types.Capacity:
    """Slots and ceilings."""
    return _plain(
        types.Capacity,
        message,
        policies=tuple(message.policies),
        fingerprint=dict(message.fingerprint),
    )


def _plain(kind: type[T], message: ProtoMessage, **given: Any) -> T:
    """A dataclass from the message's fields of the same names; an absent optional one is None."""
    descriptor = message.DESCRIPTOR.fields_by_name
    values = {
        name: getattr(message, name)
        if not descriptor[name].has_presence or message.HasField(name)
        else None
        for name in kind.__dataclass_fields__  # type: ignore[attr-defined]
        if name not in given
    }
    return kind(**values, **given)


def _time(unix_micros: int) -> datetime.datetime:
    # Whole microseconds: a float of today's seconds would round them.
    return _EPOCH + datetime.timedelta(microseconds=unix_micros)
