"""`vase-sgl records`: the tenant's own records, through the gateway."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from vase_sgl.cli.connection import (
    DEFAULT_TARGET,
    ApiKey,
    AsJson,
    CaFile,
    ClientCert,
    ClientKey,
    Target,
    TlsFlag,
    connect,
    encryption,
)
from vase_sgl.cli.failures import reported


def register(app: typer.Typer) -> None:
    records = typer.Typer(help="List and show recorded generations.", no_args_is_help=True)
    records.command("list")(list_records)
    records.command("show")(show)
    app.add_typer(records, name="records")


def list_records(
    limit: Annotated[int, typer.Option("-n", "--limit", min=1)] = 20,
    as_json: AsJson = False,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    tls: TlsFlag = False,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
) -> None:
    """List your records, newest first, with the times (UTC) at which they arrived."""
    from vase_sgl.cli import times
    from vase_sgl.cli.jsonout import print_json
    from vase_sgl.cli.table import print_table
    from vase_sgl.client import VaseError

    encrypted = encryption(tls, ca_file, client_cert, client_key)
    with reported(VaseError), connect(target, api_key, encrypted) as client:
        page = client.list_records(page_size=min(limit, 1000))
        found = list(itertools.islice(page, limit))
    if as_json:
        print_json(found)
        return
    header = ("id", "when", "status", "tokens", "policy", "budget", "rounds", "digest")
    print_table(
        header,
        [
            (
                record.record_id,
                times.shown(record.created),
                record.status,
                f"{record.usage.prompt_tokens}+{record.usage.completion_tokens}",
                record.policy,
                str(record.budget or ""),
                str(record.rounds),
                record.digest,
            )
            for record in found
        ],
    )


def show(
    record_id: Annotated[str, typer.Argument(help="The request id of the generation.")],
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    tls: TlsFlag = False,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
) -> None:
    """Print one record as JSON: everything that a replay needs."""
    from vase_sgl.cli.jsonout import print_json
    from vase_sgl.client import VaseError

    encrypted = encryption(tls, ca_file, client_cert, client_key)
    with reported(VaseError), connect(target, api_key, encrypted) as client:
        print_json(client.get_record(record_id))
