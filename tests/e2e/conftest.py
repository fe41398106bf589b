from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.otlp_receiver import OtlpReceiver
from tests.e2e.worker_process import SECOND_KEY, WorkerProcess
from vase_sgl.demo.model import ensure_model
from vase_sgl.worker_key import WORKER_KEY


@pytest.fixture(scope="session")
def model() -> Path:
    return ensure_model()


@pytest.fixture(scope="session")
def traces() -> Iterator[OtlpReceiver]:
    """Where `worker` sends its traces."""
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def worker(
    model: Path, traces: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    """One worker for all tests; starting it takes most of the time."""
    folder = tmp_path_factory.mktemp("worker")
    endpoint = f"127.0.0.1:{traces.port}"
    flags = ("--enable-metrics", "--enable-trace", "--otlp-traces-endpoint", endpoint)
    with WorkerProcess(model, folder, *flags) as process:
        yield process


@pytest.fixture(scope="session")
def second_worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """Another process with the same model, which asks for a key and has a parser of thoughts.

    `test_worker_lost.py`, which runs last, kills it.
    """
    key = {WORKER_KEY: SECOND_KEY}
    template = Path(__file__).with_name("thoughts.jinja")
    flags = ("--reasoning-parser", "qwen3", "--chat-template", str(template))
    with WorkerProcess(model, tmp_path_factory.mktemp("second"), *flags, **key) as process:
        yield process
