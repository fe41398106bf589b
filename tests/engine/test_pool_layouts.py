"""Other KV pools: pages of 16 slots, bfloat16 and float8 entries. Each in a process of its own,
because SGLang builds one scheduler a process."""

from __future__ import annotations

import os

import pytest
import torch

from tests.engine.own_process import run_tests
from vase_sgl.engine import limits

_DECODER = "tests/engine/test_independent_decode.py::test_tokens_equal_the_independent_decoder"
_CUTS = (
    "tests/engine/test_prompt_cuts.py::test_chunks_and_neighbours_change_nothing",
    "tests/engine/test_prompt_cuts.py::test_a_cached_prefix_changes_nothing[150]",
)
_PAGED = (
    *_CUTS,
    f"{_DECODER}[vase-attnv-evict-45-True]",
    f"{_DECODER}[vase-dkv-keep-45-True]",
    f"{_DECODER}[random-evict-12-False]",
    "tests/engine/test_schedules.py::test_random_schedules[True-True-60]",
    "tests/engine/test_failures_others_met.py::test_01_the_token_in_flight_has_a_slot_of_its_own",
    "tests/engine/paged_pool.py",
    "tests/engine/test_reserved_slots.py::test_the_longest_prompt_runs_and_a_longer_one_does_not",
)
_FLOAT8 = (
    *_CUTS,
    f"{_DECODER}[vase-attnv-evict-45-True]",
    f"{_DECODER}[vase-dkv-keep-45-True]",
)
#: The kernels' tests cover both float8 types; here one will do.
_SLOW = pytest.mark.skipif("VASE_TEST_SLOW" not in os.environ, reason="set VASE_TEST_SLOW=1")


@pytest.mark.xdist_group("own-process")
@pytest.mark.parametrize(
    ("variable", "value", "tests"),
    [
        ("VASE_TEST_PAGE_SIZE", "16", _PAGED),
        ("VASE_TEST_DTYPE", "bfloat16", (*_CUTS, "tests/engine/bfloat16_model.py")),
        pytest.param("VASE_TEST_KV_DTYPE", "fp8_e5m2", _FLOAT8, marks=_SLOW),
        ("VASE_TEST_KV_DTYPE", "fp8_e4m3", _FLOAT8),
    ],
    ids=["page-size-16", "bf16", "fp8-e5m2", "fp8-e4m3"],
)
def test_the_engine_on(variable: str, value: str, tests: tuple[str, ...]) -> None:
    run_tests(tests, {variable: value})


def test_scaled_float8_entries_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    limits.refuse_scaled_kv(model)
    model[0].k_scale_float = 0.5
    with pytest.raises(limits.UnsupportedConfiguration, match=r"0 has k_scale_float 0\.5"):
        limits.refuse_scaled_kv(model)
