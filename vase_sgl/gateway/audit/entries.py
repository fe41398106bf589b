"""The entry of a record: the exact text that its hash covers, and the way back.

An entry is canonical JSON and is stored as it was hashed, so that checking a chain needs SHA-256
and nothing else: no rule for floats, no column types. What a client sent and got is not in the
entry but in the payload beside it, which may be encrypted; the entry holds the SHA-256 of the
payload as stored. A chain is therefore checked without any key, and a lost or destroyed key makes
content unreadable but leaves the chain whole.

Format 1, the first one, had no payload: content is inside the entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import struct
from collections.abc import Mapping
from typing import Any

from vase_sgl.gateway.audit.encryption import KeyRing
from vase_sgl.gateway.audit.records import (
    ContentDigests,
    Record,
    RecordStatus,
    StoredRecord,
    Timings,
)
from vase_sgl.gateway.seeds import SeedOrigin, Seeds
from vase_sgl.gateway.tenants import Retention, SeedPolicy
from vase_sgl.gateway.workers import CacheStats

#: What the first record, and the first checkpoint, of a tenant follow.
GENESIS = "0" * 64
#: The format written. A reader knows it and format 1.
FORMAT = 2

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


def unseal(row: Row, keys: KeyRing, *, content: bool = True) -> StoredRecord:
    """The record of a row; without `content`, token ids and text are left out.

    Raises `FailedPrecondition` if the content is encrypted with a key that is not there.
    """
    entry = json.loads(row.entry)
    fields = _fields_1(entry) if "format" not in entry else _fields_2(entry, row, keys, content)
    record = Record(
        **{name: entry[name] for name in _PLAIN},
        status=RecordStatus(entry["status"]),
        round_digests=tuple(entry["round_digests"]),
        cache=None if entry["cache"] is None else CacheStats(**entry["cache"]),
        timings=Timings(**entry["timings"]),
        **fields,
    )
    return StoredRecord(record, row.sequence, entry["previous_hash"], row.hash)


_PLAIN = (
    *("record_id", "tenant", "created_unix_micros", "failure", "input_kind", "eviction"),
    *("sample_index", "finish_reason", "fingerprint"),
)


def _fields_1(entry: Mapping[str, Any]) -> dict[str, Any]:
    seeds = entry["seeds"]
    return {
        "sampling": entry["sampling"],
        "seeds": Seeds(
            **{**seeds, "policy": SeedPolicy(seeds["policy"])}, origin=None, request_seed=None
        ),
        "prompt_token_ids": tuple(entry["prompt_token_ids"]),
        "output_token_ids": tuple(entry["output_token_ids"]),
        "text": entry["text"],
        "retention": Retention.FULL,
        "prompt_tokens": len(entry["prompt_token_ids"]),
        "completion_tokens": len(entry["output_token_ids"]),
    }


def _fields_2(entry: Mapping[str, Any], row: Row, keys: KeyRing, content: bool) -> dict[str, Any]:
    seeds, digests = entry["seeds"], entry["digests"]
    kept = _content(entry, row, keys) if content else {}
    stop = {} if kept.get("stop") is None else {"stop": kept["stop"]}
    return {
        "sampling": {**entry["sampling"], **stop},
        "seeds": Seeds(
            **{
                **seeds,
                "policy": SeedPolicy(seeds["policy"]),
                "origin": SeedOrigin(seeds["origin"]),
            }
        ),
        "prompt_token_ids": tuple(kept.get("prompt_token_ids", ())),
        "output_token_ids": tuple(kept.get("output_token_ids", ())),
        "text": kept.get("text", ""),
        "retention": Retention(entry["retention"]),
        "prompt_tokens": entry["prompt_tokens"],
        "completion_tokens": entry["completion_tokens"],
        "digests": None if digests is None else ContentDigests(**digests),
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
