"""JSON output of the client's dataclasses."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import datetime
from typing import Any, TextIO

import typer


def print_json(value: Any) -> None:
    """One JSON document on stdout; in ASCII if stdout has no code for all of it."""
    text = json.dumps(value, default=_plain, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, default=_plain, indent=2)
    typer.echo(text)


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
