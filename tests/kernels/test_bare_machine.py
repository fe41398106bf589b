"""What the kernels' tests import: on a machine with a GPU there may be nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
#: Refuses every installed package but these, and runs pytest.
_BARE = """
import importlib.metadata, re, sys

NEEDED = {"torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis"}
OURS = {"vase-sgl"}

def with_requirements(names):
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match(r"[\\w.-]+", one)[0] for one in requires if "extra ==" not in one]
    return found

allowed = with_requirements(NEEDED) | OURS
refused = {
    top
    for top, owners in importlib.metadata.packages_distributions().items()
    if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & allowed
}

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

assert "argon2" in refused and "sglang" in refused
sys.meta_path.insert(0, Bare)
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/triton"]))
"""


def test_the_kernels_are_tested_with_torch_triton_and_pytest_alone() -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", _BARE], cwd=_ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "test_evict.py::" in run.stdout
