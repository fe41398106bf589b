"""The kernels' tests, in a process where Triton is imported with its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_TESTS = ("tests/triton", "tests/benchmarks/interpreted_kernels.py")


@pytest.mark.whole_suite
@pytest.mark.timeout(900)
def test_kernels_under_the_interpreter():
    # Where the kernels' tests run compiled, they do so in their own folder.
    compiled = ("VASE_TEST_GPU", "VASE_TEST_PTX")
    others = {name: value for name, value in os.environ.items() if name not in compiled}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS],
        cwd=ROOT,
        env={**others, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
