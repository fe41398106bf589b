"""`vase-sgl --version`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the option to the application."""
    app.callback()(_options)


def _print(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vase-sgl {version('vase-sgl')}")
        raise typer.Exit


def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Options of no command."""
