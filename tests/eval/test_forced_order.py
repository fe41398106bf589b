"""On a real model and text, what must look bad looks bad. Some 20 s; on demand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vase_sgl.demo.model import ensure_model
from vase_sgl.eval.forced import ForcedArm, ForcedModel, nll_rows, text_chunks
from vase_sgl.eviction import EvictionParams

TEXT = Path(__file__).parents[2] / "benchmarks" / "texts" / "gpl-3.txt"


@pytest.mark.skipif("VASE_TEST_SLOW" not in os.environ, reason="set VASE_TEST_SLOW=1")
@pytest.mark.xdist_group("real-model")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_largest_values_and_sinks_must_not_go(dtype: torch.dtype) -> None:
    policies = {
        "full": {"policy": "full"},
        "protects values": {"policy": "vase-attnv"},
        "attention": {"policy": "snapkv"},
        "recency": {"policy": "streaming"},
        "no sinks": {"policy": "streaming", "num_sinks": 0},
        "largest values go": {"policy": "evict-largest-values"},
    }
    arms = [
        ForcedArm(name, EvictionParams.parse({"budget": 128, "window": 32, "seed": 1, **fields}))
        for name, fields in policies.items()
    ]
    model = ForcedModel(ensure_model(), dtype)
    chunks = text_chunks(
        "gpl-3",
        model.tokenizer(TEXT.read_text()).input_ids,
        prompt_tokens=64,
        forced_tokens=640,
        count=1,
    )
    rows = nll_rows(model, chunks, arms, "test")
    loss = {row["arm"]: row["nll_sum"] / row["nll_tokens"] for row in rows}
    lost = {name: value - loss["full"] for name, value in loss.items()}
    usual = max(lost["recency"], lost["attention"], lost["protects values"])
    assert 0 < usual < 0.3
    assert lost["no sinks"] > 2 * usual
    assert lost["largest values go"] > 1.5 * usual
