"""Every policy against the float64 oracle: keys within tolerance, kept sets but for near ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vase_kernels.reference import SCORERS, Candidates, retention_keys

from tests.kernels import oracle
from tests.kernels.one_layer import layer_victims

POLICIES = list(SCORERS)
EXACT = {"random", "streaming", "evict-largest-values"}
# float32 against float64: log weights differ absolutely, energies and norms relatively; weights
# and redundancies are shares of 1.
TOLERANCE = dict.fromkeys(POLICIES, 1e-4) | {"snapkv": 1e-6, "rkv": 1e-6}

# kv_heads, group, head_dim, candidates, window, budget, victims, dtype
SHAPES = [
    (1, 1, 64, 40, 8, 32, 16, torch.float32),
    (3, 3, 64, 97, 16, 64, 49, torch.bfloat16),
    (2, 4, 128, 61, 7, 48, 23, torch.bfloat16),
    (2, 1, 128, 17, 5, 12, 9, torch.float32),
    (1, 3, 20, 5, 1, 4, 1, torch.float32),
    (2, 2, 64, 33, 4, 24, 13, torch.float16),
]
FIELDS: dict[str, list[dict[str, Any]]] = {
    "vase-attnv": [
        {},
        {"num_sinks": 0, "protected_share": 0.0, "pool_width": 1},
        {"num_sinks": 1, "protected_share": 0.3, "pool_width": 9},
    ],
    "vase-dkv": [{}, {"num_sinks": 2, "projection_dim": 7}],
    "curdkv": [{}, {"num_sinks": 2, "projection_dim": 7}],
    "snapkv": [{}, {"num_sinks": 1, "pool_width": 1}],
    "rkv": [
        {},
        {"num_sinks": 1, "pool_width": 7, "mix_lambda": 0.5},
        {"mix_lambda": 0.0},
    ],
    "random": [{}, {"num_sinks": 0}],
    "streaming": [{}, {"num_sinks": 1}],
    "knorm": [{}, {"num_sinks": 4}],
    "evict-largest-values": [{}, {"num_sinks": 4}],
}
CASES = [(policy, fields) for policy in POLICIES for fields in FIELDS[policy]]


def make_case(shape: tuple[Any, ...], generator: int) -> dict[str, Any]:
    heads, group, dim, candidates, window, budget, _, dtype = shape
    g = torch.Generator().manual_seed(generator)
    positions = [
        torch.cat((torch.arange(2), 2 + torch.randperm(3 * candidates, generator=g)))[:candidates]
        for _ in range(heads)
    ]
    return {
        "keys": torch.randn(heads, candidates, dim, generator=g).to(dtype),
        "values": torch.randn(heads, candidates, dim, generator=g).to(dtype),
        "queries": torch.randn(heads * group, window, dim, generator=g).to(dtype),
        "positions": torch.stack(positions),
        "budget": budget,
        "seed": 0x1234_5678_9ABC_DEF0 + generator,
        "layer": 5,
        "first_head": 6,
        "round": 3,
    }


def package_keys(policy: str, case: dict[str, Any], fields: dict[str, Any]) -> torch.Tensor:
    heads = case["positions"].shape[0]
    candidates = Candidates(
        keys=(case["keys"][None],),
        values=(case["values"][None],),
        queries=case["queries"][None, None],
        positions=case["positions"][None, None],
        seed=torch.tensor([case["seed"]]),
        round=torch.tensor([case["round"]]),
        layers=torch.tensor([case["layer"]]),
        heads=torch.arange(heads) + case["first_head"],
    )
    return retention_keys(policy, candidates, budget=case["budget"], **fields)[0, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(x) for x in s[:7]))
@pytest.mark.parametrize(("policy", "fields"), CASES)
def test_policy_matches_oracle(policy, fields, shape):
    case = make_case(shape, generator=len(fields))
    num_victims = shape[6]
    key = oracle.retention_keys(policy, **case, **fields)
    got_key = package_keys(policy, case, fields).double()
    expected_key = torch.from_numpy(key)
    assert torch.equal(got_key.isinf(), expected_key.isinf())
    if policy in EXACT:
        assert torch.equal(got_key, expected_key)
    else:
        tolerance = TOLERANCE[policy]
        torch.testing.assert_close(got_key, expected_key, rtol=1e-4, atol=tolerance)

    got = layer_victims(policy, num_victims=num_victims, **case, **fields)
    expected = oracle.victims(key, case["positions"], num_victims)
    assert got.dtype == torch.int64 and got.shape == (shape[0], num_victims)
    if policy in EXACT:
        assert got.tolist() == expected
        return
    for head, (ours, theirs) in enumerate(zip(got.tolist(), expected, strict=True)):
        differ = set(ours) ^ set(theirs)
        spread = [key[head][c] for c in differ]
        if differ:  # only tokens that float32 cannot tell apart may swap
            assert max(spread) - min(spread) <= TOLERANCE[policy] * max(1.0, max(map(abs, spread)))


def test_a_zero_key_is_similar_to_none_and_others_not_to_themselves():
    case = make_case(SHAPES[0], generator=3)
    case["keys"][:, 9] = 0
    got = package_keys("rkv", case, {"mix_lambda": 0.0}).double()
    expected = torch.from_numpy(oracle.retention_keys("rkv", **case, mix_lambda=0.0))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_defaults_are_those_of_the_policy_classes():
    policies = pytest.importorskip("vase_sgl.eviction").POLICIES
    case = make_case(SHAPES[1], generator=11)
    for name in POLICIES:
        explicit = layer_victims(name, num_victims=30, **case, **policies[name]().fields())
        assert torch.equal(layer_victims(name, num_victims=30, **case), explicit)


@pytest.mark.parametrize("policy", POLICIES)
def test_float8_rows_are_upcast(policy):
    case = make_case(SHAPES[0], generator=2)
    for name in ("keys", "values", "queries"):
        case[name] = case[name].to(torch.float8_e4m3fn)
    got = layer_victims(policy, num_victims=10, **case)
    for name in ("keys", "values", "queries"):
        case[name] = case[name].to(torch.float32)
    assert torch.equal(got, layer_victims(policy, num_victims=10, **case))
