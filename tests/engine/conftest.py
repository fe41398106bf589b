"""The engine in this process: torchvision workaround first, then SGLang with the plugin."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vase_sgl.engine import served_model
from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

declare_torchvision_operators()

from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

from tests.engine.scheduler_harness import SteppedScheduler  # noqa: E402
from tests.engine.tiny_model import write_tiny_model  # noqa: E402


@pytest.fixture(params=[1, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of torch. Each has scratch of its own in kernels, aligned in its own way; the bits
    must not follow the thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VASE_TEST_CONFIG: changes (JSON), for a run in a process of its own."""
    changes = json.loads(os.environ.get("VASE_TEST_CONFIG", "{}"))
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), **changes)


@pytest.fixture(scope="session")
def stepped(tiny_model: Path) -> Iterator[SteppedScheduler]:
    """One scheduler for the session (SGLang keeps process-wide state): 400 slots, 8 requests.

    VASE_TEST_PAGE_SIZE, VASE_TEST_DTYPE, VASE_TEST_KV_DTYPE: for a run in a process of its own.
    """
    torch.manual_seed(0)
    page_size = int(os.environ.get("VASE_TEST_PAGE_SIZE", "1"))
    with torch.inference_mode():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in served_model.environment_for(str(tiny_model)).items():
                patch.setenv(name, value)  # SGLang would import every model that it has
            scheduler = SteppedScheduler(
                tiny_model,
                slots=400,
                page_size=page_size,
                dtype=os.environ.get("VASE_TEST_DTYPE", "float32"),
                kv_cache_dtype=os.environ.get("VASE_TEST_KV_DTYPE", "auto"),
            )
        yield scheduler
