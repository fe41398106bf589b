"""The audit store on SQL: append, read, list, verify."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from sqlalchemy import event, func, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from vase_sgl.gateway.audit.chain import GENESIS, ChainCheck, chain_hash
from vase_sgl.gateway.audit.records import Record, StoredRecord
from vase_sgl.gateway.audit.tables import (
    SCHEMA_VERSION,
    from_row,
    metadata,
    records,
    schema_versions,
    to_row,
)

#: Attempts to append when other gateways append to the same tenant at the same moment.
_APPEND_ATTEMPTS = 20
#: Records read at once when a whole chain is verified.
_PAGE = 200


class AuditError(Exception):
    """The store cannot be used. The text says where it is and what to do."""


class AuditStore:
    """Records of all tenants. Nothing is ever changed or removed."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._appending = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> AuditStore:
        """Connect, and create the tables in an empty database. Raises `AuditError`."""
        try:
            # Hidden: parameters are prompts and seeds, which must not reach a log with an error.
            engine = create_async_engine(url, hide_parameters=True)
        except (ArgumentError, ImportError) as error:
            raise AuditError(
                f"audit.url cannot be used: {error}; an example is "
                "sqlite+aiosqlite:///audit.sqlite3"
            ) from error
        try:
            if engine.dialect.name == "sqlite":
                _prepare_sqlite(engine)
            async with engine.begin() as connection:
                await _ensure_schema(connection)
        except BaseException as error:
            await engine.dispose()
            if isinstance(error, (SQLAlchemyError, OSError)):
                raise AuditError(
                    f"cannot open the audit store {engine.url.render_as_string()}: {error}; check "
                    "audit.url, and that its folder can be written"
                ) from error
            raise
        return cls(engine)

    async def close(self) -> None:
        """Release all connections."""
        await self._engine.dispose()

    async def append(self, record: Record) -> StoredRecord:
        """Store a record at the end of its tenant's chain; durable on return.

        Safe against other processes: the place in the chain is unique, and whoever loses the
        race takes the next one.
        """
        attempt = 0
        async with self._appending:
            while True:
                attempt += 1
                try:
                    async with self._engine.begin() as connection:
                        stored = await self._link(connection, record)
                        await connection.execute(insert(records).values(to_row(stored)))
                except IntegrityError:
                    if attempt == _APPEND_ATTEMPTS:
                        raise
                else:
                    return stored

    async def get(self, tenant: str, record_id: str) -> StoredRecord | None:
        """One of the tenant's own records."""
        query = select(records).where(records.c.tenant == tenant, records.c.record_id == record_id)
        async with self._engine.connect() as connection:
            row = (await connection.execute(query)).mappings().first()
        return None if row is None else from_row(row)

    async def latest(self, tenant: str, *, before: int | None, count: int) -> list[StoredRecord]:
        """Up to `count` of the tenant's records, newest first, with sequences below `before`."""
        query = select(records).where(records.c.tenant == tenant)
        if before is not None:
            query = query.where(records.c.sequence < before)
        query = query.order_by(records.c.sequence.desc()).limit(count)
        async with self._engine.connect() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [from_row(row) for row in rows]

    async def tenants(self) -> dict[str, int]:
        """Every tenant that has records, with their number."""
        query = select(records.c.tenant, func.count()).group_by(records.c.tenant)
        async with self._engine.connect() as connection:
            rows = (await connection.execute(query)).all()
        return {str(row[0]): int(row[1]) for row in rows}

    async def verify(self, tenant: str) -> str | None:
        """Where the tenant's chain is broken and how; None if it is whole."""
        check = ChainCheck()
        async with aclosing(self._chain(tenant)) as chain:
            async for stored in chain:
                problem = check.add(stored)
                if problem is not None:
                    return problem
        return None

    async def _chain(self, tenant: str) -> AsyncGenerator[StoredRecord, None]:
        last = 0
        async with self._engine.connect() as connection:
            while True:
                query = (
                    select(records)
                    .where(records.c.tenant == tenant, records.c.sequence > last)
                    .order_by(records.c.sequence)
                    .limit(_PAGE)
                )
                rows = (await connection.execute(query)).mappings().all()
                if not rows:
                    return
                for row in rows:
                    yield from_row(row)
                last = rows[-1]["sequence"]

    async def _link(self, connection: AsyncConnection, record: Record) -> StoredRecord:
        query = (
            select(records.c.sequence, records.c.hash)
            .where(records.c.tenant == record.tenant)
            .order_by(records.c.sequence.desc())
            .limit(1)
        )
        last = (await connection.execute(query)).first()
        sequence, previous_hash = (1, GENESIS) if last is None else (last[0] + 1, last[1])
        return StoredRecord(
            record, sequence, previous_hash, chain_hash(record, sequence, previous_hash)
        )


def _sqlite_folder(url: str) -> Path | None:
    """The folder a SQLite URL's file is in; None for another database or one in memory."""
    parsed = make_url(url)
    if not parsed.drivername.startswith("sqlite") or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database)).parent


async def _ensure_schema(connection: AsyncConnection) -> None:
    await connection.run_sync(metadata.create_all)
    version = (await connection.execute(select(schema_versions.c.version))).scalar()
    if version is None:
        await connection.execute(insert(schema_versions).values(version=SCHEMA_VERSION))
    elif version != SCHEMA_VERSION:
        raise AuditError(
            f"the audit store has schema version {version}, this gateway writes {SCHEMA_VERSION}; "
            "run the vase_sgl version that made it, or name a new store in audit.url"
        )


def _prepare_sqlite(engine: AsyncEngine) -> None:
    folder = _sqlite_folder(engine.url.render_as_string(hide_password=False))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        # Readers do not block the writer; FULL makes a commit survive power loss.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA busy_timeout=10000")
        cursor.close()
