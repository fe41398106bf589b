"""Retention keys of the kernels, against the reference and against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from vase_kernels.reference import Candidates, retention_keys

from tests.kernels import oracle
from tests.triton.scene import (
    EXACT,
    POLICIES,
    due,
    fields_of,
    keys_left_in,
    make_scene,
    make_workspace,
    run_kernels,
)

#: Keys of this size or less are shares of 1 over some 40 candidates.
SHARES = ("snapkv", "rkv")


@pytest.mark.parametrize(
    ("dtype", "pinned"),
    [(torch.float32, 0), (torch.float16, 7), (torch.bfloat16, 0)],
    ids=str,
)
@pytest.mark.parametrize("policy", POLICIES)
def test_keys(policy, dtype, pinned):
    r = due(
        1,
        pinned + 60,
        40,
        16,
        round=2,
        logical_length=99,
        num_protected=10,
        projection_dim=19,
        pinned=pinned,
        mix_lambda=0.3,
    )
    scene = make_scene([r], layers=1, group=2, dtype=dtype)
    for x in scene.k:  # its norm is 0, and it is not even similar to itself
        x[scene.req_to_token[r.row, pinned + 11].long()] = 0
    workspace = make_workspace(scene, [r])
    run_kernels(policy, scene.clone(), [r], workspace)
    (got,) = keys_left_in(workspace, scene, [r])

    layers, _, heads = scene.positions.shape
    older = scene.req_to_token[r.row, pinned : r.length - r.window].long()
    positions = scene.positions[:, older].transpose(1, 2).to(torch.int64)
    positions[..., r.budget :] = torch.arange(r.budget, len(older)) + r.logical_length - 60
    at = torch.arange(r.logical_length - r.window, r.logical_length) % scene.ring.shape[2]
    queries = scene.ring[:, r.ring_row, at].transpose(1, 2)
    keys, values = ([x[older].transpose(0, 1) for x in side] for side in (scene.k, scene.v))
    fields = fields_of(policy, r) | {"budget": r.budget}
    candidates = Candidates(
        keys=tuple(x[None] for x in keys),
        values=tuple(x[None] for x in values),
        queries=queries[None],
        positions=positions[None],
        seed=torch.tensor([r.seed]),
        round=torch.tensor([r.round]),
        layers=torch.arange(layers),
        heads=torch.arange(heads) + scene.first_head,
    )
    expected = retention_keys(policy, candidates, **fields)[0]
    if policy in EXACT:
        assert torch.equal(got, expected)
    tolerance = 1e-7 if policy in SHARES else 1e-5
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)
    for layer in range(layers):
        exact = oracle.retention_keys(
            policy,
            keys[layer],
            values[layer],
            queries[layer],
            positions[layer],
            seed=r.seed,
            layer=layer,
            first_head=scene.first_head,
            round=r.round,
            **fields,
        )
        torch.testing.assert_close(
            got[layer].double(), torch.from_numpy(exact), rtol=2e-5, atol=2 * tolerance
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_range_is_that_of_the_whole_row(dtype):
    """Wherever its extremes lie; with a NaN anywhere, of either sign, it has none."""
    dim, window = 64, 16
    values = torch.randn(2 * dim + 5, 2, dim, generator=torch.Generator().manual_seed(0)).clamp(
        -3, 3
    )
    column = torch.arange(dim)
    values[column, :, column] = torch.where(column % 2 == 0, torch.nan, -torch.nan)[:, None]
    values[dim + column, :, column] = torch.where(column % 2 == 0, 8.0, -8.0)[:, None]
    values[2 * dim] = torch.inf
    values[2 * dim + 1] = -torch.inf
    values[2 * dim + 2, :, 5] = -torch.inf
    values[2 * dim + 3, :, 7:9] = torch.tensor([torch.inf, -torch.inf])
    values[2 * dim + 4] = 0
    r = due(1, len(values) + window, 100, window, round=2, logical_length=999, num_sinks=0)
    scene = make_scene([r], layers=1, dim=dim, dtype=dtype)
    older = scene.req_to_token[r.row, : len(values)].long()
    scene.v[0][older] = values.to(dtype)
    workspace = make_workspace(scene, [r])
    run_kernels("evict-largest-values", scene, [r], workspace)
    (got,) = keys_left_in(workspace, scene, [r])
    rows = values.to(dtype).float()
    ranges = rows.amax(-1) - rows.amin(-1)
    assert ranges.isnan().all(1).tolist() == [True] * dim + [False] * dim + [True] * 2 + [False] * 3
    assert torch.equal(got[0], -ranges.nan_to_num(nan=torch.inf, posinf=torch.inf).T)
