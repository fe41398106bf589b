"""Prompt modes, and the slots that follow from them."""

from __future__ import annotations

import pytest

from vase_sgl.eviction import EvictionParams, ParameterError


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
    assert params.max_slots(prompt_tokens) == slots
    assert EvictionParams.parse(params.to_mapping()) == params


@pytest.mark.parametrize("prompt", ["drop", "", None, ["keep"]])
def test_unknown_prompt_modes_are_refused(prompt: object) -> None:
    with pytest.raises(ParameterError, match="prompt must be one of evict, keep, got"):
        EvictionParams.parse({"budget": 32, "window": 8, "prompt": prompt})
