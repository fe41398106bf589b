"""What a type checker says of a user's code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

USER = """
from vase_sgl.client import AsyncClient, Client, Verdict

def ask(client: Client) -> Verdict:
    client.generate_once([1, 2], max_new_tokens=5, budget=None, stop=["END"])
    client.generate([{"role": "user", "content": "hi"}], prompt_mode="keep")
    return client.replay("id").verdict

async def ask_too(client: AsyncClient) -> str:
    return (await client.generate_once("hi", budget=64)).text

def wrong(client: Client) -> None:
    client.generate("hi", bugdet=64)
    client.generate("hi", budget="64")
    client.generate("hi", prompt_mode="drop")
    client.generate([{"role": "user"}])
"""


def test_a_users_code_is_checked(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    first = USER.splitlines().index("def wrong(client: Client) -> None:") + 2
    assert [line.partition(": error: ")[0] for line in errors] == [
        f"user.py:{first + number}" for number in range(4)
    ], done.stdout + done.stderr
