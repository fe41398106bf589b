"""The tables as the code uses them. What makes them, with triggers, are the migrations."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

#: One row per generation. `entry` is what `hash` covers; the other columns repeat it for queries.
records = Table(
    "records",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("record_id", String(32), nullable=False, unique=True),
    Column("created_unix_micros", BigInteger, nullable=False),
    Column("entry", Text, nullable=False),
    Column("payload", LargeBinary),
    Column("hash", String(64), nullable=False),
)

#: The end of every tenant's chain. Its row is what gateways lock to append in turn.
chains = Table(
    "chains",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", String(64), nullable=False),
)

#: What was pruned: records up to `last_sequence` may be gone.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("last_sequence", BigInteger, nullable=False),
    Column("entry", Text, nullable=False),
    Column("hash", String(64), nullable=False),
)
