"""Retention keys of the kernels, against the reference and against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from vase_kernels.reference import Candidates, retention_keys

from tests.kernels import oracle
from tests.triton.scene import FIELDS, POLICIES, due, make_scene, make_workspace, run_kernels

REQUEST = due(1, 60, 40, 16, round=2, logical_length=99, num_protected=10, projection_dim=19)


def keys_of_kernels(policy, scene):
    """float32 [layers, heads, candidates], decoded from the order that a round leaves behind."""
    workspace = make_workspace(scene, [REQUEST])
    run_kernels(policy, scene.clone(), [REQUEST], workspace)
    order = workspace.order.view(*scene.positions.shape[::2], -1)[
        ..., : REQUEST.length - REQUEST.window
    ]
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_keys(policy, dtype):
    scene = make_scene([REQUEST], group=2, dtype=dtype)
    got = keys_of_kernels(policy, scene)

    r, (layers, _, heads) = REQUEST, scene.positions.shape
    slots = scene.req_to_token[r.row, : r.length].long()
    older = slots[: r.length - r.window]
    positions = scene.positions[:, older].transpose(1, 2).to(torch.int64)
    positions[..., r.budget :] = torch.arange(r.budget, len(older)) + r.logical_length - r.length
    at = torch.arange(r.logical_length - r.window, r.logical_length) % scene.ring.shape[2]
    queries = scene.ring[:, r.row, at].transpose(1, 2)
    keys, values = ([x[older].transpose(0, 1) for x in side] for side in (scene.k, scene.v))
    fields = {name: getattr(r, name) for name in FIELDS[policy]} | {"budget": r.budget}
    if policy == "vase-attnv":
        fields["protected_share"] = r.num_protected / r.budget
    candidates = Candidates(
        keys=tuple(x[None] for x in keys),
        values=tuple(x[None] for x in values),
        queries=queries[None],
        positions=positions[None],
        seed=torch.tensor([r.seed]),
        round=torch.tensor([r.round]),
        layers=torch.arange(layers) + scene.first_layer,
        heads=torch.arange(heads) + scene.first_head,
    )
    expected = retention_keys(policy, candidates, **fields)[0]
    if policy in ("random", "streaming"):
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for layer in range(layers):
        exact = oracle.retention_keys(
            policy,
            keys[layer],
            values[layer],
            queries[layer],
            positions[layer],
            seed=r.seed,
            layer=scene.first_layer + layer,
            first_head=scene.first_head,
            round=r.round,
            **fields,
        )
        torch.testing.assert_close(
            got[layer].double(), torch.from_numpy(exact), rtol=2e-5, atol=2e-5
        )
