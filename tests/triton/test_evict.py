"""Whole rounds through the kernels: the reference's bytes, whatever lies around them.

Most scores are rounded otherwise than the reference's. The seeds here leave no two keys at the edge
of a selection that close, so kept sets, bytes and digests are equal; how close the keys themselves
are is the matter of `test_scores.py` and `test_matrix.py`.
"""

from __future__ import annotations

import pytest
import torch
from vase_kernels import evict as evict_module
from vase_kernels.evict import PoolView, evict
from vase_kernels.reference import SCORERS
from vase_kernels.requests import DueRequest, pack
from vase_kernels.workspace import Maxima, Workspace

from tests.triton.device import DEVICE
from tests.triton.scene import (
    ALLOCATION_GUARD,
    POLICIES,
    assert_same_bytes,
    due,
    make_scene,
    make_workspace,
    run_kernels,
    run_reference,
)

RAGGED = [
    due(3, 40, 24, 8, num_protected=6),
    due(1, 48, 37, 11, round=3, logical_length=90, num_sinks=2, num_protected=9, pool_width=3),
    due(0, 150, 33, 16, num_protected=8, projection_dim=7, mix_lambda=0.5),
    # Two that keep their prompt: in the first round, and later.
    due(2, 21 + 40, 32, 8, num_protected=8, pinned=21),
    due(4, 9 + 37, 26, 11, round=3, logical_length=99, num_sinks=12, num_protected=6, pinned=9),
]
STEADY = [due(1, 45, 32, 13, round=2, logical_length=70, num_protected=8)]
ONE = {"layers": 1, "heads": 1}
READ_ROWS = [name for name in POLICIES if name not in ("random", "streaming")]


def check_against_reference(policy: str, requests: list[DueRequest], **shape) -> None:
    scene = make_scene(requests, **shape)
    expected = scene.clone()
    result = run_kernels(policy, scene, requests)
    sums = [int(run_reference(policy, expected, r)) for r in requests]
    assert result.round_sums.tolist() == sums
    assert result.faults.tolist() == [0] * len(requests)
    assert_same_bytes(scene, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_ragged_batch(policy):
    layers = 2 if policy in ("vase-attnv", "rkv", "random") else 1
    check_against_reference(policy, RAGGED, layers=layers, heads=2, group=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_dtypes(policy, dtype):
    check_against_reference(policy, STEADY, dtype=dtype, group=4, layers=1)


@pytest.mark.parametrize("policy", READ_ROWS)
@pytest.mark.parametrize("dim", [16, 96, 128, 256])
def test_head_dims_of_one_head_and_layer(policy, dim):
    dtype = torch.float8_e5m2 if dim == 16 else torch.float16
    check_against_reference(policy, STEADY, dim=dim, dtype=dtype, **ONE)


@pytest.mark.parametrize(("group", "scale"), [(1, None), (3, 1.0), (16, None)])
def test_groups(group, scale):
    """One of them with a scale of the model's own, eight times the usual one."""
    check_against_reference("vase-attnv", STEADY, group=group, attention_scale=scale, **ONE)


@pytest.mark.parametrize("policy", POLICIES)
def test_smallest_batch(policy):
    for pinned in (0, 1):
        r = due(0, 7 + pinned, 5, 1, num_sinks=0, pinned=pinned)
        check_against_reference(policy, [r], **ONE)


def test_every_policy_of_the_reference_has_kernels():
    assert set(POLICIES) == set(evict_module.POLICIES) == set(SCORERS)


@pytest.mark.parametrize("policy", ["random", "streaming"])
def test_rows_of_several_blocks(policy):
    requests = [
        due(0, 2900, 1201, 64),
        due(1, 1201 + 64, 1201, 64, round=5, logical_length=9000),
    ]
    check_against_reference(policy, requests, dim=16, **ONE)


@pytest.mark.parametrize("policy", ["random", "streaming"])
def test_late_round_that_shrinks(policy):
    """Holes are then in no order of position, and more than one block of them."""
    check_against_reference(
        policy, [due(0, 170, 80, 8, round=4, logical_length=400)], dim=16, **ONE
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_alone_in_a_batch_or_on_other_slots(policy):
    """Same kept rows by column, same digest, whoever else is due and wherever the rows lie."""

    def columns_of(scene, r):
        slots = scene.req_to_token[r.row, r.pinned : r.pinned + r.budget].long()
        rows = [x[slots].view(torch.uint8) for x in scene.buffers]
        return [scene.positions[:, slots], *rows]

    together = make_scene(RAGGED, **ONE)
    sums = run_kernels(policy, together, RAGGED).round_sums.tolist()
    for n in (1, 3):  # later and first rounds, with a pinned prompt and without
        r = RAGGED[n]
        alone = make_scene([r], **ONE, seed=n + 5, spare=50)
        assert run_kernels(policy, alone, [r]).round_sums.tolist() == [sums[n]]
        for x, y in zip(columns_of(alone, r), columns_of(together, r), strict=True):
            assert torch.equal(x, y)


def test_dirty_workspace_empty_rows_and_changing_policies():
    """One workspace, larger than needed, poisoned, used by one policy after another."""
    requests = [RAGGED[1], RAGGED[3]]  # in a later and in the first round, one with pinned columns
    scene = make_scene(requests, heads=1, layers=1)
    workspace = make_workspace(scene, requests, extra=3)
    pointers = {name: x.data_ptr() for name, x in workspace.tensors.items()}
    for policy in ("vase-attnv", "curdkv", "rkv", "snapkv", "vase-attnv"):
        for x in workspace.tensors.values():
            x.view(torch.uint8).fill_(0xA5)
        dirty, clean = scene.clone(), scene.clone()
        sums = run_kernels(policy, dirty, requests, workspace).round_sums.tolist()
        assert sums == [*run_kernels(policy, clean, requests).round_sums.tolist(), 0, 0, 0]
        assert_same_bytes(dirty, clean)
    assert pointers == {name: x.data_ptr() for name, x in workspace.tensors.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_guard_elements_around_every_buffer(policy):
    scene = make_scene(RAGGED, heads=1, layers=1, group=2)
    workspace = make_workspace(scene, RAGGED)
    guard, held = 64, {}
    for name, x in workspace.tensors.items():
        held[name] = torch.full((x.numel() + 2 * guard,), 99, dtype=x.dtype, device=DEVICE)
        setattr(workspace, name, held[name][guard:-guard].view(x.shape))
    before = scene.clone()
    inputs = [scene.req_to_token.clone(), scene.ring.clone()]
    run_kernels(policy, scene, RAGGED, workspace)
    for x in held.values():
        assert (x[:guard] == 99).all() and (x[-guard:] == 99).all()
    assert torch.equal(inputs[0], scene.req_to_token) and torch.equal(inputs[1], scene.ring)

    # Rows that no request keeps, rows that it gave up and pinned rows have the bytes they had.
    kept = torch.cat(
        [scene.req_to_token[r.row, r.pinned : r.pinned + r.budget] for r in RAGGED]
    ).long()
    others = torch.ones(scene.positions.shape[1], dtype=torch.bool)
    others[kept] = False
    assert torch.equal(scene.positions[:, others], before.positions[:, others])
    for x, y in zip(scene.allocations, before.allocations, strict=True):
        inner = slice(ALLOCATION_GUARD, -ALLOCATION_GUARD)
        x, y = x.view(torch.uint8), y.view(torch.uint8)  # pinned rows are NaN
        assert torch.equal(x[:ALLOCATION_GUARD], y[:ALLOCATION_GUARD])
        assert torch.equal(x[-ALLOCATION_GUARD:], y[-ALLOCATION_GUARD:])
        assert torch.equal(x[inner][others], y[inner][others])


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_columns_are_not_there(policy):
    """What is left of a request behind its pinned columns is a request of its own."""
    kept = due(1, 17 + 45, 32, 13, round=2, logical_length=90, num_protected=8, pinned=17)
    bare = due(1, 45, 32, 13, round=2, logical_length=90, num_protected=8, seed=kept.seed)
    scene = make_scene([kept], layers=1)
    suffix = scene.clone()
    suffix.req_to_token = scene.req_to_token[:, 17:].contiguous()
    sums = run_kernels(policy, scene, [kept]).round_sums.tolist()
    assert run_kernels(policy, suffix, [bare]).round_sums.tolist() == sums
    assert_same_bytes(scene, suffix)


def test_pinned_slots_may_be_shared():
    """Two requests on one prompt, as a prefix cache shares it, forget what they forget alone."""
    requests = [due(row, 20 + 45, 32, 13, num_protected=8, pinned=20) for row in (0, 1)]
    scene = make_scene(requests)
    scene.req_to_token[1, :20] = scene.req_to_token[0, :20]
    expected = scene.clone()
    sums = run_kernels("vase-attnv", scene, requests).round_sums.tolist()
    assert sums == [int(run_reference("vase-attnv", expected, r)) for r in requests]
    assert_same_bytes(scene, expected)


# The interpreter makes numbers of float8_e5m2's infinities and NaN, so only compiled kernels pass.
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float8_e5m2, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("policy", READ_ROWS)
def test_nan_and_inf_rows(policy, dtype):
    scene = make_scene(STEADY, heads=1, dtype=dtype)
    slots = scene.req_to_token[1].long()
    for x in scene.k:
        x[slots[10]] = torch.nan
    # One NaN or inf key makes all of a query's softmax NaN, and all similarities.
    if policy not in ("vase-attnv", "snapkv", "rkv"):
        for x in scene.k:
            x[slots[12], :, 0] = torch.inf
    for x in scene.v:
        x[slots[14]] = torch.nan
        # The largest range, were it not for one NaN.
        x[slots[15]] = (x[slots[15]].float() * 50).to(dtype)
        x[slots[15], :, 0] = torch.nan
        x[slots[16], :, 0] = -torch.inf
        x[slots[17]] = torch.inf
    expected = scene.clone()
    sums = run_kernels(policy, scene, STEADY).round_sums.tolist()
    assert sums == [int(run_reference(policy, expected, STEADY[0]))]
    assert_same_bytes(scene, expected)


@pytest.mark.parametrize("policy", ["vase-attnv", "snapkv"])
def test_a_key_that_no_query_attends_to(policy):
    """Its logits are all -inf and its weight is 0, for a window that is padded too."""
    scene = make_scene(STEADY, heads=1, group=3, dtype=torch.float16)
    scene.ring[..., 0] = 1
    for x in scene.k:
        x[scene.req_to_token[1, 10].long(), :, 0] = -torch.inf
    expected = scene.clone()
    sums = run_kernels(policy, scene, STEADY).round_sums.tolist()
    assert sums == [int(run_reference(policy, expected, STEADY[0]))]
    assert_same_bytes(scene, expected)


def test_infinite_scores_stay_below_sinks():
    """Every candidate but the sinks goes, the one of infinite energy too."""
    requests = [due(0, 24, 8, 4)]
    scene = make_scene(requests, dtype=torch.float16, **ONE)
    scene.k[0][scene.req_to_token[0, 12].long(), :, 0] = torch.inf
    expected = scene.clone()
    result = run_kernels("vase-dkv", scene, requests)
    assert result.faults.tolist() == [0]
    sums = [int(run_reference("vase-dkv", expected, requests[0]))]
    assert result.round_sums.tolist() == sums
    assert_same_bytes(scene, expected)


def test_equal_rows_tie_by_position():
    for policy in READ_ROWS:
        scene = make_scene(STEADY, heads=1)
        for x in (*scene.k, *scene.v):
            x.zero_()
        expected = scene.clone()
        sums = run_kernels(policy, scene, STEADY).round_sums.tolist()
        assert sums == [int(run_reference(policy, expected, STEADY[0]))]
        assert torch.equal(scene.positions, expected.positions)


def test_what_cannot_be_kept_is_refused_or_reported():
    with pytest.raises(ValueError, match="21 victims are more than the 20 candidates"):
        due(0, 30, 9, 6, num_sinks=4)
    with pytest.raises(ValueError, match="need 0 < window < budget"):
        due(0, 30, 25, 6)
    with pytest.raises(ValueError, match="20 rows beside 10 pinned"):
        due(0, 30, 15, 6, pinned=10)
    with pytest.raises(ValueError, match="pinned must not be negative"):
        due(0, 30, 15, 6, pinned=-1)
    with pytest.raises(ValueError, match=r"mix_lambda 1.5 is not in \[0, 1\]"):
        due(0, 30, 15, 6, mix_lambda=1.5)
    assert due(0, 40, 9, 6, num_sinks=14, pinned=25).pinned == 25  # those sinks are pinned
    with pytest.raises(ValueError, match="pool_width must be odd"):
        due(0, 40, 20, 6, pool_width=4)
    with pytest.raises(ValueError, match="2 requests do not fit a table of 1"):
        pack([STEADY[0]] * 2, 1)

    scene = make_scene(STEADY, **ONE)
    table = pack(STEADY, 1)
    table[0, 7] = 10**6  # every candidate a sink: no caller can build this from DueRequest
    there = scene.to(DEVICE)
    result = evict("random", there.view, table.to(DEVICE), None, make_workspace(scene, STEADY))
    assert result.faults.tolist() == [1]


def test_pool_and_arguments_are_checked():
    scene = make_scene(STEADY, heads=1)
    scene = scene.to(DEVICE)
    view, workspace = scene.view, make_workspace(scene, STEADY)
    table = pack(STEADY, 1).to(DEVICE)
    with pytest.raises(ValueError, match="unknown policy 'lru'"):
        evict("lru", view, table, None, workspace)
    with pytest.raises(ValueError, match="reads the window's queries"):
        evict("vase-attnv", view, table, None, workspace)
    with pytest.raises(ValueError, match="does not fit workspace"):
        evict("random", view, pack(STEADY, 2), None, workspace)
    with pytest.raises(ValueError, match="workspace is not for 2 layers of 1"):
        small = Workspace(Maxima(1, 45, 32, 13), layers=1, kv_heads=1, device=DEVICE)
        evict("random", view, table, None, small)
    with pytest.raises(ValueError, match="query ring of window 12"):
        evict("vase-attnv", view, table, scene.ring[:, :, :12].contiguous(), workspace)
    with pytest.raises(ValueError, match="K of layer 1: rows are not aligned"):
        k = [scene.k[0], scene.allocations[1].flatten()[1:][: scene.k[0].numel()]]
        k[1] = k[1].view(scene.k[0].shape)
        PoolView.of(k, scene.v, scene.positions, scene.req_to_token)
    with pytest.raises(ValueError, match="req_to_token: want contiguous int32"):
        PoolView.of(scene.k, scene.v, scene.positions, scene.req_to_token.long())
    with pytest.raises(ValueError, match=r"KV dtype torch\.float64"):
        double = [x.double() for x in scene.buffers]
        PoolView.of(double[:2], double[2:], scene.positions, scene.req_to_token)


def test_empty_table_changes_nothing():
    scene = make_scene(STEADY, **ONE)
    before = scene.clone()
    workspace = make_workspace(scene, STEADY)
    for policy in POLICIES:
        assert run_kernels(policy, scene, [], workspace).round_sums.tolist() == [0]
    assert_same_bytes(scene, before)
