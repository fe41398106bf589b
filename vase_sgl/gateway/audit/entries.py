"""The entry of a record: the exact text that its hash covers, and the way back.

An entry is canonical JSON and is stored as it was hashed, so that checking a chain needs SHA-256
and nothing else: no rule for floats, no column types. What a client sent and got is not in the
entry but in the payload beside it, which may be encrypted; the entry holds the SHA-256 of the
payload as stored. A chain is therefore checked without any key, and a lost or destroyed key makes
content unreadable but leaves the chain whole.

Format 1, the first one, had no payload: content is inside the entry.

Gateways of several versions may share a store, and an older one must say nothing wrong of a newer
one's record. So `FORMAT` rises when entry or payload get what decides the answer or its seeds: a
replay without it would be of another request. It need not for what a reader may leave out (one more
of the `timings`), nor for new values of enumerations and new parameters of sampling and eviction,
which a reader that lacks them notices.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import secrets
import struct
from collections.abc import Mapping
from typing import Any, TypeVar

from vase_sgl.gateway.audit.encryption import KeyRing
from vase_sgl.gateway.audit.records import (
    ContentDigests,
    Record,
    RecordStatus,
    StoredRecord,
    Summary,
    Timings,
    newer_record,
)
from vase_sgl.gateway.seeds import SeedOrigin, Seeds
from vase_sgl.gateway.tenants import Retention, SeedPolicy
from vase_sgl.gateway.workers import CacheStats

#: What the first record, and the first checkpoint, of a tenant follow.
GENESIS = "0" * 64
#: The format written; the text above says when it rises. A reader knows it and format 1.
FORMAT = 2

_Member = TypeVar("_Member", bound=enum.StrEnum)

_CONTENT = ("prompt_token_ids", "output_token_ids", "text")


@dataclasses.dataclass(frozen=True)
class Row:
    """A record as stored. payload: None if content is not kept, in the entry, or not loaded."""

    tenant: str
    sequence: int
    record_id: str
    created_unix_micros: int
    entry: str
    payload: bytes | None
    hash: str


@dataclasses.dataclass(frozen=True)
class Sealed:
    """A record ready to be stored: all of its entry but its place in the chain."""

    record: Record
    body: Mapping[str, Any]
    payload: bytes | None

    def at(self, sequence: int, previous_hash: str) -> Row:
        """The row at this place of the tenant's chain."""
        entry = canonical({**self.body, "sequence": sequence, "previous_hash": previous_hash})
        return Row(
            tenant=self.record.tenant,
            sequence=sequence,
            record_id=self.record.record_id,
            created_unix_micros=self.record.created_unix_micros,
            entry=entry,
            payload=self.payload,
            hash=hash_of(entry),
        )


def canonical(content: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no spaces. Raises `ValueError` for infinities and NaN."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def hash_of(entry: str) -> str:
    """SHA-256 of the entry's UTF-8, in hex."""
    return hashlib.sha256(entry.encode()).hexdigest()


def seal(record: Record, keys: KeyRing) -> Sealed:
    """The record with its content encoded, digested or encrypted, as its retention says."""
    sampling = {name: value for name, value in record.sampling.items() if name != "stop"}
    kept = record.retention is Retention.FULL
    payload = _encode_content(record) if kept else None
    key: int | None = None
    if payload is not None and keys.active is not None:
        key = keys.active
        payload = keys.encrypt(payload, tenant=record.tenant, record_id=record.record_id)
    body = {
        "format": FORMAT,
        "record_id": record.record_id,
        "tenant": record.tenant,
        "created_unix_micros": record.created_unix_micros,
        "status": record.status,
        "failure": record.failure,
        "input_kind": record.input_kind,
        "sampling": sampling,
        "eviction": record.eviction,
        "seeds": dataclasses.asdict(record.seeds),
        "sample_index": record.sample_index,
        "finish_reason": record.finish_reason,
        "cache": None if record.cache is None else dataclasses.asdict(record.cache),
        "round_digests": record.round_digests,
        "fingerprint": record.fingerprint,
        "timings": dataclasses.asdict(record.timings),
        "retention": record.retention,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "payload": None
        if payload is None
        else {"sha256": hashlib.sha256(payload).hexdigest(), "key": key},
        "digests": None if kept else dataclasses.asdict(_digests(record, secrets.token_bytes(16))),
    }
    return Sealed(record, body, payload)


def unseal(row: Row, keys: KeyRing) -> StoredRecord:
    """The record of a row, content included.

    Raises `FailedPrecondition` if the content is encrypted with a key that is not there, or a newer
    version recorded something that this one does not know.
    """
    entry = json.loads(row.entry)
    version = _format(entry)
    if version > FORMAT:
        raise newer_record(row.record_id, f"the format {version}")
    record = Record(
        **{name: entry[name] for name in _PLAIN},
        status=_member(RecordStatus, "status", entry, row),
        round_digests=tuple(entry["round_digests"]),
        cache=None if entry["cache"] is None else CacheStats(**_known(CacheStats, entry["cache"])),
        timings=Timings(**_known(Timings, entry["timings"])),
        **(_fields_1(entry, row) if version == 1 else _fields_2(entry, row, keys)),
    )
    return StoredRecord(record, row.sequence, entry["previous_hash"], row.hash)


def summarize(row: Row) -> Summary:
    """The record of a row in short, of whatever version it is."""
    entry = json.loads(row.entry)
    short = Summary(row.record_id, row.created_unix_micros, row.sequence, row.hash)
    version = _format(entry)
    if version > FORMAT:
        return short
    evicted = entry["eviction"] or {"policy": "", "budget": 0}
    cache = entry["cache"] or {"rounds": 0, "digest": ""}
    counts = _counts_1(entry) if version == 1 else {name: entry[name] for name in _COUNTS}
    return dataclasses.replace(
        short,
        status=_member_or_none(RecordStatus, entry["status"]),
        finish_reason=entry["finish_reason"],
        policy=evicted["policy"],
        budget=evicted["budget"],
        rounds=cache["rounds"],
        digest=cache["digest"],
        retention=_member_or_none(Retention, entry.get("retention", Retention.FULL)),
        **counts,
    )


_PLAIN = (
    *("record_id", "tenant", "created_unix_micros", "failure", "input_kind", "eviction"),
    *("sample_index", "finish_reason", "fingerprint"),
)
_COUNTS = ("prompt_tokens", "completion_tokens")


def _format(entry: Mapping[str, Any]) -> int:
    return int(entry.get("format", 1))


def _known(kind: type[Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a part of an entry that its dataclass has; others may be left out."""
    return {
        field.name: part[field.name] for field in dataclasses.fields(kind) if field.name in part
    }


def _member(kind: type[_Member], name: str, part: Mapping[str, Any], row: Row) -> _Member:
    """The member of an enumeration that a field of the record is."""
    member = _member_or_none(kind, part[name])
    if member is None:
        raise newer_record(row.record_id, f"the {name} `{part[name]}`")
    return member


def _member_or_none(kind: type[_Member], value: str) -> _Member | None:
    return kind(value) if value in set(kind) else None


def _counts_1(entry: Mapping[str, Any]) -> dict[str, int]:
    return {
        "prompt_tokens": len(entry["prompt_token_ids"]),
        "completion_tokens": len(entry["output_token_ids"]),
    }


def _fields_1(entry: Mapping[str, Any], row: Row) -> dict[str, Any]:
    seeds = {**entry["seeds"], "origin": None, "request_seed": None}
    return {
        "sampling": entry["sampling"],
        "seeds": Seeds(**{**seeds, "policy": _member(SeedPolicy, "policy", seeds, row)}),
        "prompt_token_ids": tuple(entry["prompt_token_ids"]),
        "output_token_ids": tuple(entry["output_token_ids"]),
        "text": entry["text"],
        "retention": Retention.FULL,
        **_counts_1(entry),
    }


def _fields_2(entry: Mapping[str, Any], row: Row, keys: KeyRing) -> dict[str, Any]:
    seeds, digests = _known(Seeds, entry["seeds"]), entry["digests"]
    seeds["policy"] = _member(SeedPolicy, "policy", seeds, row)
    seeds["origin"] = _member(SeedOrigin, "origin", seeds, row)
    kept = _content(entry, row, keys)
    stop = {} if kept.get("stop") is None else {"stop": kept["stop"]}
    return {
        "sampling": {**entry["sampling"], **stop},
        "seeds": Seeds(**seeds),
        "prompt_token_ids": tuple(kept.get("prompt_token_ids", ())),
        "output_token_ids": tuple(kept.get("output_token_ids", ())),
        "text": kept.get("text", ""),
        "retention": _member(Retention, "retention", entry, row),
        **{name: entry[name] for name in _COUNTS},
        "digests": None if digests is None else ContentDigests(**_known(ContentDigests, digests)),
    }


def _content(entry: Mapping[str, Any], row: Row, keys: KeyRing) -> dict[str, Any]:
    described, payload = entry["payload"], row.payload
    if described is None or payload is None:
        return {}
    if described["key"] is not None:
        payload = keys.decrypt(
            payload, version=described["key"], tenant=row.tenant, record_id=row.record_id
        )
    found: dict[str, Any] = json.loads(payload)
    return found


def _encode_content(record: Record) -> bytes:
    content = {name: getattr(record, name) for name in _CONTENT}
    return canonical({**content, "stop": record.sampling.get("stop")}).encode()


def _digests(record: Record, salt: bytes) -> ContentDigests:
    def salted(content: bytes) -> str:
        return hashlib.sha256(salt + content).hexdigest()

    def packed(ids: tuple[int, ...]) -> bytes:
        return struct.pack(f"<{len(ids)}i", *ids)

    return ContentDigests(
        salt=salt.hex(),
        prompt=salted(packed(record.prompt_token_ids)),
        output=salted(packed(record.output_token_ids)),
        text=salted(record.text.encode()),
    )
