"""JSON output of the client's dataclasses."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from typing import Any, TextIO

import typer


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, default=_plain, indent=2, ensure_ascii=False))


def write_json(file: TextIO, value: Any) -> None:
    """One JSON document in a file."""
    json.dump(value, file, default=_plain, indent=2, ensure_ascii=False)
    file.write("\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")
