"""`vase-sgl audit`: the store itself, opened directly. For whoever runs the gateway."""

from __future__ import annotations

import asyncio
import datetime
import getpass
import os
import re
import socket
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from vase_sgl.cli.failures import reported

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from vase_sgl.gateway.audit.chain import ChainCheck, Problem

Url = Annotated[
    str, typer.Option("--url", envvar="VASE_AUDIT__URL", help="The gateway's audit.url.")
]
DEFAULT_URL = "sqlite+aiosqlite:///.vase-sgl/audit.sqlite3"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
OneTenant = Annotated[
    str | None, typer.Option("--tenant", help="Only this tenant.", show_default="all")
]


def register(app: typer.Typer) -> None:
    audit = typer.Typer(
        help="Check, export, prune and migrate the audit store.", no_args_is_help=True
    )
    for command in (verify, export, prune, migrate):
        audit.command()(command)
    app.add_typer(audit, name="audit")


def verify(
    url: Url = DEFAULT_URL,
    tenant: OneTenant = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Check this file of `audit export` instead; needs no store.", exists=True
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="SEQUENCE:HASH",
            help="A head that verify showed before: the chain must still have it. With --tenant.",
        ),
    ] = None,
) -> None:
    """Recompute the hash chains. Exit status 1 if one is broken, with the first place and why.

    Also if there is none: a store without a record proves nothing.

    Someone who may write the database can write a chain anew from some record on, with hashes that
    fit. Note the end of a chain elsewhere, and give it with --head later, to find that out.
    """
    from vase_sgl.gateway.audit import AuditError

    if head is not None and tenant is None:
        raise typer.BadParameter("needs --tenant", param_hint="--head")
    with reported(AuditError, OSError):
        if file is not None:
            whole = _verify_file(file, tenant, _place(head))
        else:
            whole = asyncio.run(_verify(url, tenant, _place(head)))
    if not whole:
        raise typer.Exit(1)


def export(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New file to write.", show_default="stdout"),
    ] = None,
    url: Url = DEFAULT_URL,
    tenant: OneTenant = None,
) -> None:
    """Write chains as JSON Lines: one record a line, as stored, with what `verify --file` needs."""
    from vase_sgl.gateway.audit import AuditError

    with reported(AuditError, OSError):
        count = asyncio.run(_export(url, tenant, output))
    typer.echo(f"{count} records", err=True)


def prune(
    before: Annotated[
        str | None, typer.Option(help="Remove what arrived before this date or time (UTC).")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Remove what is older: 90d, 12h or 30m.")
    ] = None,
    url: Url = DEFAULT_URL,
    tenant: OneTenant = None,
    by: Annotated[
        str | None,
        typer.Option(help="Who prunes, for the checkpoint.", show_default="user@host"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Prune a broken chain too; the checkpoint says so.")
    ] = False,
) -> None:
    """Remove old records. A checkpoint in the chain says how many, when and by whom.

    A chain loses its beginning only: up to the first record that is to stay.
    """
    from vase_sgl.cli import times
    from vase_sgl.gateway.audit import AuditError

    if (before is None) == (older_than is None):
        raise typer.BadParameter("give --before or --older-than", param_hint="--before")
    if before is not None:
        cutoff = times.moment(before, "--before")
    else:
        age = times.age(str(older_than), "--older-than")
        cutoff = datetime.datetime.now(datetime.UTC) - age
    by = by or f"{getpass.getuser()}@{socket.gethostname()}"
    with reported(AuditError):
        asyncio.run(_prune(url, tenant, _unix_micros(cutoff), by, dry_run, force))


def migrate(url: Url = DEFAULT_URL) -> None:
    """Make the tables in an empty database, or bring those of an older version up to date.

    Needs the right to create tables. All of it happens in one transaction.
    """
    from vase_sgl.gateway.audit import AuditError

    with reported(AuditError):
        typer.echo(f"the audit store has schema revision {asyncio.run(_migrate(url))}")


async def _verify(url: str, tenant: str | None, head: tuple[int, str] | None) -> bool:
    from vase_sgl.gateway.audit import AuditError, reading

    whole = True
    async with reading.opened(url) as engine:
        tenants = await _tenants(engine)
        if not tenants:
            raise AuditError(
                "the audit store holds no record, so nothing was verified; that is right before "
                "the first generation only: a copy of SQLite's file without its -wal file is "
                "empty too"
            )
        for name in _chosen(tenants, tenant):
            async with reading.snapshot(engine) as connection:
                check, problem = await reading.verify(connection, name, head)
            whole = _report(name, check, problem) and whole
    return whole


def _verify_file(file: Path, tenant: str | None, head: tuple[int, str] | None) -> bool:
    from vase_sgl.gateway.audit import AuditError, export

    known = {tenant: head} if tenant is not None and head is not None else None
    whole, found, file_check = True, [], export.FileCheck(known)
    try:
        with file.open(encoding="utf-8") as lines:
            for name, check, problem in file_check.chains(lines):
                found.append(name)
                if tenant in (None, name):
                    whole = _report(name, check, problem) and whole
    except UnicodeError as error:
        raise AuditError(f"{file} is not a file of `vase-sgl audit export`: {error}") from error
    _chosen(found, tenant)
    if file_check.may_be_cut_off:
        typer.echo(
            f"{file}: of export format 1, which does not say where a file ends: whether it once "
            "held more chains cannot be shown"
        )
    return whole


def _report(tenant: str, check: ChainCheck, problem: Problem | None) -> bool:
    if problem is not None:
        typer.echo(f"{tenant}: {problem}; {check.records} records were found whole")
        return False
    pruned = check.sequence - check.records
    typer.echo(
        f"{tenant}: {check.records} records, chain is whole"
        + (f"; {pruned} before them were pruned" if pruned else "")
        + f"; head {check.sequence}:{check.hash}"
    )
    return True


async def _export(url: str, tenant: str | None, output: Path | None) -> int:
    from vase_sgl.gateway.audit import export, reading

    count = 0
    async with reading.opened(url) as engine:
        chosen = _chosen(await _tenants(engine), tenant)
        stdout = typer.get_text_stream("stdout", encoding="utf-8")  # whatever a terminal has
        with nullcontext(stdout) if output is None else _private(output) as file:
            async with aclosing(export.lines(engine, chosen)) as lines:
                async for line in lines:
                    with _naming(output):
                        file.write(line + "\n")
                    count += line.startswith('{"kind":"record"')
            with _naming(output):
                file.flush()
    return count


def _private(path: Path) -> TextIO:
    """A new file that only its owner can read: it may hold prompts."""
    with _naming(path):
        return open(path, "x", encoding="utf-8", opener=partial(os.open, mode=0o600))


@contextmanager
def _naming(output: Path | None) -> Iterator[None]:
    """A failure to write is the output's, and not the store's."""
    from vase_sgl.gateway.audit import AuditError

    try:
        yield
    except OSError as error:
        raise AuditError(f"cannot write {output or 'to stdout'}: {error.strerror}") from error


async def _prune(
    url: str, tenant: str | None, cutoff: int, by: str, dry_run: bool, force: bool
) -> None:
    from vase_sgl.gateway.audit import reading

    async with reading.opened(url) as engine:
        for name in _chosen(await _tenants(engine), tenant):
            await _prune_one(engine, name, cutoff, by, dry_run, force)


async def _prune_one(
    engine: AsyncEngine, tenant: str, cutoff: int, by: str, dry: bool, force: bool
) -> None:
    from vase_sgl.gateway.audit import pruning, reading

    if dry:
        async with reading.snapshot(engine) as connection:
            found = await pruning.due(connection, tenant, cutoff)
    else:
        found = await pruning.prune(engine, tenant, before_unix_micros=cutoff, by=by, force=force)
    verb = "would be removed" if dry else "removed"
    up_to = f", up to sequence {found.last_sequence}" if found.records else ""
    typer.echo(f"{tenant}: {found.records} records {verb}{up_to}{_kept(found.first_kept)}")


def _kept(first: tuple[int, int] | None) -> str:
    """Where a prune ends. It goes no further than a record that a wrong clock has dated ahead."""
    from vase_sgl.cli import times

    if first is None:
        return ""
    sequence, unix_micros = first
    moment = _EPOCH + datetime.timedelta(microseconds=unix_micros)
    return f"; sequence {sequence}, of {times.shown(moment)}, stays"


async def _migrate(url: str) -> str:
    from vase_sgl.gateway.audit import database, schema

    engine = await database.connect(url, migrate=True)
    await engine.dispose()
    return schema.newest()


async def _tenants(engine: AsyncEngine) -> list[str]:
    from vase_sgl.gateway.audit import reading

    async with engine.connect() as connection:
        return await reading.tenants(connection)


def _chosen(tenants: list[str], tenant: str | None) -> list[str]:
    from vase_sgl.gateway.audit import AuditError

    if tenant is None:
        if not tenants:
            typer.echo("the audit store holds no record yet", err=True)
        return tenants
    if tenant not in tenants:
        raise AuditError(
            f"there is no chain of a tenant {tenant!r}; there are: {', '.join(tenants)}"
        )
    return [tenant]


def _place(head: str | None) -> tuple[int, str] | None:
    if head is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,17}):([0-9a-f]{64})", head)
    if match is None:
        raise typer.BadParameter(
            f"{head!r} is not one; it looks like 17:9f86d0…, as verify shows it",
            param_hint="--head",
        )
    return int(match[1]), match[2]


def _unix_micros(moment: datetime.datetime) -> int:
    return (moment - _EPOCH) // datetime.timedelta(microseconds=1)
