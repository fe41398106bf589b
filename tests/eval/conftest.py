"""The torchvision workaround comes before transformers is imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

declare_torchvision_operators()

from tests.eval.tiny_forced import write_tiny_folder  # noqa: E402
from vase_sgl.eval.forced import ForcedModel  # noqa: E402


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny-forced"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[ForcedModel]:
    yield ForcedModel(tiny_folder, torch.float32)
