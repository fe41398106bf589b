"""The first tables: content and parameters in columns.

Databases made before there were migrations look like this; they are marked as being here.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "records",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("record_id", sa.String(32), nullable=False),
        sa.Column("created_unix_micros", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("input_kind", sa.String(16), nullable=False),
        sa.Column("prompt_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("sampling", sa.JSON, nullable=False),
        sa.Column("eviction", sa.JSON),
        sa.Column("sampling_seed", sa.BigInteger, nullable=False),
        sa.Column("eviction_seed", sa.BigInteger, nullable=False),
        sa.Column("seed_policy", sa.String(16), nullable=False),
        sa.Column("master_version", sa.Integer, nullable=False),
        sa.Column("sample_index", sa.Integer, nullable=False),
        sa.Column("output_token_ids", sa.LargeBinary, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("cache", sa.JSON),
        sa.Column("round_digests", sa.JSON, nullable=False),
        sa.Column("fingerprint", sa.JSON, nullable=False),
        sa.Column("timings", sa.JSON, nullable=False),
        sa.Column("previous_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.UniqueConstraint("record_id"),
    )
    op.create_table(
        "schema_version",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    )
