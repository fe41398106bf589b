"""These tests run kernels under Triton's interpreter, which must be chosen before its import.

The rest of the suite imports Triton without it, so `tests/kernels/test_triton_kernels.py` runs
this folder in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/triton
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # Infinite and undefined keys are tested; numpy, which runs the kernels, remarks on them.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
