"""Prompt modes, and the slots that follow from them."""

from __future__ import annotations

import pytest

from vase_sgl.eviction import POLICIES, EvictionLimits, EvictionParams, ParameterError
from vase_sgl.eviction.params import WIDEST

#: Policies with attention sinks.
SINKS = [name for name, policy in POLICIES.items() if hasattr(policy, "num_sinks")]


@pytest.mark.parametrize(
    ("prompt", "prompt_tokens", "pinned", "slots"),
    [
        ("evict", 10, 0, 40),
        ("evict", 100, 0, 108),
        ("keep", 10, 10, 50),
        ("keep", 100, 100, 140),
    ],
)
def test_slots_by_prompt_mode(prompt: str, prompt_tokens: int, pinned: int, slots: int) -> None:
    params = EvictionParams.parse({"budget": 32, "window": 8, "prompt": prompt})
    assert params.pinned(prompt_tokens) == pinned
    assert params.first_round_length(prompt_tokens) == slots
    assert EvictionParams.parse(params.to_mapping()) == params


@pytest.mark.parametrize(
    ("prompt", "prompt_tokens", "output", "prefix_cache", "page_size", "slots"),
    [
        ("evict", 10, 30, True, 1, 40),  # too short for a round
        ("evict", 10, 31, True, 1, 40 + 10),
        ("evict", 10, 31, False, 1, 40),
        ("evict", 100, 50, True, 1, 108 + 40),  # no more is copied than is kept
        ("evict", 100, 50, True, 16, 112 + 48),
        ("evict", 100, 50, False, 16, 112),
        ("keep", 100, 40, True, 1, 140),
        ("keep", 100, 900, True, 1, 140),
        ("keep", 100, 900, True, 16, 144),
    ],
)
def test_slots_reserved_at_admission(
    prompt: str, prompt_tokens: int, output: int, prefix_cache: bool, page_size: int, slots: int
) -> None:
    params = EvictionParams.parse({"budget": 32, "window": 8, "prompt": prompt})
    worker = {"prefix_cache": prefix_cache, "page_size": page_size}
    assert params.reserved_slots(prompt_tokens, output, **worker) == slots


def test_a_policy_that_never_evicts_reserves_every_token() -> None:
    params = EvictionParams.parse({"policy": "full", "budget": 8, "window": 8})
    assert params.reserved_slots(100, 901, prefix_cache=True) == 1001


def test_lower_ceilings_leave_a_recorded_full_cache_as_it_was() -> None:
    recorded = EvictionParams.parse({"policy": "full"}, EvictionLimits(16384, 64)).to_mapping()
    lower = EvictionLimits(max_budget=8192)
    assert EvictionParams.parse(recorded, lower).to_mapping() == recorded
    with pytest.raises(ParameterError, match="budget must be an integer from 1 to 8192, got 16384"):
        EvictionParams.parse({**recorded, "policy": "random"}, lower)


def test_what_a_request_leaves_out() -> None:
    params = EvictionParams.parse({"budget": 256})
    assert (params.policy.name, params.window, params.prompt) == ("vase-attnv", 64, "evict")
    assert (params.seed, params.inspect) == (0, False)
    assert EvictionParams.parse({"budget": 256}, EvictionLimits(max_window=32)).window == 32
    assert EvictionParams.parse({"budget": 256}, EvictionLimits(max_window=128)).window == 64
    assert EvictionParams.parse({"policy": "full"}).budget == EvictionLimits().max_budget
    inspected = EvictionParams.parse({"budget": 256, "inspect": True})
    assert inspected.inspect and EvictionParams.parse(inspected.to_mapping()) == inspected


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_round_trips_with_its_defaults(name: str) -> None:
    params = EvictionParams.parse({"budget": 64, "window": 8, "policy": name})
    assert params.policy == POLICIES[name]()
    assert EvictionParams.parse(params.to_mapping()) == params


@pytest.mark.parametrize(
    ("policy", "fields", "message"),
    [
        ("rkv", {"mix_lambda": 1.5}, "mix_lambda must be a number from 0 to 1, got 1.5"),
        ("rkv", {"mix_lambda": True}, "mix_lambda must be a number from 0 to 1, got True"),
        ("rkv", {"pool_width": 4}, "pool_width must be odd, got 4"),
        ("snapkv", {"pool_width": 65}, "pool_width must be an integer from 1 to 63, got 65"),
        ("snapkv", {"mix_lambda": 0.5}, "unknown key mix_lambda in vase; policy snapkv takes"),
        ("curdkv", {"projection_dim": 33}, "projection_dim must be an integer from 1 to 32"),
        ("knorm", {"num_sinks": 60}, "num_sinks 60 does not fit"),
        ("evict-largest-values", {"protected_share": 0.1}, "unknown key protected_share"),
        *((name, {"num_sinks": 57}, "num_sinks 57 does not fit") for name in SINKS),
        *((name, {"num_sinks": -1}, "num_sinks must be an integer from 0") for name in SINKS),
        ("vase-dkv", {"projection_dim": 0}, "projection_dim must be an integer from 1 to 32"),
        ("vase-attnv", {"pool_width": 4}, "pool_width must be odd, got 4"),
        ("vase-attnv", {"protected_share": -0.1}, "protected_share must be a number from 0 to 1"),
        ("vase-attnv", {"protected_share": 0.9}, "protects 57 tokens, but budget 64 minus window"),
        ("random", {"seed": 2**63}, "seed must be an integer from 0"),
        ("random", {"window": 0}, "window must be an integer from 1 to 64, got 0"),
        ("random", {"window": 64, "num_sinks": 0}, "budget 64 must be greater than window 64"),
        ("random", {"inspect": 1}, "inspect must be true or false, got 1"),
    ],
)
def test_wrong_fields_are_named(policy: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        EvictionParams.parse({"budget": 64, "window": 8, "policy": policy, **fields})


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        *((name, {"num_sinks": 56}) for name in SINKS),
        ("rkv", {"mix_lambda": 0}),
        ("rkv", {"mix_lambda": 1}),
        ("vase-attnv", {"protected_share": 0.875}),  # 56 tokens beside a window of 8
        ("vase-dkv", {"projection_dim": 1}),
        ("curdkv", {"projection_dim": 32}),
        ("snapkv", {"pool_width": 63}),
        ("random", {"seed": 2**63 - 1}),
        ("random", {"window": 63, "num_sinks": 0}),
        ("random", {"window": 1}),
        ("full", {"window": 64}),
    ],
)
def test_the_bounds_themselves_are_accepted(policy: str, fields: dict[str, object]) -> None:
    raw = {"budget": 64, "window": 8, "policy": policy, **fields}
    assert EvictionParams.parse(raw).to_mapping().items() >= raw.items()


@pytest.mark.parametrize("raw", ["64", None, [("budget", 64)]])
def test_what_is_no_object_is_refused(raw: object) -> None:
    with pytest.raises(ParameterError, match="vase must be an object with at least a budget"):
        EvictionParams.parse(raw)


@pytest.mark.parametrize("policy", ["h2o", None, ["random"]])
def test_unknown_policies_are_refused(policy: object) -> None:
    with pytest.raises(ParameterError, match=r"unknown policy .*; choose one of vase-attnv"):
        EvictionParams.parse({"budget": 64, "policy": policy})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_window": 0}, "max_window must be an integer from 1 to 4096"),
        ({"max_window": 4097}, "max_window must be an integer from 1 to 4096"),
        ({"max_budget": 1}, "max_budget must be an integer from 2 to 1048576"),
        ({"max_budget": 2**20 + 1}, "max_budget must be an integer from 2 to 1048576"),
    ],
)
def test_limits_have_limits(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        EvictionLimits(**limits)
    EvictionLimits(max_budget=2, max_window=1)
    assert EvictionLimits(max_budget=2**20, max_window=4096) == WIDEST


@pytest.mark.parametrize("prompt", ["drop", "", None, ["keep"]])
def test_unknown_prompt_modes_are_refused(prompt: object) -> None:
    with pytest.raises(ParameterError, match="prompt must be one of evict, keep, got"):
        EvictionParams.parse({"budget": 32, "window": 8, "prompt": prompt})
