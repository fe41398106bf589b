"""Kept sets on a real model's keys, values and queries: reference against float64 oracle."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import oracle
from tests.kernels.one_layer import layer_victims
from vase_sgl.demo.model import ensure_model

TEXT = (
    "The sea covers most of the planet. Its currents carry heat from the equator to the poles, and "
    "its salt comes from rocks that rivers wore down. Sailors have feared and loved it. " * 4
)
WINDOW, BUDGET = 32, 96
Captured = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def captured() -> dict[int, Captured]:
    """Layer -> keys, values [3, tokens, 64] and queries [9, tokens, 64] of SmolLM2, post-RoPE."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama

    path = ensure_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt").input_ids
    queries: list[torch.Tensor] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def recording(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> object:
        rotated = rotate(q, k, *args, **kwargs)
        queries.append(rotated[0][0])
        return rotated

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", recording)
        cache = model(ids, use_cache=True).past_key_values
    return {
        layer: (cache.layers[layer].keys[0], cache.layers[layer].values[0], queries[layer])
        for layer in (0, 1, 14, 29)
    }


@pytest.mark.parametrize("layer", [0, 1, 14, 29])
@pytest.mark.parametrize("policy", ["vase-attnv", "vase-dkv", "random", "streaming"])
def test_kept_set_equals_the_oracle(captured: dict[int, Captured], policy: str, layer: int) -> None:
    keys, values, queries = captured[layer]
    candidates = BUDGET  # a steady round: `budget` candidates, `window` victims
    positions = torch.arange(candidates).expand(3, -1)
    arguments = {
        "keys": keys[:, :candidates],
        "values": values[:, :candidates],
        "queries": queries[:, candidates : candidates + WINDOW],
        "positions": positions,
    }
    options = {"budget": BUDGET, "seed": 11, "layer": layer, "first_head": 0, "round": 1}
    found = layer_victims(policy, num_victims=WINDOW, **arguments, **options)
    key = oracle.retention_keys(policy, **arguments, **options)
    for head, expected in enumerate(oracle.victims(key, positions, WINDOW)):
        chosen = found[head].tolist()
        if chosen == expected:
            continue
        # Only keys that float32 cannot tell apart may be exchanged.
        odd = set(chosen) ^ set(expected)
        spread = max(key[head][list(odd)]) - min(key[head][list(odd)])
        scale = max(abs(key[head][list(odd)]))
        assert spread <= 1e-5 * scale, (policy, layer, head, odd)
