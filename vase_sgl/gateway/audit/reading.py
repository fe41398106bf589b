"""Reading whole chains in order, page by page, so that memory does not grow with them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from vase_sgl.gateway.audit import database
from vase_sgl.gateway.audit.chain import ChainCheck, Checkpoint, Problem
from vase_sgl.gateway.audit.entries import GENESIS, Row
from vase_sgl.gateway.audit.errors import AuditError, described
from vase_sgl.gateway.audit.tables import chains, checkpoints, records

#: Records read at once. With an answer of 32k tokens each they take some 60 MiB.
_PAGE = 100


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[AsyncEngine]:
    """An engine on a store that exists, for a command. Raises `AuditError`."""
    engine = await database.connect(url, migrate=False, create=False)
    try:
        yield engine
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise AuditError(f"the audit store failed: {described(error)}") from error
    finally:
        await engine.dispose()


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One state of the store, whatever gateways append meanwhile.

    For one chain, not for all of them: PostgreSQL cannot vacuum, nor SQLite cut its WAL, while a
    state is held.
    """
    async with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            await connection.execution_options(isolation_level="REPEATABLE READ")
        async with connection.begin():
            yield connection


async def tenants(connection: AsyncConnection) -> list[str]:
    """Whose chains there are, in order."""
    found = {
        name
        for table in (chains, checkpoints)
        for name in await connection.scalars(select(table.c.tenant).distinct())
    }
    # From name to name: who asks for all of them has every record looked at.
    following = select(func.min(records.c.tenant))
    last: str | None = ""
    while last := await connection.scalar(following.where(records.c.tenant > last)):
        found.add(last)
    return sorted(found)


async def end_of(connection: AsyncConnection, tenant: str) -> tuple[int, str]:
    """Sequence and hash at the noted end of the tenant's chain."""
    query = select(chains.c.sequence, chains.c.hash).where(chains.c.tenant == tenant)
    row = (await connection.execute(query)).first()
    return (0, GENESIS) if row is None else (row.sequence, row.hash)


async def checkpoints_of(connection: AsyncConnection, tenant: str) -> list[Checkpoint]:
    """The tenant's checkpoints, oldest first."""
    query = select(checkpoints).where(checkpoints.c.tenant == tenant).order_by(checkpoints.c.number)
    rows = (await connection.execute(query)).mappings().all()
    return [Checkpoint(**row) for row in rows]


async def rows_of(
    connection: AsyncConnection, tenant: str, *, after: int
) -> AsyncGenerator[Row, None]:
    """The tenant's records with sequences above `after`, oldest first."""
    while True:
        query = (
            select(records)
            .where(records.c.tenant == tenant, records.c.sequence > after)
            .order_by(records.c.sequence)
            .limit(_PAGE)
        )
        rows = (await connection.execute(query)).mappings().all()
        if not rows:
            return
        for row in rows:
            payload = row["payload"]
            # A damaged SQLite row may hold text where bytes belong.
            yield Row(**{**row, "payload": payload.encode() if type(payload) is str else payload})
        after = rows[-1]["sequence"]


async def verify(
    connection: AsyncConnection, tenant: str, known: tuple[int, str] | None = None
) -> tuple[ChainCheck, Problem | None]:
    """Check the tenant's chain in a `snapshot`; `known` as in `ChainCheck`.

    Leftovers of a prune that was cut short lie before the last checkpoint and are not looked at.
    """
    check = ChainCheck(tenant, known=known)
    for stored in await checkpoints_of(connection, tenant):
        problem = check.checkpoint(stored)
        if problem is not None:
            return check, problem
    async with aclosing(rows_of(connection, tenant, after=check.sequence)) as rows:
        async for row in rows:
            problem = check.record(row)
            if problem is not None:
                return check, problem
    return check, check.end(*await end_of(connection, tenant))
