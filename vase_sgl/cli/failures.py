"""Failures a user can do something about: one line on stderr, exit status 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

#: Top-level packages by the extra that brings them.
_EXTRAS = {
    "client": ("grpc", "google", "pydantic", "rich"),
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
        "pydantic_settings",
        "redis",
        "sqlalchemy",
        "yaml",
    ),
    "inspect": ("numpy", "tokenizers"),
    "gpu": ("sglang", "torch", "triton", "vase_kernels"),
}


@contextmanager
def reported(*expected: type[Exception]) -> Iterator[None]:
    """End the command with the text of an `expected` exception."""
    try:
        yield
    except expected as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that is missing; None if it is not one of ours."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return (
                f"error: this command needs the package {package!r}; install it with "
                f"`pip install 'vase-sgl[{extra}]'`; `vase-sgl doctor` shows what is missing"
            )
    return None
