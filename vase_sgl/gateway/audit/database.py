"""The connection to the store's database: SQLite in a file, or PostgreSQL."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiosqlite
import asyncpg
from sqlalchemy import Connection, event, text
from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from vase_sgl.gateway.audit import schema
from vase_sgl.gateway.audit.errors import AuditError, described

#: Bytes of records, about, that one transaction stores or removes: who waits for its locks waits no
#: longer than that takes, and what SQLite writes for it has room on a volume that is nearly full.
TRANSACTION_BYTES = 8 * 2**20

#: Seconds one statement, or the wait for another process's lock, may take.
_PATIENCE_SECONDS = 10.0
#: Seconds a read may wait for a connection, while others that may hang have them all.
_POOL_SECONDS = 5.0
#: Seconds after which a connection to a server is replaced. Under the time for which load balancers
#: and NATs remember one that is idle; they drop it without a word.
_RECYCLE_SECONDS = 180.0
#: Options of a connection to a server, where the system has them: it is probed after so many idle
#: seconds, and so often; what is not acknowledged for so many milliseconds ends it.
_TCP_OPTIONS = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_USER_TIMEOUT": int(_PATIENCE_SECONDS * 1000),
}


class _KeptAlive(asyncpg.Connection):  # type: ignore[misc]
    """A connection that notices while it is idle that the network has dropped it."""

    def __init__(self, protocol: Any, transport: asyncio.Transport, *arguments: Any) -> None:
        super().__init__(protocol, transport, *arguments)
        connected = transport.get_extra_info("socket")
        if connected.family == socket.AF_UNIX:
            return
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


#: The drivers that are known to work, with what each is told about patience.
_CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "sqlite+aiosqlite": {},
    "postgresql+asyncpg": {
        "timeout": _PATIENCE_SECONDS,
        "command_timeout": 3 * _PATIENCE_SECONDS,
        "connection_class": _KeptAlive,
    },
}


async def connect(url: str, *, migrate: bool | None, create: bool = True) -> AsyncEngine:
    """An engine on a store with the newest schema. Raises `AuditError`.

    migrate: bring an older or empty database to the newest schema; None: if it is SQLite, whose
        file belongs to this process alone.
    create: make a SQLite file that is not there, and turn it to the WAL.
    """
    engine = _engine(url, create)
    if migrate is None:
        migrate = engine.dialect.name == "sqlite" and create
    try:
        if migrate:
            async with writing(engine) as connection:
                await connection.run_sync(schema.upgrade)
        async with engine.connect() as connection:
            await connection.run_sync(_check)
    except BaseException as error:
        await engine.dispose()
        if isinstance(error, (SQLAlchemyError, OSError, TimeoutError)):
            raise AuditError(
                f"cannot open the audit store {engine.url.render_as_string()}: {described(error)}; "
                "check audit.url, and that its database can be reached and written"
            ) from error
        raise
    return engine


def own_connection(engine: AsyncEngine) -> AsyncEngine:
    """An engine on the same store with one connection, which the work of `engine` cannot take.

    A store in memory is its only connection, so there it is `engine` itself.
    """
    if isinstance(engine.pool, StaticPool):
        return engine
    return _engine(engine.url, create=False, pool_size=1, max_overflow=0)


async def drop_connections(engine: AsyncEngine) -> None:
    """Have `engine` connect anew. A store in memory stays: it is its connection."""
    if not isinstance(engine.pool, StaticPool):
        await engine.dispose()


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A transaction that will write; committed on leaving, rolled back by an exception."""
    async with engine.connect() as connection:
        await connection.execution_options(vase_writes=True)
        async with connection.begin():
            if engine.dialect.name == "postgresql":
                # A gateway that is stopped or cut off here would keep its locks for good.
                milliseconds = int(_PATIENCE_SECONDS * 1000)
                limit = f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds}"
                await connection.execute(text(limit))
            yield connection


def _engine(url: str | URL, create: bool, **pool: float) -> AsyncEngine:
    example = "an example is sqlite+aiosqlite:///audit.sqlite3"
    try:
        parsed = make_url(url)
        driver = parsed.drivername
        if driver not in _CONNECT_ARGS:
            raise AuditError(
                f"audit.url cannot be used: {driver} is not one of {', '.join(_CONNECT_ARGS)}; "
                f"{example}"
            )
        dialect = cast("type[DefaultDialect]", parsed.get_dialect())
        if not issubclass(dialect.get_pool_class(parsed), StaticPool):  # which never waits
            pool["pool_timeout"] = _POOL_SECONDS
        server = {
            # Whoever waited for a chain's end reads what the others have written.
            "isolation_level": "READ COMMITTED",
            "pool_recycle": _RECYCLE_SECONDS,
        }
        engine = create_async_engine(
            url,
            **({} if driver.startswith("sqlite") else server),
            hide_parameters=True,  # prompts and seeds must not reach a log with an error
            pool_pre_ping=True,  # a connection the server has closed is replaced, not reported
            connect_args=_CONNECT_ARGS[driver],
            **pool,
        )
    except (ArgumentError, ImportError) as error:
        raise AuditError(f"audit.url cannot be used: {error}; {example}") from error
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine, create)
    return engine


def _check(connection: Connection) -> None:
    found, wanted = schema.current(connection), schema.newest()
    if found != wanted:
        state = "is empty" if found is None else f"has schema revision {found}, not {wanted}"
        raise AuditError(
            f"the audit store {connection.engine.url.render_as_string()} {state}; run "
            "`vase-sgl audit migrate`, or set audit.migrate_on_start"
        )
    if connection.dialect.name == "postgresql":
        confirmed = connection.scalar(text("SHOW synchronous_commit"))
        if confirmed == "off":
            raise AuditError(
                "this PostgreSQL confirms commits that a crash would lose (synchronous_commit is "
                "off); run ALTER ROLE ... SET synchronous_commit = on for the gateway's role"
            )


def _find_file(file: Path, create: bool) -> None:
    if file.exists():
        return
    if not create:
        raise AuditError(f"there is no audit store {file}; name the gateway's audit.url with --url")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # It will hold prompts. SQLite gives its journal files the same mode.
        file.touch(mode=0o600)
    except OSError as error:
        raise AuditError(f"cannot open the audit store {file}: {error}") from error


async def _use_wal(connection: aiosqlite.Connection) -> None:
    """Of two that turn to the WAL at once SQLite refuses one without waiting."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            await (await connection.execute("PRAGMA journal_mode=WAL")).close()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.01)
        else:
            return


def _prepare_sqlite(engine: AsyncEngine, create: bool) -> None:
    name = engine.url.database
    if name not in (None, "", ":memory:"):
        _find_file(Path(str(name)), create)

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: AsyncAdapt_aiosqlite_connection, _: ConnectionPoolEntry) -> None:
        # Python's driver would begin transactions itself, and late: see `begin`.
        connection.isolation_level = None
        if create:
            # Readers do not block the writer, nor the writer them, and a commit is one write of one
            # file. The file keeps the mode. What is only looked for may be a backup without it,
            # which stays as it is and need not be writable.
            connection.run_async(_use_wal)
        cursor = connection.cursor()
        # Each commit syncs its file: NORMAL would lose the last ones with the power.
        cursor.execute("PRAGMA synchronous=FULL")
        # What a long reader let grow is given back to the volume.
        cursor.execute(f"PRAGMA journal_size_limit={2 * TRANSACTION_BYTES}")
        # Another process, such as `audit prune`, may hold the write lock for a moment.
        cursor.execute(f"PRAGMA busy_timeout={int(_PATIENCE_SECONDS * 1000)}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # The write lock is taken at once: a transaction that reads the end of a chain and then
        # finds that another process has written would fail without waiting.
        writes = connection.get_execution_options().get("vase_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
