"""Options of the commands that talk to a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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


def _pem(variable: str, text: str) -> Any:
    return typer.Option(envvar=variable, help=text, exists=True, dir_okay=False)


CaFile = Annotated[
    Path | None, _pem("VASE_CA_FILE", "Encrypt; trust the authorities in this PEM file.")
]
ClientCert = Annotated[
    Path | None,
    _pem(
        "VASE_CLIENT_CERT",
        "Encrypt; show this certificate (PEM) to a gateway that asks for one (tls.client_ca).",
    ),
]
ClientKey = Annotated[
    Path | None, _pem("VASE_CLIENT_KEY", "The private key of --client-cert (PEM).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def connect(target: str, api_key: str | None, tls: Tls | None) -> Client:
    """The client these options describe; `tls` from `encryption`."""
    from vase_sgl.client import Client

    return Client(target, api_key, tls=tls)


def connect_async(target: str, api_key: str | None, tls: Tls | None) -> AsyncClient:
    """The same for asyncio."""
    from vase_sgl.client import AsyncClient

    return AsyncClient(target, api_key, tls=tls)


def encryption(
    tls: bool, ca_file: Path | None, client_cert: Path | None, client_key: Path | None
) -> Tls | None:
    """What the options say of it; None: clear text."""
    from vase_sgl.client import Tls

    if (client_cert is None) != (client_key is None):
        raise typer.BadParameter(
            "a certificate needs its key, and a key its certificate; give both options",
            param_hint="--client-cert" if client_key is None else "--client-key",
        )
    if not tls and ca_file is None and client_cert is None:
        return None
    return Tls(*(_content(file) for file in (ca_file, client_cert, client_key)))


def _content(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()
