"""`vase-sgl audit`: check the audit store itself."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from vase_sgl.cli.failures import reported


def register(app: typer.Typer) -> None:
    audit = typer.Typer(help="Check the audit store.", no_args_is_help=True)

    # A group of one command would swallow its name; the callback keeps it.
    @audit.callback()
    def group() -> None: ...

    audit.command("verify")(verify)
    app.add_typer(audit, name="audit")


def verify(
    url: Annotated[
        str, typer.Option("--url", envvar="VASE_AUDIT__URL", help="The gateway's audit.url.")
    ] = "sqlite+aiosqlite:///.vase-sgl/audit.sqlite3",
) -> None:
    """Recompute every tenant's hash chain. Exit status 1 if a record was changed or removed."""
    from vase_sgl.gateway.audit import AuditError

    with reported(AuditError):
        whole = asyncio.run(_verify(url))
    if not whole:
        raise typer.Exit(1)


async def _verify(url: str) -> bool:
    from vase_sgl.gateway.audit import AuditStore

    store = await AuditStore.open(url)
    whole = True
    try:
        for tenant, count in (await store.tenants()).items():
            problem = await store.verify(tenant)
            whole = whole and problem is None
            typer.echo(f"{tenant}: {count} records, {problem or 'chain is whole'}")
    finally:
        await store.close()
    return whole
