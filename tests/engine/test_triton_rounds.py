"""The engine with the Triton kernels, as it runs on a GPU, here under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vase_sgl.engine.config import EngineConfig
from vase_sgl.engine.rounds import chosen_kernels

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


def test_asking_for_triton_without_a_gpu_fails_loudly() -> None:
    with pytest.raises(RuntimeError, match="VASE_KERNELS=triton needs a GPU"):
        chosen_kernels(EngineConfig(kernels="triton"), "cpu")
    assert chosen_kernels(EngineConfig(), "cpu") == "reference"
    assert chosen_kernels(EngineConfig(), "cuda") == "triton"
    assert chosen_kernels(EngineConfig(kernels="reference"), "cuda") == "reference"
