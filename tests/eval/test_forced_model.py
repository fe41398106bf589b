"""The teacher-forced harness: against transformers' loss, and against an independent decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.independent_decoder import IndependentDecoder, clear_answer, weights_in
from tests.eval.tiny_forced import write_tiny_folder
from vase_sgl.eval.forced import ForcedModel
from vase_sgl.eviction import POLICIES, EvictionParams

PROMPT = [2 + (17 * i + 45) % 250 for i in range(45)]
TEXT = [2 + (31 * i * i + 7) % 250 for i in range(90)]
CASES = [
    *((policy, "evict", 45) for policy in POLICIES if POLICIES[policy].evicts),
    ("vase-attnv", "keep", 45),
    ("vase-attnv", "evict", 12),
]


def params(**changes: Any) -> EvictionParams:
    return EvictionParams.parse({"budget": 24, "window": 8, "seed": 2**40 + 7} | changes)


@torch.inference_mode()
def test_nll_without_eviction_is_transformers_own(tiny: ForcedModel, tiny_folder: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tokens = torch.tensor([PROMPT + TEXT])
    labels = tokens.clone()
    labels[:, : len(PROMPT)] = -100
    session = tiny.start(PROMPT, [None, params(policy="full", budget=8)])
    nll = session.force(TEXT)
    assert nll.dtype == torch.float32 and nll.shape == (2, len(TEXT))
    torch.testing.assert_close(nll.mean(1), stock(tokens, labels=labels).loss.expand(2))
    assert session.report(0).rounds == session.report(1).rounds == 0


@torch.inference_mode()
@pytest.mark.parametrize(("policy", "prompt_mode", "length"), CASES)
def test_tokens_digests_and_kept_rows_equal_the_independent_decoder(
    tiny: ForcedModel, tiny_folder: Path, policy: str, prompt_mode: str, length: int
) -> None:
    """One half forced, one half greedy, so that both ways in are compared."""
    vase = {"budget": 24, "window": 8, "policy": policy, "prompt": prompt_mode, "seed": 2**40 + 7}
    weights = weights_in(tiny_folder / "model.safetensors")
    prompt, expected, decoder = clear_answer(lambda: IndependentDecoder(weights, vase), length, 70)
    session = tiny.start(prompt, [EvictionParams.parse(vase)])
    session.force(expected[:35])
    assert session.greedy(35)[0].tolist() == expected[35:]
    report = session.report(0)
    assert report.rounds == decoder.round >= 4
    assert report.digest == decoder.digest()
    assert session.kept_positions(0).tolist() == [
        [sorted(row[2] for row in rows) for rows in heads] for heads in decoder.rows
    ]


@torch.inference_mode()
def test_policies_score_by_the_model_s_own_scale(tmp_path: Path) -> None:
    """Granite's code, otherwise Llama's numbers."""
    folder = write_tiny_folder(
        tmp_path,
        architectures=["GraniteForCausalLM"],
        model_type="granite",
        attention_multiplier=1.0,
        logits_scaling=1.0,
    )
    vase = {"budget": 24, "window": 8, "policy": "snapkv", "seed": 7}
    weights = weights_in(folder / "model.safetensors")
    prompt, expected, decoder = clear_answer(
        lambda: IndependentDecoder(weights, vase, attention_scale=1.0), len(PROMPT), 70
    )
    session = ForcedModel(folder, torch.float32).start(prompt, [EvictionParams.parse(vase)])
    assert session.greedy(70)[0].tolist() == expected
    assert session.report(0).digest == decoder.digest()
    usual = IndependentDecoder(weights, vase)
    usual.generate(prompt, 70)
    assert usual.digest() != decoder.digest()


def test_arms_of_a_session_are_what_they_are_alone(tiny: ForcedModel) -> None:
    """Budgets, windows, policies and prompt modes side by side, among them the full cache."""
    arms = [
        None,
        params(),
        params(seed=1),
        params(),
        params(window=5, policy="snapkv"),
        params(budget=40, policy="rkv", prompt="keep"),
        params(budget=30, window=16, policy="streaming"),
    ]
    together = tiny.start(PROMPT, arms)
    nll = torch.cat((together.force(TEXT[:50]), together.force(TEXT[50:])), dim=1)
    chosen = together.greedy(20)
    digests = set()
    for index, arm in enumerate(arms):
        alone = tiny.start(PROMPT, [arm])
        torch.testing.assert_close(alone.force(TEXT)[0], nll[index], rtol=1e-4, atol=1e-4)
        assert alone.greedy(20)[0].tolist() == chosen[index].tolist()
        assert alone.report(0) == together.report(index)
        digests.add(alone.report(0).digest)
    assert len(digests) == len(arms) - 1  # two are equal


def test_a_budget_changes_the_loss_after_the_first_round_alone(tiny: ForcedModel) -> None:
    arm = params()
    nll = tiny.start(PROMPT, [None, arm]).force(TEXT)
    # The token fed first after the round stands at the first round's length; it decides the next.
    first = arm.first_round_length(len(PROMPT)) - len(PROMPT) + 1
    assert torch.equal(nll[0, :first], nll[1, :first])
    assert not torch.allclose(nll[0, first:], nll[1, first:])


def test_impossible_sessions_are_refused(tiny: ForcedModel) -> None:
    with pytest.raises(ValueError, match="prompt holds no token"):
        tiny.start([], [None])
    with pytest.raises(ValueError, match="at least one arm"):
        tiny.start([1], [])
    with pytest.raises(ValueError, match="context of 2048"):
        tiny.start([5] * 2000, [None]).force([5] * 60)
