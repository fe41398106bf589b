"""The audit store: append, read, list."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import ColumnElement, RowMapping, and_, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from vase_sgl.gateway.audit import database
from vase_sgl.gateway.audit.encryption import KeyRing
from vase_sgl.gateway.audit.entries import GENESIS, Row, Sealed, hash_of, seal, summarize, unseal
from vase_sgl.gateway.audit.errors import described
from vase_sgl.gateway.audit.group_commit import GroupCommit
from vase_sgl.gateway.audit.records import Record, StoredRecord, Summary
from vase_sgl.gateway.audit.tables import chains, records
from vase_sgl.gateway.errors import AuditUnavailable

logger = logging.getLogger(__name__)

#: Seconds after a failed append in which generations are refused at once.
_REFUSING_SECONDS = 2.0
#: Seconds before the one retry of a failed batch.
_RETRY_SECONDS = 0.2

#: Seconds from which on a commit is worth a warning.
_SLOW_SECONDS = 1.0

#: What a database that is away, full or overloaded raises; anything else is a defect.
_TROUBLE = (SQLAlchemyError, OSError, TimeoutError)
#: What one record that cannot be stored causes, whatever else is in its batch.
_ITEM_FAULTS = (IntegrityError, DataError)


class AuditStore:
    """Records of all tenants, append-only and hash-chained per tenant.

    Several gateways may append to one store: they take turns on a tenant's row in `chains`, so a
    chain never forks. An append is durable when it returns.
    """

    def __init__(self, engine: AsyncEngine, keys: KeyRing) -> None:
        self._engine = engine
        #: Reads that hang could take all connections of the other engine.
        self._appending = database.own_connection(engine)
        self._keys = keys
        self._failed_at: float | None = None
        #: Batches that could not be written, the retry included.
        self.write_failures = 0
        self._commits = GroupCommit(
            self._commit,
            retry_alone=lambda error: not isinstance(error, AuditUnavailable),
            size=lambda sealed: len(sealed.payload or b""),
            max_bytes=database.TRANSACTION_BYTES,
        )

    @classmethod
    async def open(
        cls, url: str, *, migrate: bool | None = None, keys: KeyRing | None = None
    ) -> AuditStore:
        """Connect; see `database.connect` for `migrate`. Raises `AuditError`."""
        return cls(await database.connect(url, migrate=migrate), keys or KeyRing())

    async def close(self) -> None:
        """Commit what waits and release all connections."""
        await self._commits.close()
        await self._appending.dispose()
        await self._engine.dispose()

    def check(self) -> None:
        """Raise `AuditUnavailable` if the store failed just now: what cannot be recorded need not
        be computed."""
        if self._failed_at is not None and time.monotonic() - self._failed_at < _REFUSING_SECONDS:
            raise AuditUnavailable(
                "the audit store cannot be written, so nothing is generated; try again later"
            )

    async def append(self, record: Record) -> int:
        """Store a record at the end of its tenant's chain; its sequence there. Durable on return.

        Raises `AuditUnavailable` if the database cannot be written; nothing is promised then.
        """
        # Encoding and encrypting a long answer takes milliseconds that other streams need.
        sealed = await asyncio.to_thread(seal, record, self._keys)
        return await self._commits.submit(sealed)

    async def get(self, tenant: str, record_id: str) -> StoredRecord | None:
        """One of the tenant's own records. Raises `FailedPrecondition` if it cannot be read: its
        key is not there, or it is of a newer version."""
        if "\0" in record_id:
            return None  # no id has one, and PostgreSQL takes it for an error
        query = select(records).where(records.c.record_id == record_id, records.c.tenant == tenant)
        async with self._reading() as connection:
            row = (await connection.execute(query)).mappings().first()
        return None if row is None else await asyncio.to_thread(unseal, Row(**row), self._keys)

    async def latest(
        self,
        tenant: str,
        *,
        before: tuple[int, ...] | None,
        count: int,
        since_unix_micros: int | None = None,
        until_unix_micros: int | None = None,
        by_arrival: bool = False,
    ) -> list[Summary]:
        """Up to `count` of the tenant's records in short, newest first.

        since, until: only requests that arrived at or after, and before. by_arrival: in the order
        of arrival and then sequence, not of sequence alone: so an index finds those of a time,
        which otherwise takes a look at the whole chain. before: where the page before ended, as its
        last record's sequence, or (by arrival) its arrival and sequence.
        """
        created = records.c.created_unix_micros
        order = (created, records.c.sequence) if by_arrival else (records.c.sequence,)
        # SQLite would read all of a payload to come to the hash behind it.
        columns = [column for column in records.c if column.name not in ("payload", "hash")]
        query = select(*columns).where(records.c.tenant == tenant)
        if before is not None:
            query = query.where(_behind(before))
        if since_unix_micros is not None:
            query = query.where(created >= since_unix_micros)
        if until_unix_micros is not None:
            query = query.where(created < until_unix_micros)
        query = query.order_by(*(column.desc() for column in order)).limit(count)
        async with self._reading() as connection:
            rows = (await connection.execute(query)).mappings().all()
        # As in `append`: a page of long ones takes a tenth of a second.
        return await asyncio.to_thread(lambda: [_summary(row) for row in rows])

    async def tenants(self) -> dict[str, int]:
        """Every tenant that has records, with their number."""
        query = select(records.c.tenant, func.count()).group_by(records.c.tenant)
        async with self._reading() as connection:
            rows = (await connection.execute(query)).all()
        return {str(row[0]): int(row[1]) for row in rows}

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        with _unavailable("read"):
            async with self._engine.connect() as connection:
                yield connection

    async def _commit(self, batch: Sequence[Sealed]) -> list[int]:
        begun = time.monotonic()
        try:
            try:
                sequences = await self._write(batch)
            except _ITEM_FAULTS:
                raise
            except _TROUBLE as error:
                logger.warning(
                    "appending %d records failed, once more: %s", len(batch), described(error)
                )
                await asyncio.sleep(_RETRY_SECONDS)
                if not isinstance(error, PoolTimeout):  # there was one
                    # After a failover it may lead to a standby, which answers and never writes.
                    await database.drop_connections(self._appending)
                with _unavailable("written"):
                    # The commit may have succeeded and its confirmation been lost.
                    sequences = await self._write(batch, again=True)
        except AuditUnavailable:
            self._failed_at = time.monotonic()
            self.write_failures += 1
            raise
        self._failed_at = None
        if (seconds := time.monotonic() - begun) > _SLOW_SECONDS:
            logger.warning(
                "the audit store is slow: %d records took %.1f s, for which their answers waited",
                len(batch),
                seconds,
            )
        return sequences

    async def _write(self, batch: Sequence[Sealed], *, again: bool = False) -> list[int]:
        """Append all of `batch` in one transaction; the sequences."""
        rows: list[Row] = []
        async with database.writing(self._appending) as connection:
            ends = await self._lock(connection, {sealed.record.tenant for sealed in batch})
            done = await self._stored(connection, batch) if again else {}
            for sealed in batch:
                record = sealed.record
                if record.record_id in done:
                    continue
                sequence, last_hash = ends[record.tenant]
                row = sealed.at(sequence + 1, last_hash)
                ends[record.tenant] = row.sequence, row.hash
                rows.append(row)
            if rows:
                await connection.execute(insert(records), [vars(row) for row in rows])
                for tenant in {row.tenant for row in rows}:
                    sequence, last_hash = ends[tenant]
                    await connection.execute(
                        update(chains)
                        .where(chains.c.tenant == tenant)
                        .values(sequence=sequence, hash=last_hash)
                    )
        placed = {**done, **{row.record_id: row.sequence for row in rows}}
        return [placed[sealed.record.record_id] for sealed in batch]

    async def _lock(
        self, connection: AsyncConnection, tenants: set[str]
    ) -> dict[str, tuple[int, str]]:
        """The ends of the tenants' chains, kept from other writers until the transaction ends.

        In the order of names, so that two gateways never wait for each other.
        """
        first = [{"tenant": t, "sequence": 0, "hash": GENESIS} for t in sorted(tenants)]
        query = (
            select(chains)
            .where(chains.c.tenant.in_(tenants))
            .order_by(chains.c.tenant)
            .with_for_update()
        )
        found = (await connection.execute(query)).all()
        if len(found) < len(tenants):
            known = {row.tenant for row in found}
            new = [values for values in first if values["tenant"] not in known]
            if self._engine.dialect.name == "postgresql":
                await connection.execute(
                    postgresql.insert(chains).values(new).on_conflict_do_nothing()
                )
            else:
                await connection.execute(insert(chains), new)
            found = (await connection.execute(query)).all()
        return {row.tenant: (row.sequence, row.hash) for row in found}

    async def _stored(self, connection: AsyncConnection, batch: Sequence[Sealed]) -> dict[str, int]:
        """The sequences of those of `batch` that are stored, by record id."""
        ids = [sealed.record.record_id for sealed in batch]
        query = select(records.c.record_id, records.c.sequence)
        rows = await connection.execute(query.where(records.c.record_id.in_(ids)))
        return {row.record_id: row.sequence for row in rows}


def _behind(place: tuple[int, ...]) -> ColumnElement[bool]:
    """Whether a record comes after this place of a list, newest first."""
    *arrival, sequence = place
    below = records.c.sequence < sequence
    if not arrival:
        return below
    created = records.c.created_unix_micros
    return and_(created <= arrival[0], or_(created < arrival[0], below))


def _summary(values: RowMapping) -> Summary:
    return summarize(Row(**values, payload=None, hash=hash_of(values["entry"])))


@contextmanager
def _unavailable(what: str) -> Iterator[None]:
    try:
        yield
    except _ITEM_FAULTS:
        raise
    except _TROUBLE as error:
        if isinstance(error, SQLAlchemyError) and not isinstance(error, (DBAPIError, PoolTimeout)):
            raise  # a defect in a query
        logger.error("the audit store cannot be %s: %s", what, described(error))
        raise AuditUnavailable(f"the audit store cannot be {what} now; try again later") from error
