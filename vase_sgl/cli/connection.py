"""Options of the commands that talk to a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vase_sgl.client import AsyncClient, Client, Tls

DEFAULT_TARGET = "127.0.0.1:50051"

Target = Annotated[
    str, typer.Option(envvar="VASE_TARGET", help="The gateway's host:port.", show_default=True)
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="VASE_API_KEY",
        help="API key, as `vase-sgl tenants add` showed it. The variable keeps it out of the "
        "process list.",
        show_default=False,
    ),
]
TlsFlag = Annotated[bool, typer.Option("--tls", help="Encrypt; trust the system's authorities.")]
CaFile = Annotated[
    Path | None,
    typer.Option(
        help="Encrypt; trust the authorities in this PEM file.", exists=True, dir_okay=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def connect(target: str, api_key: str | None, tls: bool, ca_file: Path | None) -> Client:
    """The client these options describe."""
    from vase_sgl.client import Client

    return Client(target, api_key, tls=_tls(tls, ca_file))


def connect_async(target: str, api_key: str | None, tls: bool, ca_file: Path | None) -> AsyncClient:
    """The same for asyncio."""
    from vase_sgl.client import AsyncClient

    return AsyncClient(target, api_key, tls=_tls(tls, ca_file))


def _tls(tls: bool, ca_file: Path | None) -> Tls | None:
    from vase_sgl.client import Tls

    if ca_file is not None:
        return Tls(root_certificates=ca_file.read_bytes())
    return Tls() if tls else None
