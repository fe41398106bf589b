"""`vase-sgl eval` as a user runs it, against the gateway tests' worker double."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vase_sgl.cli import build_app

TINY = ("--tasks", "passkey?steps=4", "--limit", "3", "--seeds", "2", "--max-new-tokens", "60")
GRID = ("--policies", "full,vase-attnv,random+keep", "--budgets", "32,48", "--window", "8")


async def run_eval(*arguments: object, status: int = 0, **env: str) -> tuple[str, str]:
    """Output and errors of `vase-sgl eval` with these arguments, in another thread."""
    result = await asyncio.to_thread(
        CliRunner().invoke,
        build_app(),
        ["eval", *map(str, arguments)],
        env={"COLUMNS": "200", **env},
    )
    assert result.exit_code == status, f"{result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.stdout, result.stderr


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run."""
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
