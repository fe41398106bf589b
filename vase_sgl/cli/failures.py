"""Failures a user can do something about: one line on stderr, exit status 1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

#: Top-level packages by the extra that brings them.
_EXTRAS = {
    "client": ("grpc", "google", "rich", "typer"),
    "eval": (
        "antlr4",
        "latex2sympy2_extended",
        "markdown_it",
        "math_verify",
        "matplotlib",
        "numpy",
        "scipy",
        "sympy",
    ),
    "gateway": (
        "aiohttp",
        "aiosqlite",
        "alembic",
        "argon2",
        "asyncpg",
        "cryptography",
        "grpc_health",
        "grpc_reflection",
        "opentelemetry",
        "prometheus_client",
        "pydantic",
        "pydantic_settings",
        "redis",
        "sqlalchemy",
        "uvloop",
        "yaml",
    ),
    "inspect": ("numpy", "tokenizers"),
    "gpu": ("sglang", "torch", "triton", "vase_kernels"),
    "loadtest": ("gevent", "locust"),
}


@contextmanager
def reported(*expected: type[Exception]) -> Iterator[None]:
    """End the command with the text of an `expected` exception.

    Of a generation's it has the request id, which log and record have too.
    """
    import typer

    try:
        yield
    except expected as error:
        typer.echo(f"error: {_text(error)}", err=True)
        raise typer.Exit(1) from error


#: The gateway's advice, which is wrong once output has come.
_TRY_AGAIN = re.compile("[;,] try again( later)?")


def _text(error: Exception) -> str:
    text = str(error)
    # Asked like this since the SDK, whose errors have both, needs packages that may not be there.
    if getattr(error, "final", False):
        text = f"{_TRY_AGAIN.sub('', text)}; another try is another generation, charged like this"
    request_id = getattr(error, "request_id", None)
    return text if request_id is None else f"{text} (request id {request_id})"


def missing_package(error: ModuleNotFoundError, command: str = "") -> str | None:
    """What to install for a module that is missing; None if it is not one of ours.

    Of several extras that bring it, the one with the name of the `command` is advised.
    """
    package = (error.name or "").partition(".")[0]
    extras = [extra for extra, packages in _EXTRAS.items() if package in packages]
    if not extras:
        return None
    extra = command if command in extras else extras[0]
    text = (
        f"error: this command needs the package {package!r}; install it with "
        f"`pip install '.[{extra}]'` in a checkout"
    )
    if package == "typer":  # no command runs without it
        return text
    return f"{text}; `vase-sgl doctor` shows what is missing"
