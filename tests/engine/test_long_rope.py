"""LongRoPE: a worker has one rotation, whatever it serves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.rotary_embedding.rope_variant import Phi3LongRoPEScaledRotaryEmbedding

from tests.engine.own_process import run_tests
from tests.engine.tiny_model import CONTEXT
from vase_sgl.engine import rope

#: Few enough for requests of the tests to pass it.
_FIRST_TRAINED_FOR = 64
_PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "pad_token_id": 0,
    "original_max_position_embeddings": _FIRST_TRAINED_FOR,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.5 * i for i in range(8)],
    },
}
_TESTS = (
    "tests/engine/test_determinism.py::test_alone_equals_among_seven_others[vase-attnv]",
    "tests/engine/test_prompt_cuts.py::test_chunks_and_neighbours_change_nothing",
)


@pytest.mark.xdist_group("own-process")
def test_a_phi3_answers_alone_as_in_company() -> None:
    run_tests(_TESTS, {"VASE_TEST_CONFIG": json.dumps(_PHI3)})


@pytest.mark.parametrize(
    ("context", "chosen"), [(_FIRST_TRAINED_FOR, "short"), (_FIRST_TRAINED_FOR + 1, "long")]
)
def test_the_context_length_chooses(context: int, chosen: str) -> None:
    def build() -> Phi3LongRoPEScaledRotaryEmbedding:
        factors = [[1.0] * 8, [1.0 + 0.5 * i for i in range(8)]]
        return Phi3LongRoPEScaledRotaryEmbedding(
            16, 16, CONTEXT, _FIRST_TRAINED_FOR, 10000, True, torch.float32, *factors
        )

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 32, generator=generator)
    positions = torch.tensor([0, 5, 63])
    # Upstream rotates all of a batch for a long context if one of its tokens needs that.
    needs_long = torch.tensor([0, 5, 63, 65])
    rows = torch.cat([query, query[:1]]), torch.cat([key, key[:1]])
    before = {"short": build()(positions, query, key)}
    before["long"] = tuple(x[:3] for x in build()(needs_long, *rows))
    assert not torch.equal(before["short"][0], before["long"][0])

    model = torch.nn.Sequential(build())
    runner = SimpleNamespace(model=model, model_config=SimpleNamespace(context_len=context))
    rope.choose_long_rope(None, runner)
    assert rope.chosen_rope(model) == {"long_rope": chosen}
    for found, expected in zip(model[0](positions, query, key), before[chosen], strict=True):
        assert torch.equal(found, expected)


def test_other_models_have_no_choice() -> None:
    assert rope.chosen_rope(torch.nn.Linear(1, 1)) == {}
