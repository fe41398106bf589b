"""Prompt modes, and the slots that follow from them."""

from __future__ import annotations

import pytest

from vase_sgl.eviction import POLICIES, EvictionParams, ParameterError


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
    params = EvictionParams.parse({"policy": "full"})
    assert params.reserved_slots(100, 901, prefix_cache=True) == 1001


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
    ],
)
def test_wrong_fields_are_named(policy: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        EvictionParams.parse({"budget": 64, "window": 8, "policy": policy, **fields})


@pytest.mark.parametrize("prompt", ["drop", "", None, ["keep"]])
def test_unknown_prompt_modes_are_refused(prompt: object) -> None:
    with pytest.raises(ParameterError, match="prompt must be one of evict, keep, got"):
        EvictionParams.parse({"budget": 32, "window": 8, "prompt": prompt})
