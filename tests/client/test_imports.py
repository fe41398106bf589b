"""The client is light: a user installs neither the gateway's packages nor torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vase_sgl.cli.failures import missing_package
from vase_sgl.cli.worker import worker_command
from vase_sgl.demo.gateway import _CLI
from vase_sgl.eval.math_answers import MathAnswers
from vase_sgl.gateway.worker_embedded import worker_command as embedded_command

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


@pytest.mark.parametrize(
    ("absent", "command", "extra"),
    [
        ("typer", "doctor", "client"),
        ("uvloop", "serve", "gateway"),
        ("numpy", "inspect 0123 --dir .", "inspect"),
        ("numpy", "eval report .", "eval"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(absent: str, command: str, extra: str) -> None:
    script = f"""
import sys
sys.modules[{absent!r}] = None  # as if it was not installed
from vase_sgl.cli import main
sys.argv = ["vase-sgl", *{command.split()!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    advice = f"needs the package {absent!r}; install it with `pip install '.[{extra}]'`"
    assert done.returncode == 1 and advice in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_processes_import_nothing_from_the_folder_they_start_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed worker would run a checkout's engine with its own kernels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vase_sgl.py").write_text("raise SystemExit('of the folder')")
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
    started: list[list[str]] = []
    worker_command([])
    comparing = MathAnswers(seconds=10)
    try:
        assert comparing.compare("2", "2") == "equal"
    finally:
        comparing.close()
    for command in (*started, embedded_command("/models/m", ()), _CLI):
        assert list(command[1:3]) == ["-P", "-m"]


@pytest.mark.parametrize(
    ("package", "extra"),
    [("locust", "loadtest"), ("gevent", "loadtest"), ("pydantic", "gateway")],
)
def test_the_extra_of_a_package(package: str, extra: str) -> None:
    text = missing_package(ModuleNotFoundError("", name=package))
    assert text is not None and f"pip install '.[{extra}]'" in text


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
