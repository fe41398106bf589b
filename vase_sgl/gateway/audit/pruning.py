"""Removing old records so that what is left can still be verified."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import time

from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from vase_sgl.gateway.audit import database, reading
from vase_sgl.gateway.audit.entries import GENESIS, canonical, hash_of
from vase_sgl.gateway.audit.errors import AuditError
from vase_sgl.gateway.audit.tables import checkpoints, records

#: Records removed in one transaction at most, so that appending gateways never wait long.
_CHUNK = 1000
#: Records looked at in one statement, whose time is limited.
_PAGE = 10_000


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What a prune removed, or would remove. last_sequence: 0 if nothing.

    first_kept: sequence and arrival of the record that it stopped at, by the clock of that one's
        gateway. None: it went to the end.
    """

    tenant: str
    records: int
    last_sequence: int
    first_kept: tuple[int, int] | None


async def due(connection: AsyncConnection, tenant: str, before_unix_micros: int) -> Pruned:
    """What a prune would remove: the records before the first that arrived at the time or later.

    connection: a `reading.snapshot`; of two states it would find a beginning and another's end.
    A chain loses its beginning only, so an old record behind a newer one stays for now.
    """
    # In SQL, as a damaged SQLite row may hold text.
    stays = records.c.created_unix_micros >= before_unix_micros
    query = select(records.c.sequence, records.c.created_unix_micros, stays)
    query = query.where(records.c.tenant == tenant).order_by(records.c.sequence).limit(_PAGE)
    count = last = 0
    while page := (await connection.execute(query.where(records.c.sequence > last))).all():
        for sequence, created, kept in page:
            if kept:
                return Pruned(tenant, count, last, (sequence, created))
            count, last = count + 1, sequence
    return Pruned(tenant, count, last, None)


async def prune(
    engine: AsyncEngine, tenant: str, *, before_unix_micros: int, by: str, force: bool = False
) -> Pruned:
    """Note a checkpoint in the tenant's chain, then remove the records up to it.

    The checkpoint is durable first: it is what the database's triggers let records go for. Cut
    short, the next prune removes the rest. force: prune a broken chain as well; the checkpoint
    then says so. Raises `AuditError` for a broken chain, or if another prune is under way.
    """
    async with reading.snapshot(engine) as connection:
        _, problem = await reading.verify(connection, tenant)
        if problem is not None and not force:
            raise AuditError(
                f"the chain of {tenant} is broken, and pruning could remove what shows it: "
                f"{problem}; look into it, or prune with --force"
            )
        # Of the state that was verified: what is appended meanwhile stays, however old it is.
        pruned = await due(connection, tenant, before_unix_micros)
    try:
        through = await _note(engine, pruned, before_unix_micros, by, problem is None)
    except IntegrityError as error:
        raise AuditError(f"another prune of {tenant}'s chain is under way; try again") from error
    await _remove(engine, tenant, through)
    return pruned


async def _note(
    engine: AsyncEngine, pruned: Pruned, before_unix_micros: int, by: str, whole: bool
) -> int:
    """Store the checkpoint if there is something to prune; up to where records may go now.

    It takes no lock, for which the role that prunes would need more rights: of two prunes at the
    same time one finds the checkpoint's number taken.
    """
    tenant = pruned.tenant
    async with database.writing(engine) as connection:
        last_checkpoint = (
            await connection.execute(
                select(checkpoints)
                .where(checkpoints.c.tenant == tenant)
                .order_by(checkpoints.c.number.desc())
                .limit(1)
            )
        ).first()
        reached = 0 if last_checkpoint is None else last_checkpoint.last_sequence
        if pruned.last_sequence > reached:
            last_hash = await connection.scalar(
                select(records.c.hash).where(
                    records.c.tenant == tenant, records.c.sequence == pruned.last_sequence
                )
            )
            number = 1 if last_checkpoint is None else last_checkpoint.number + 1
            entry = canonical(
                {
                    "format": 1,
                    "tenant": tenant,
                    "number": number,
                    "previous_hash": GENESIS if last_checkpoint is None else last_checkpoint.hash,
                    "last_sequence": pruned.last_sequence,
                    "last_hash": last_hash,
                    "records": pruned.last_sequence - reached,
                    "before_unix_micros": before_unix_micros,
                    "pruned_unix_micros": time.time_ns() // 1000,
                    "by": by,
                    "chain_was_whole": whole,
                }
            )
            await connection.execute(
                insert(checkpoints).values(
                    tenant=tenant,
                    number=number,
                    last_sequence=pruned.last_sequence,
                    entry=entry,
                    hash=hash_of(entry),
                )
            )
            reached = pruned.last_sequence
    return reached


async def _remove(engine: AsyncEngine, tenant: str, through: int) -> None:
    size = func.length(records.c.entry) + func.coalesce(func.length(records.c.payload), 0)
    last = 0
    while True:
        # From the last one on: PostgreSQL would look at all that are removed and not vacuumed yet.
        there = (
            records.c.tenant == tenant,
            records.c.sequence > last,
            records.c.sequence <= through,
        )
        query = select(records.c.sequence, size).where(*there).order_by(records.c.sequence)
        async with database.writing(engine) as connection:
            chunk = (await connection.execute(query.limit(_CHUNK))).all()
            if not chunk:
                return
            sizes = list(itertools.accumulate(size for _, size in chunk))
            fits = bisect.bisect_right(sizes, database.TRANSACTION_BYTES)
            last = chunk[max(fits, 1) - 1].sequence
            await connection.execute(delete(records).where(*there, records.c.sequence <= last))
