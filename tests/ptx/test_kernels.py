"""The package's kernels as a GPU gets them: bytes equal to the reference's, and nothing races.

A slice that takes seconds; `VASE_TEST_PTX=1` runs all of `tests/triton` this way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vase_kernels.requests import DueRequest

from tests.ptx.launcher import Launcher
from tests.triton import test_copy_rows as copies
from tests.triton import test_evict as evictions
from tests.triton import test_query_ring as rings
from tests.triton import test_scores as scores
from tests.triton import test_select as selection
from tests.triton.scene import (
    POLICIES,
    assert_same_bytes,
    make_scene,
    make_workspace,
    run_kernels,
    run_reference,
)

#: In the first round and later, with pinned columns and without.
REQUESTS = evictions.RAGGED[1:4]


def check_against_reference(policy: str, requests: list[DueRequest], **shape: Any) -> None:
    """With a dirty workspace, larger than needed, and a row of the table that is empty."""
    scene = make_scene(requests, **shape)
    expected = scene.clone()
    workspace = make_workspace(scene, requests, extra=1)
    for x in workspace.tensors.values():
        x.view(torch.uint8).fill_(0xA5)
    result = run_kernels(policy, scene, requests, workspace)
    sums = [int(run_reference(policy, expected, r)) for r in requests]
    assert result.round_sums.tolist() == [*sums, 0]
    assert result.faults.tolist() == [0] * (len(requests) + 1)
    assert_same_bytes(scene, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_whole_rounds(policy: str, launcher: Launcher) -> None:
    shape = {"layers": 1, "heads": 2, "group": 2, "dim": 64, "dtype": torch.bfloat16}
    check_against_reference(policy, REQUESTS, **shape)
    assert {"select_kernel", "plan_kernel", "move_kernel"} <= launcher.launches.keys()


@pytest.mark.parametrize("launcher", [1], indirect=True)
@pytest.mark.parametrize("policy", ["random", "rkv", "vase-attnv", "vase-dkv"])
def test_warps_in_another_order(policy: str, launcher: Launcher) -> None:
    check_against_reference(policy, evictions.STEADY, layers=1, heads=1, dtype=torch.float16)


@pytest.mark.parametrize("policy", ["vase-attnv", "vase-dkv", "knorm"])
def test_float8_rows_with_nan_and_infinities(policy: str, launcher: Launcher) -> None:
    """Which the interpreter reads as numbers."""
    evictions.test_nan_and_inf_rows(policy, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16], ids=str)
def test_ranges(dtype: torch.dtype, launcher: Launcher) -> None:
    scores.test_a_range_is_that_of_the_whole_row(dtype)


@pytest.mark.parametrize("kind", ["many ties", "special"])
def test_selection(kind: str, launcher: Launcher) -> None:
    selection.test_against_a_sort(kind, round=2)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16], ids=str)
def test_copied_rows(dtype: torch.dtype, launcher: Launcher) -> None:
    copies.test_rows_of_any_type_and_width(dtype, heads=3, dim=64)


def test_stored_queries(launcher: Launcher) -> None:
    rings.test_queries_land_in_their_rings(torch.bfloat16, heads=9)
