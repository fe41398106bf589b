"""The engine with the Triton kernels, as it runs on a GPU, here under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vase_sgl.engine import limits
from vase_sgl.engine.config import EngineConfig
from vase_sgl.engine.pool import refused_anywhere
from vase_sgl.engine.rounds import chosen_kernels, padded_rows

_DECODER = "tests/engine/test_independent_decode.py::test_tokens_equal_the_independent_decoder"
_INSPECT = "tests/engine/test_inspect.py::test_the_file_says_what_an_independent_decoder_keeps"
_TESTS = (
    f"{_INSPECT}[evict-45-True]",  # compares tokens too
    f"{_DECODER}[vase-attnv-keep-45-True]",
    f"{_DECODER}[vase-dkv-evict-12-False]",
    "tests/engine/triton_rounds.py",
)


def test_the_engine_s_tokens_with_triton_rounds_equal_the_independent_decoder() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *_TESTS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "VASE_KERNELS": "triton"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{len(_TESTS) + 3} passed" in result.stdout  # four in the last


def test_what_one_rank_cannot_run_no_rank_does() -> None:
    everyone = [{"rkv": "too large"}, {}, {"rkv": "no memory", "knorm": "no ptxas"}]
    ranks = SimpleNamespace(all_gather_object=lambda mine: everyone if mine is everyone[1] else [])
    assert refused_anywhere(everyone[1], ranks) == {"rkv": "too large", "knorm": "no ptxas"}


def test_a_default_that_cannot_run_ends_the_start() -> None:
    """Else every request without a budget would be refused by a worker that looks healthy."""
    refused = {"vase-attnv": "out of shared memory"}
    limits.refuse_default(EngineConfig(), refused)
    limits.refuse_default(EngineConfig(default={"budget": 512, "policy": "random"}), refused)
    with pytest.raises(limits.UnsupportedConfiguration, match=r"vase-attnv, .* \(out of shared"):
        limits.refuse_default(EngineConfig(default={"budget": 512}), refused)


def test_asking_for_triton_without_a_gpu_fails_loudly() -> None:
    with pytest.raises(RuntimeError, match="VASE_KERNELS=triton needs a GPU"):
        chosen_kernels(EngineConfig(kernels="triton"), "cpu")
    assert chosen_kernels(EngineConfig(), "cpu") == "reference"
    assert chosen_kernels(EngineConfig(), "cuda") == "triton"
    assert chosen_kernels(EngineConfig(kernels="reference"), "cuda") == "reference"


class _Writes(TorchDispatchMode):
    """Counts calls that may copy or fill: all but those that make views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_rows_are_padded_in_as_many_launches_however_many_are_due() -> None:
    counts = []
    for number in (2, 50):
        slots = [torch.arange(1, 5 + index % 7) for index in range(number)]
        with _Writes() as writes:
            rows = padded_rows(slots)
        counts.append(writes.count)
        longest = max(len(row) for row in slots)
        assert rows.dtype == torch.int32 and rows.is_contiguous()
        assert rows.tolist() == [row.tolist() + [0] * (longest - len(row)) for row in slots]
    assert counts[0] == counts[1] <= 4
