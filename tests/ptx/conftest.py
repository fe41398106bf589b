"""These tests execute what Triton compiles for sm_90, on a CPU.

They need Triton without its interpreter, so nothing is collected with `TRITON_INTERPRET=1`; and
with `VASE_TEST_GPU=1` the same kernels run on the device itself. The whole of `tests/triton` runs
this way with `VASE_TEST_PTX=1`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.ptx.launcher import Launcher, executed_ptx
from tests.triton.device import INTERPRETED, ON_GPU

collect_ignore_glob = ["test_*.py"] if INTERPRETED or ON_GPU else []


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def launcher(request: pytest.FixtureRequest) -> Iterator[Launcher]:
    """Every launch of the test is executed here, and none may race.

    Parametrized with a seed, warps run in an order drawn from it.
    """
    seed = getattr(request, "param", None)
    with executed_ptx(None if seed is None else np.random.default_rng(seed)) as launcher:
        yield launcher
    assert launcher.launches
    assert [str(race) for race in launcher.races] == []
