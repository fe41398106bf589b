"""The client is light: a user installs neither the gateway's packages nor torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "sglang", "aiohttp", "sqlalchemy", "pydantic", "cryptography", "argon2")


def loaded_by(statement: str) -> set[str]:
    script = f"{statement}\nimport sys; print(*{{m.partition('.')[0] for m in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", script], text=True).split())


@pytest.mark.parametrize(
    "statement",
    ["import vase_sgl.client", "from vase_sgl.cli import build_app; build_app()"],
)
def test_the_client_and_the_command_line_load_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement).isdisjoint(HEAVY)


def test_the_gateway_loads_neither_torch_nor_sglang() -> None:
    loaded = loaded_by("import vase_sgl.gateway.server")
    assert loaded.isdisjoint(("torch", "sglang", "triton", "numpy"))
