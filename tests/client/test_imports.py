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


def test_the_client_works_with_grpcio_and_protobuf_alone() -> None:
    """Every other package is refused; a real call is made, and its failure is understood."""
    script = """
import importlib.abc, sys
class Nothing(importlib.abc.MetaPathFinder):
    allowed = sys.stdlib_module_names | {"grpc", "vase_sgl", "typing_extensions"}
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in self.allowed or name in ("google", "google._upb") or (
            name.startswith(("google.protobuf", "google._upb"))
        ):
            return None
        raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Nothing())
from vase_sgl.client import Client, RetryPolicy, Unavailable
with Client("127.0.0.1:9", "vsk_x", retry=RetryPolicy(2, 0.01)) as client:
    for call in (client.capacity, lambda: list(client.generate("a"))):
        try:
            call()
        except Unavailable as error:
            assert "check host and port" in str(error)
        else:
            raise AssertionError("there is no gateway")
print("understood", "opentelemetry" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "understood False\n", done.stderr
