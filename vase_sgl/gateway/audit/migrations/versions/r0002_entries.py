"""Records as entries: the exact text that the hash covers, with the payload beside it.

Old records become entries of format 1, which is the text that their hashes were computed from, so
every chain stays as it was. Appending only is from here on enforced by triggers.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import sqlalchemy as sa
from alembic import op

from vase_sgl.gateway.audit.errors import AuditError

revision = "0002"
down_revision = "0001"

_PAGE = 500

_REFUSALS_SQLITE = [
    """CREATE TRIGGER records_are_final BEFORE UPDATE ON records
    BEGIN SELECT RAISE(ABORT, 'audit records are append-only: they cannot be changed'); END""",
    """CREATE TRIGGER records_stay BEFORE DELETE ON records
    WHEN NOT EXISTS (SELECT 1 FROM checkpoints AS c
                     WHERE c.tenant = OLD.tenant AND c.last_sequence >= OLD.sequence)
    BEGIN SELECT RAISE(ABORT, 'audit records are append-only: use vase-sgl audit prune'); END""",
    # INSERT OR REPLACE deletes without asking the trigger above.
    """CREATE TRIGGER records_are_new BEFORE INSERT ON records
    WHEN EXISTS (SELECT 1 FROM records AS r WHERE r.record_id = NEW.record_id
                 OR (r.tenant = NEW.tenant AND r.sequence = NEW.sequence))
    BEGIN SELECT RAISE(ABORT, 'audit records are append-only: this one is stored already'); END""",
    """CREATE TRIGGER checkpoints_are_final BEFORE UPDATE ON checkpoints
    BEGIN SELECT RAISE(ABORT, 'audit checkpoints are append-only'); END""",
    """CREATE TRIGGER checkpoints_stay BEFORE DELETE ON checkpoints
    BEGIN SELECT RAISE(ABORT, 'audit checkpoints are append-only'); END""",
    """CREATE TRIGGER checkpoints_are_new BEFORE INSERT ON checkpoints
    WHEN EXISTS (SELECT 1 FROM checkpoints AS c
                 WHERE c.tenant = NEW.tenant AND c.number = NEW.number)
    BEGIN SELECT RAISE(ABORT, 'audit checkpoints are append-only'); END""",
    """CREATE TRIGGER chains_grow BEFORE UPDATE ON chains
    WHEN NEW.tenant <> OLD.tenant OR NEW.sequence <= OLD.sequence
    BEGIN SELECT RAISE(ABORT, 'an audit chain only grows'); END""",
    """CREATE TRIGGER chains_stay BEFORE DELETE ON chains
    BEGIN SELECT RAISE(ABORT, 'an audit chain only grows'); END""",
    """CREATE TRIGGER chains_are_new BEFORE INSERT ON chains
    WHEN EXISTS (SELECT 1 FROM chains AS c WHERE c.tenant = NEW.tenant)
    BEGIN SELECT RAISE(ABORT, 'an audit chain only grows'); END""",
]

_REFUSALS_POSTGRESQL = [
    """CREATE FUNCTION vase_audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP
            USING HINT = 'vase-sgl audit prune removes old records';
    END $$""",
    """CREATE FUNCTION vase_audit_keep() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NOT EXISTS (SELECT 1 FROM checkpoints AS c
                       WHERE c.tenant = OLD.tenant AND c.last_sequence >= OLD.sequence) THEN
            RAISE EXCEPTION 'records is append-only: DELETE is refused'
                USING HINT = 'vase-sgl audit prune removes old records';
        END IF;
        RETURN OLD;
    END $$""",
    """CREATE FUNCTION vase_audit_grow() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.tenant <> OLD.tenant OR NEW.sequence <= OLD.sequence THEN
            RAISE EXCEPTION 'an audit chain only grows';
        END IF;
        RETURN NEW;
    END $$""",
    """CREATE TRIGGER records_are_final BEFORE UPDATE ON records
    FOR EACH ROW EXECUTE FUNCTION vase_audit_refuse()""",
    """CREATE TRIGGER records_stay BEFORE DELETE ON records
    FOR EACH ROW EXECUTE FUNCTION vase_audit_keep()""",
    """CREATE TRIGGER checkpoints_are_final BEFORE UPDATE OR DELETE ON checkpoints
    FOR EACH ROW EXECUTE FUNCTION vase_audit_refuse()""",
    """CREATE TRIGGER chains_grow BEFORE UPDATE ON chains
    FOR EACH ROW EXECUTE FUNCTION vase_audit_grow()""",
    """CREATE TRIGGER chains_stay BEFORE DELETE ON chains
    FOR EACH ROW EXECUTE FUNCTION vase_audit_refuse()""",
    *(
        f"""CREATE TRIGGER {table}_are_not_emptied BEFORE TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION vase_audit_refuse()"""
        for table in ("records", "checkpoints", "chains")
    ),
]


def upgrade() -> None:
    op.rename_table("records", "records_0001")
    if op.get_context().dialect.name == "postgresql":
        # A renamed table keeps the names of its indexes, which the new one needs.
        op.execute("ALTER TABLE records_0001 RENAME CONSTRAINT records_pkey TO records_0001_pkey")
        op.execute(
            "ALTER TABLE records_0001 RENAME CONSTRAINT records_record_id_key "
            "TO records_0001_record_id_key"
        )
    records = op.create_table(
        "records",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("record_id", sa.String(32), nullable=False),
        sa.Column("created_unix_micros", sa.BigInteger, nullable=False),
        sa.Column("entry", sa.Text, nullable=False),
        sa.Column("payload", sa.LargeBinary),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.UniqueConstraint("record_id"),
    )
    op.create_index("records_by_time", "records", ["tenant", "created_unix_micros"])
    chains = op.create_table(
        "chains",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last_sequence", sa.BigInteger, nullable=False),
        sa.Column("entry", sa.Text, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    _carry_over(records, chains)
    op.drop_table("records_0001")
    op.drop_table("schema_version")
    refusals = {"sqlite": _REFUSALS_SQLITE, "postgresql": _REFUSALS_POSTGRESQL}
    for statement in refusals[op.get_context().dialect.name]:
        op.execute(statement)


def _carry_over(records: sa.Table, chains: sa.Table) -> None:
    connection = op.get_bind()
    for tenant in connection.scalars(sa.text("SELECT DISTINCT tenant FROM records_0001")).all():
        last, last_hash = 0, ""
        while True:
            try:
                page = _page(connection, tenant, last)
            except (ValueError, struct.error) as error:
                raise AuditError(
                    f"the audit store cannot be taken over: one of the {_PAGE} records of tenant "
                    f"{tenant} after sequence {last} cannot be read ({error}); the store is as it "
                    "was, and the version of vase_sgl that made it still opens it"
                ) from error
            if not page:
                break
            connection.execute(sa.insert(records), page)
            last, last_hash = page[-1]["sequence"], page[-1]["hash"]
        connection.execute(sa.insert(chains).values(tenant=tenant, sequence=last, hash=last_hash))


def _page(connection: sa.Connection, tenant: str, last: int) -> list[dict[str, Any]]:
    old = _old_records()
    query = (
        sa.select(old)
        .where(old.c.tenant == tenant, old.c.sequence > last)
        .order_by(old.c.sequence)
        .limit(_PAGE)
    )
    return [_entry_row(row) for row in connection.execute(query).mappings()]


def _old_records() -> sa.Table:
    """The old table: what lay in JSON columns comes back as values."""
    as_json = {"sampling", "eviction", "cache", "round_digests", "fingerprint", "timings"}
    names = (
        *("tenant", "sequence", "record_id", "created_unix_micros", "status", "failure"),
        *("input_kind", "prompt_token_ids", "sampling", "eviction", "sampling_seed"),
        *("eviction_seed", "seed_policy", "master_version", "sample_index", "output_token_ids"),
        *("text", "finish_reason", "cache", "round_digests", "fingerprint", "timings"),
        *("previous_hash", "hash"),
    )
    return sa.Table(
        "records_0001",
        sa.MetaData(),
        *(sa.Column(name, sa.JSON) if name in as_json else sa.Column(name) for name in names),
    )


def _entry_row(row: sa.RowMapping) -> dict[str, Any]:
    content = dict(row)
    content.pop("hash")
    content["seeds"] = {
        "sampling": content.pop("sampling_seed"),
        "eviction": content.pop("eviction_seed"),
        "policy": content.pop("seed_policy"),
        "master_version": content.pop("master_version"),
    }
    for name in ("prompt_token_ids", "output_token_ids"):
        content[name] = struct.unpack(f"<{len(content[name]) // 4}i", content[name])
    entry = json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return {
        "tenant": row["tenant"],
        "sequence": row["sequence"],
        "record_id": row["record_id"],
        "created_unix_micros": row["created_unix_micros"],
        "entry": entry,
        "payload": None,
        "hash": row["hash"],
    }
