from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from vase_kernels.reference import SCORERS
from vase_kernels.reference.order import smallest

from tests.kernels.one_layer import layer_victims

INF, NAN = math.inf, math.nan


def inputs(heads: int = 2, candidates: int = 24, dim: int = 16, window: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "keys": torch.randn(heads, candidates, dim, generator=g),
        "values": torch.randn(heads, candidates, dim, generator=g),
        "queries": torch.randn(2 * heads, window, dim, generator=g),
        "positions": torch.arange(candidates).expand(heads, -1),
        "budget": 16,
        "seed": 17,
        "layer": 1,
        "first_head": 0,
        "round": 2,
    }


@pytest.mark.parametrize(
    ("key", "positions", "expected"),
    [
        ([3.0, 1.0, 2.0], [0, 1, 2], [1, 2, 0]),
        ([1.0, 1.0, 1.0, 1.0], [7, 3, 9, 5], [1, 3, 0, 2]),
        ([0.0, -0.0, 0.0], [2, 1, 0], [2, 1, 0]),
        ([1.0, NAN, -INF, INF, -NAN], [0, 5, 4, 1, 3], [4, 2, 1, 0, 3]),
        ([-1.0, -2.0, 1e-45, -1e-45, -3e38], [0, 1, 2, 3, 4], [4, 1, 0, 3, 2]),
    ],
)
def test_smallest_orders_by_key_then_position(key, positions, expected):
    columns = smallest(torch.tensor(key), torch.tensor(positions), len(key))
    assert columns.tolist() == expected


def test_smallest_agrees_with_a_plain_sort_on_many_ties():
    g = torch.Generator().manual_seed(3)
    key = torch.randint(-3, 4, (50, 200), generator=g).float()
    positions = torch.stack([torch.randperm(1000, generator=g)[:200] for _ in range(50)])
    got = smallest(key, positions, 70).tolist()
    for row, k, p in zip(got, key.tolist(), positions.tolist(), strict=True):
        assert row == sorted(range(200), key=lambda c: (k[c], p[c]))[:70]


def test_streaming_evicts_the_oldest_after_the_sinks():
    victims = layer_victims("streaming", num_victims=3, **inputs())
    assert victims.tolist() == [[4, 5, 6]] * 2


def test_victims_come_in_order_of_token_position():
    case = inputs()
    g = torch.Generator().manual_seed(5)
    case["positions"] = torch.stack([torch.randperm(99, generator=g)[:24] for _ in range(2)])
    for policy in SCORERS:
        victims = layer_victims(policy, num_victims=9, num_sinks=4, **case)
        places = case["positions"].gather(-1, victims)
        assert bool((places.diff(dim=-1) > 0).all())
        assert bool((places >= 4).all())


def test_equal_scores_evict_the_lower_position():
    case = inputs()
    case["keys"] = torch.zeros_like(case["keys"])
    case["positions"] = torch.arange(23, -1, -1).expand(2, -1)
    assert layer_victims("vase-dkv", num_victims=3, **case).tolist() == [[19, 18, 17]] * 2


def test_equal_value_ranges_protect_the_lower_position():
    case = inputs()
    case["values"] = torch.zeros_like(case["values"])
    # 6 of budget 16 protected, 4 sinks inside that number: tokens 0..5, whatever the draw says.
    for seed in range(20):
        case["seed"] = seed
        victims = layer_victims("vase-attnv", num_victims=18, protected_share=0.4, **case)
        assert victims.tolist() == [list(range(6, 24))] * 2


def test_sinks_stay_when_the_protected_number_is_smaller():
    victims = layer_victims("vase-attnv", num_victims=20, protected_share=0.0, **inputs())
    assert victims.tolist() == [list(range(4, 24))] * 2


def test_nan_goes_first_and_infinite_scores_stay_below_sinks():
    case = inputs()
    case["keys"][:, 10] = NAN
    case["keys"][:, 12, 0] = INF
    case["values"][:, 15] = NAN
    victims = layer_victims("vase-dkv", num_victims=2, **case)
    assert victims.tolist() == [[10, 15]] * 2
    everything_but_sinks = layer_victims("vase-dkv", num_victims=20, **case)
    assert everything_but_sinks.tolist() == [list(range(4, 24))] * 2


def test_curdkv_draws_one_projection_per_request():
    """Rounds differ for vase-dkv and not for curdkv, seeds differ for both."""
    case = inputs(candidates=200)
    for policy, same in (("vase-dkv", False), ("curdkv", True)):
        first, later = (
            layer_victims(policy, num_victims=90, **case | {"round": round}) for round in (1, 2)
        )
        assert torch.equal(first, later) is same
        other = layer_victims(policy, num_victims=90, **case | {"round": 1, "seed": 18})
        assert not torch.equal(first, other)


def test_rkv_evicts_copies_and_snapkv_does_not():
    case = inputs(candidates=40, dim=64)
    case["keys"][:, 20:30] = case["keys"][:, 19:20]  # eleven equal keys
    case["queries"] = case["keys"][:, 19].repeat_interleave(2, 0)[:, None].expand(-1, 4, -1)
    redundant = set(range(19, 30))
    for victims in layer_victims("rkv", num_victims=11, mix_lambda=0.0, **case).tolist():
        assert set(victims) == redundant
    for victims in layer_victims("snapkv", num_victims=11, pool_width=1, **case).tolist():
        assert redundant.isdisjoint(victims)


def test_the_ablation_evicts_what_vase_attnv_protects():
    case = inputs(candidates=40)
    case["values"][:, 13] *= 100
    case["values"][:, 27] *= 50
    victims = layer_victims("evict-largest-values", num_victims=2, **case)
    assert victims.tolist() == [[13, 27]] * 2
    kept = layer_victims("vase-attnv", num_victims=34, protected_share=0.4, **case)
    assert not bool(((kept == 13) | (kept == 27)).any())


def test_knorm_keeps_low_norms():
    case = inputs(candidates=40)
    case["keys"][:, 7] *= 9
    case["keys"][:, 9, 0] = INF
    case["keys"][:, 11, 0] = NAN
    victims = layer_victims("knorm", num_victims=3, **case)
    assert victims.tolist() == [[7, 9, 11]] * 2


@pytest.mark.parametrize("policy", ["snapkv", "rkv"])
def test_one_undefined_key_makes_every_score_of_its_head_undefined(policy):
    """Then the lowest positions outside the sinks go; the other head is not affected."""
    case = inputs(candidates=40)
    expected = layer_victims(policy, num_victims=3, num_sinks=4, **case)
    case["keys"][0, 30] = NAN
    victims = layer_victims(policy, num_victims=3, num_sinks=4, **case)
    assert victims[0].tolist() == [4, 5, 6]
    assert torch.equal(victims[1], expected[1])


def test_nan_value_range_is_not_protected():
    case = inputs()
    case["values"][:, 10] = NAN
    case["values"][:, 11, 0] = INF
    victims = layer_victims("vase-attnv", num_victims=18, protected_share=0.4, **case)
    assert bool((victims == 10).any(-1).all()) and not bool((victims == 11).any())


def test_nan_attention_falls_back_to_the_oldest_unprotected():
    case = inputs()
    case["queries"][:, 0, 0] = NAN
    victims = layer_victims("vase-attnv", num_victims=3, protected_share=0.0, **case)
    assert victims.tolist() == [[4, 5, 6]] * 2


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("vase-attnv", {"pool_width": 1}),
        ("vase-dkv", {}),
        ("curdkv", {}),
        ("snapkv", {"pool_width": 1}),
        ("rkv", {"pool_width": 1}),
        ("random", {}),
        ("streaming", {}),
        ("knorm", {}),
        ("evict-largest-values", {}),
    ],
)
def test_column_order_does_not_matter(policy, fields):
    case = inputs(candidates=48)
    places = case["positions"].gather(-1, layer_victims(policy, num_victims=20, **case, **fields))
    for seed in range(5):
        shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
        moved = case | {name: case[name][:, shuffle] for name in ("keys", "values", "positions")}
        victims = layer_victims(policy, num_victims=20, **moved, **fields)
        assert torch.equal(moved["positions"].gather(-1, victims), places)


def test_zero_victims():
    assert layer_victims("random", num_victims=0, **inputs()).shape == (2, 0)


@pytest.mark.parametrize(
    ("policy", "change", "message"),
    [
        ("lru", {}, "unknown policy 'lru'; choose one of vase-attnv, vase-dkv, curdkv, sna"),
        ("random", {"pool_width": 3}, "unknown field pool_width of policy random; it takes num_si"),
        ("random", {"c": 3}, "unknown field c of policy random"),
        ("vase-attnv", {"queries": None}, "policy vase-attnv reads the window's queries; got None"),
        ("rkv", {"queries": None}, "policy rkv reads the window's queries; got None"),
        (
            "knorm",
            {"pool_width": 3},
            "unknown field pool_width of policy knorm; it takes num_sinks",
        ),
        ("random", {"num_victims": 25}, r"num_victims 25 is not in \[0, 24\]"),
        ("random", {"num_victims": -1}, r"num_victims -1 is not in \[0, 24\]"),
        ("random", {"num_victims": 21}, "num_victims 21 is more than policy random may evict: 20"),
        (
            "vase-attnv",
            {"num_victims": 19, "protected_share": 0.4},
            "num_victims 19 is more than policy vase-attnv may evict: 18 of 24",
        ),
        ("vase-attnv", {"queries": torch.zeros(3, 4, 16)}, "3 query heads do not group over 2 KV"),
    ],
)
def test_errors_name_the_fault(policy, change, message):
    with pytest.raises(ValueError, match=message):
        layer_victims(policy, **(inputs() | {"num_victims": 3} | change))
