from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.worker_process import WorkerProcess
from vase_sgl.demo.model import ensure_model


@pytest.fixture(scope="session")
def model() -> Path:
    return ensure_model()


@pytest.fixture(scope="session")
def worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """One worker for all tests; starting it takes most of the time."""
    with WorkerProcess(model, tmp_path_factory.mktemp("worker")) as process:
        yield process
