"""Engine tokens against a decoder that shares nothing with it: own attention, RoPE, cache, oracle.

It keeps an explicit list of (key, value, position) per layer and head, evicts with the float64
oracle, and rotates by logical position. Equal greedy tokens over many rounds mean that slots,
positions, queries, victims and overwrites are all right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from tests.engine.independent_decoder import (
    LAYERS,
    IndependentDecoder,
    answer_length,
    clear_answer,
    weights_of,
)
from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tiny_model import CONFIG
from vase_sgl.engine import limits
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.eviction.policies import POLICIES


def _engine_tokens(
    stepped: SteppedScheduler, vase: dict[str, Any], prompt: list[int], new: int
) -> list[int]:
    stepped.answers.clear()
    stepped.submit("compared", prompt, max_new_tokens=new, vase=vase)
    stepped.run()
    answer = stepped.answers["compared"]
    assert answer.statistics is not None and answer.statistics["rounds"] >= 4
    return answer.tokens


def _kv_dtype(stepped: SteppedScheduler) -> torch.dtype:
    dtype: torch.dtype = stepped.scheduler.tp_worker.model_runner.token_to_kv_pool.dtype
    return dtype


#: (policy, prompt mode, prompt tokens, production): every way for VaSE's own, one for the others.
CASES = [
    *((policy, "evict", 45, True) for policy in POLICIES if POLICIES[policy].evicts),
    *((policy, "keep", 45, True) for policy in ("vase-attnv", "vase-dkv", "random")),
    *((policy, "evict", 12, False) for policy in ("vase-attnv", "vase-dkv", "random")),
]


@torch.inference_mode()
@pytest.mark.parametrize(("policy", "prompt_mode", "length", "production"), CASES)
def test_tokens_equal_the_independent_decoder(
    stepped: SteppedScheduler, policy: str, prompt_mode: str, length: int, production: bool
) -> None:
    """`production`: overlap loop and prefix cache on, and the prompt already in the tree."""
    assert CONFIG["num_hidden_layers"] == LAYERS
    vase = {"budget": 24, "window": 8, "policy": policy, "prompt": prompt_mode, "seed": 2**40 + 7}
    weights, kv_dtype = weights_of(stepped), _kv_dtype(stepped)
    new = answer_length(prompt_mode, length)
    prompt, expected, _ = clear_answer(
        lambda: IndependentDecoder(weights, vase, kv_dtype=kv_dtype), length, new
    )
    stepped.configure(overlap=production, prefix_cache=production)
    if production:
        stepped.submit("before", prompt, max_new_tokens=2)
        stepped.run()
    found = _engine_tokens(stepped, vase, prompt, new)
    assert (stepped.answers["compared"].cached_tokens > 0) == production
    stepped.configure()
    assert found == expected


@torch.inference_mode()
@pytest.mark.parametrize("policy", ["snapkv", "vase-attnv"])
def test_policies_score_by_the_model_s_own_scale(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    model = stepped.scheduler.tp_worker.model_runner.model
    for layer in (part for part in model.modules() if isinstance(part, RadixAttention)):
        monkeypatch.setattr(layer, "scaling", 1 / 16)
    pool = BudgetPool.of(stepped.scheduler.req_to_token_pool)
    monkeypatch.setattr(pool, "attention_scale", limits.attention_scale(model))
    vase = {"budget": 24, "window": 8, "policy": policy, "seed": 7}
    prompt = [2 + (17 * i) % 250 for i in range(45)]
    digests = []
    for scale in (1 / 16, 1 / 4):
        decoder = IndependentDecoder(weights_of(stepped), vase, attention_scale=scale)
        decoder.generate(prompt, 70)
        digests.append(decoder.digest())
    _engine_tokens(stepped, vase, prompt, 70)
    statistics = stepped.answers["compared"].statistics
    assert statistics is not None and statistics["digest"] == digests[0] != digests[1]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("change", "shift"), [({"seed": 8}, 0), ({"policy": "streaming"}, 0), ({}, 1)]
)
def test_a_wrong_decoder_is_told_apart(
    stepped: SteppedScheduler, change: dict[str, Any], shift: int
) -> None:
    """The comparison above can fail: other seed, other policy, positions off by one."""
    vase = {"budget": 24, "window": 8, "policy": "random", "seed": 7}
    prompt = [2 + (17 * i) % 250 for i in range(20)]
    wrong = IndependentDecoder(weights_of(stepped), vase | change, shift).generate(prompt, 70)
    assert _engine_tokens(stepped, vase, prompt, 70) != wrong
