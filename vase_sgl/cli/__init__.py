"""The command line `vase-sgl`.

A command imports what it needs when it runs, so that the client commands start fast and work
without torch, sglang or the gateway's packages. Nor does this module need typer to be imported: if
that is missing, `main` says so.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from vase_sgl.cli.failures import missing_package

if TYPE_CHECKING:
    import typer

#: Modules with a `register(app)`, in the order of `--help`.
MODULES = (
    "serve",
    "generate",
    "replay",
    "records",
    "inspect",
    "evaluate",
    "tenants",
    "audit",
    "doctor",
    "version",
)

#: Commands that parse their own arguments: name -> (module, function, help). The function takes
#: the arguments as a list and returns the exit status.
PASS_THROUGH = {
    "worker": (
        "vase_sgl.cli.worker",
        "worker_command",
        "Run SGLang's own HTTP server with fixed KV budgets. Takes every SGLang flag.",
    ),
}


def build_app() -> typer.Typer:
    """The application with every command registered."""
    import typer

    app = typer.Typer(
        name="vase-sgl",
        help="Fixed KV-cache budgets per request on SGLang, with replayable answers.",
        epilog="Start with `vase-sgl doctor`: what is installed and what can run.",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,  # locals may hold keys
        add_completion=False,
    )
    for name, (module, function, text) in PASS_THROUGH.items():
        _register_pass_through(app, name, module, function, text)
    for module in MODULES:
        import_module(f"vase_sgl.cli.{module}").register(app)
    return app


def main() -> None:
    """Run the command line; ends the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else: a caller has put something in its place
            # An answer goes on where the terminal or pipe has no code for a character.
            stream.reconfigure(errors="backslashreplace")
    # Unless told otherwise gRPC tells on stderr of every fork and every failed handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        build_app()()
    except ModuleNotFoundError as error:
        text = missing_package(error, command="".join(sys.argv[1:2]))
        if text is None:
            raise
        print(text, file=sys.stderr)
        sys.exit(1)


def _register_pass_through(
    app: typer.Typer, name: str, module: str, function: str, text: str
) -> None:
    import typer

    def command(context: typer.Context) -> None:
        raise typer.Exit(getattr(import_module(module), function)(context.args))

    # typer would look the annotation's name up in this module, which does not have it.
    command.__annotations__["context"] = typer.Context
    app.command(
        name,
        help=text,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(command)
