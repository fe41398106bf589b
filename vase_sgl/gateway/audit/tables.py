"""Tables of the audit store, and how a record becomes a row."""

from __future__ import annotations

import sys
from array import array
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Dialect,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from vase_sgl.gateway.audit.records import Record, RecordStatus, StoredRecord, Timings
from vase_sgl.gateway.seeds import Seeds
from vase_sgl.gateway.tenants import SeedPolicy
from vase_sgl.gateway.workers import CacheStats

#: Raised with every change of the tables; a store of another version is refused.
SCHEMA_VERSION = 1


class TokenIds(TypeDecorator[tuple[int, ...]]):
    """Token ids as little-endian int32: a fifth of their size as JSON."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> bytes | None:
        return None if value is None else _little_endian(array("i", value)).tobytes()

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[int, ...] | None:
        if value is None:
            return None
        ids = array("i")
        ids.frombytes(value)
        return tuple(_little_endian(ids))


def _little_endian(ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


metadata = MetaData()

schema_versions = Table(
    "schema_version", metadata, Column("version", Integer, primary_key=True, autoincrement=False)
)

records = Table(
    "records",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("record_id", String(32), nullable=False),
    Column("created_unix_micros", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("failure", Text, nullable=False),
    Column("input_kind", String(16), nullable=False),
    Column("prompt_token_ids", TokenIds, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("eviction", JSON(none_as_null=True)),
    Column("sampling_seed", BigInteger, nullable=False),
    Column("eviction_seed", BigInteger, nullable=False),
    Column("seed_policy", String(16), nullable=False),
    Column("master_version", Integer, nullable=False),
    Column("sample_index", Integer, nullable=False),
    Column("output_token_ids", TokenIds, nullable=False),
    Column("text", Text, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("cache", JSON(none_as_null=True)),
    Column("round_digests", JSON, nullable=False),
    Column("fingerprint", JSON, nullable=False),
    Column("timings", JSON, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    UniqueConstraint("record_id"),
)


def to_row(stored: StoredRecord) -> dict[str, Any]:
    """The row of a record."""
    record = stored.record
    plain = {
        name: getattr(record, name)
        for name in Record.__dataclass_fields__
        if name not in ("seeds", "cache", "timings", "round_digests")
    }
    return {
        **plain,
        "sampling": dict(record.sampling),
        "eviction": None if record.eviction is None else dict(record.eviction),
        "fingerprint": dict(record.fingerprint),
        "sampling_seed": record.seeds.sampling,
        "eviction_seed": record.seeds.eviction,
        "seed_policy": record.seeds.policy,
        "master_version": record.seeds.master_version,
        "cache": None if record.cache is None else vars(record.cache),
        "round_digests": list(record.round_digests),
        "timings": vars(record.timings),
        "sequence": stored.sequence,
        "previous_hash": stored.previous_hash,
        "hash": stored.hash,
    }


def from_row(row: RowMapping) -> StoredRecord:
    """The record of a row."""
    values = {name: row[name] for name in Record.__dataclass_fields__ if name in row}
    values.update(
        status=RecordStatus(row["status"]),
        round_digests=tuple(row["round_digests"]),
        cache=None if row["cache"] is None else CacheStats(**row["cache"]),
        timings=Timings(**row["timings"]),
        seeds=Seeds(
            sampling=row["sampling_seed"],
            eviction=row["eviction_seed"],
            policy=SeedPolicy(row["seed_policy"]),
            master_version=row["master_version"],
        ),
    )
    return StoredRecord(Record(**values), row["sequence"], row["previous_hash"], row["hash"])
