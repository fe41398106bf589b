"""Where the kernels of these tests run."""

from __future__ import annotations

import os

#: With `VASE_TEST_GPU=1` the same tests run compiled kernels on a GPU.
ON_GPU = os.environ.get("VASE_TEST_GPU") == "1"
#: With `VASE_TEST_PTX=1` they run compiled kernels on the CPU, see `tests/ptx`.
EMULATED = os.environ.get("VASE_TEST_PTX") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
