"""Shapes and types, judged in two steps that hold for any number of heads and candidates:

1. The kernels' keys are close to the reference's.
2. Given the kernels' keys, everything after them is exact: victims, moves, positions, digest.

So no case depends on whether two keys at the edge of a selection are closer than rounding. The
interpreter runs a slice; `VASE_TEST_GPU=1` on a machine with a GPU runs all of it, compiled.
"""

from __future__ import annotations

import functools

import pytest
import torch
from vase_kernels.evict import evict
from vase_kernels.reference import SCORERS
from vase_kernels.requests import pack

from tests.triton.scene import (
    EXACT,
    POLICIES,
    assert_same_bytes,
    due,
    keys_left_in,
    make_scene,
    make_workspace,
    run_kernels,
    run_reference,
)

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
WINDOWS = (16, 64, 128, 256)
HEAD_DIMS = (64, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)


def check(policy, requests, monkeypatch, **shape):
    """One round against the reference, in the two steps above."""
    scene = make_scene(requests, **shape)
    expected = scene.clone()
    workspace = make_workspace(scene, requests)
    result = run_kernels(policy, scene, requests, workspace)
    assert result.faults.tolist() == [0] * len(requests)
    sums = []
    for r, keys in zip(requests, keys_left_in(workspace, scene, requests), strict=True):
        with monkeypatch.context() as patch:
            patch.setitem(SCORERS, policy, scorer_of_kernels(policy, keys))
            sums.append(int(run_reference(policy, expected, r)))
    assert result.round_sums.tolist() == sums
    assert_same_bytes(scene, expected)


def scorer_of_kernels(policy, keys):
    """A scorer that checks the kernels' keys [layers, heads, candidates] and passes them on."""
    theirs = SCORERS[policy]

    @functools.wraps(theirs.score)
    def score(c, **fields):
        own = keys[None, c.layers]
        assert_close_keys(policy, own, theirs.score(c, **fields))
        return own

    return theirs._replace(score=score)


def assert_close_keys(policy, got, expected):
    expected = expected.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if policy in EXACT:
        assert torch.equal(got, expected)
        return
    # Shares of 1 are as small as 1 / candidates; logarithms of weights are not.
    absolute = 2e-5 / expected.shape[-1] if policy in ("snapkv", "rkv") else 2e-5
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=absolute)


def round_of(window, budget, *, round=2, pinned=0, **fields):
    """A request in steady state, with a share of it protected where that fits."""
    length = pinned + budget + window
    return due(
        1,
        length,
        budget,
        window,
        round=round,
        logical_length=length if round == 1 else 3 * length,
        num_protected=min(budget // 4, budget - window),
        pinned=pinned,
        **fields,
    )


ONE = {"layers": 1, "heads": 1}


@pytest.mark.parametrize("window", [16, 256])
@pytest.mark.parametrize("policy", ["vase-attnv", "rkv", "knorm"])
def test_windows(policy, window, monkeypatch):
    check(policy, [round_of(window, window + 40, pinned=9)], monkeypatch, **ONE)


@pytest.mark.parametrize("dtype", ["fp32", "e4m3", "e5m2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_dtypes(policy, dtype, monkeypatch):
    check(policy, [round_of(8, 40, pinned=3)], monkeypatch, dtype=DTYPES[dtype], **ONE)


@pytest.mark.parametrize("group", [2, 8, 16])
@pytest.mark.parametrize("policy", ["snapkv", "rkv"])
def test_groups(policy, group, monkeypatch):
    check(policy, [round_of(8, 40)], monkeypatch, group=group, **ONE)


@pytest.mark.parametrize("policy", ["random", "knorm"])
def test_the_largest_budget_served(policy, monkeypatch):
    check(policy, [round_of(64, 16384, pinned=100)], monkeypatch, dim=16, **ONE)


# ---- all of it, compiled -------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("policy", POLICIES)
def test_all_types_and_sizes(policy, window, head_dim, dtype, monkeypatch):
    requests = [
        round_of(window, 512, pinned=33, projection_dim=32, pool_width=63),
        due(0, 900, 400, window, num_protected=100, mix_lambda=0.5),
        due(2, 2000, 300, window, num_protected=20, num_sinks=0, pool_width=1),
        due(5, 900, 280, window, num_protected=20, round=7, logical_length=40_000),
    ]
    check(policy, requests, monkeypatch, dim=head_dim, dtype=DTYPES[dtype], group=2, heads=3)


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("policy", ["vase-attnv", "snapkv", "rkv"])
def test_all_groups(policy, heads, group, monkeypatch):
    requests = [
        round_of(64, 512),
        due(3, 77 + 320, 256, 64, num_protected=64, pinned=77),
    ]
    check(policy, requests, monkeypatch, group=group, heads=heads, dim=128, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [512, 1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("pinned", [0, 1000])
@pytest.mark.parametrize("policy", POLICIES)
def test_all_budgets(policy, pinned, budget, monkeypatch):
    for round in (1, 9):
        r = round_of(64, budget, pinned=pinned, round=round)
        check(policy, [r], monkeypatch, heads=2, group=5, dim=128, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_graph_runs_another_batch(policy):
    """Launches are the same for every batch: a graph captured on one runs the next."""
    batches = [
        [due(0, 300, 200, 64, num_protected=50), due(1, 264, 200, 64, round=2, logical_length=999)],
        [due(1, 90 + 280, 216, 64, pinned=90, num_protected=20)],
        [],
    ]
    everyone = [r for batch in batches for r in batch]
    most = make_workspace(make_scene(batches[0]), everyone)
    for batch in batches:
        scene = make_scene(batch or batches[0])
        plain = scene.clone()
        sums = run_kernels(policy, plain, batch, most).round_sums
        there = scene.to("cuda")
        view = there.view  # made of addresses in ordinary memory, which a capture may not copy
        table = torch.zeros_like(pack([], most.maxima.requests)).cuda()
        evict(policy, view, table, there.ring, most)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            evict(policy, view, table, there.ring, most)
        table.copy_(pack(batch, most.maxima.requests))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(most.round_sums.cpu(), sums)
        scene.take_back(there)
        assert_same_bytes(scene, plain)
