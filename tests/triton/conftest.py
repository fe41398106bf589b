"""These tests run kernels under Triton's interpreter, which must be chosen before its import, or
compiled: on a GPU, or their PTX on the CPU.

The rest of the suite imports Triton without its interpreter, so
`tests/kernels/test_triton_kernels.py` runs this folder in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/triton
    VASE_TEST_GPU=1 python -m pytest tests/triton    # compiled; with every case of test_matrix.py
    VASE_TEST_PTX=1 python -m pytest tests/triton    # compiled, executed by tests/ptx

With none of them, nothing is collected here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.triton.device import EMULATED, INTERPRETED, ON_GPU

collect_ignore_glob = [] if INTERPRETED or ON_GPU or EMULATED else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # Infinite and undefined keys are tested; numpy, which runs the kernels, remarks on them.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    if ON_GPU + INTERPRETED + EMULATED > 1:
        raise pytest.UsageError(
            "VASE_TEST_GPU=1, VASE_TEST_PTX=1 and TRITON_INTERPRET=1 exclude each other"
        )
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("VASE_TEST_GPU=1 needs a GPU that torch can use; there is none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _executed_ptx() -> Iterator[None]:
    if not EMULATED:
        yield
        return
    from tests.ptx.launcher import executed_ptx

    with executed_ptx() as launcher:
        yield
    assert [str(race) for race in launcher.races] == []
