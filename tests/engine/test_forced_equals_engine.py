"""The teacher-forced harness forgets what the real scheduler forgot, for the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.independent_decoder import DIM, HEADS, KV_HEADS, weights_of
from tests.engine.scheduler_harness import SteppedScheduler
from tests.eval.tiny_forced import write_tiny_folder
from vase_sgl.eval.forced import ForcedModel
from vase_sgl.eviction import EvictionParams

NEW = 90


@pytest.fixture(scope="module")
def forced(stepped: SteppedScheduler, tmp_path_factory: pytest.TempPathFactory) -> ForcedModel:
    """The scheduler's own weights, by their names in a checkpoint."""
    folder = write_tiny_folder(tmp_path_factory.mktemp("forced"))
    weights = {}
    for name, tensor in weights_of(stepped).items():
        if "qkv_proj" in name:
            sizes = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
            parts = zip("qkv", tensor.split(sizes), strict=True)
            weights |= {name.replace("qkv_proj", f"{part}_proj"): x for part, x in parts}
        elif "gate_up_proj" in name:
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            weights |= {name.replace("gate_up_proj", part): x for part, x in halves}
        else:
            weights[name] = tensor
    weights = {name: x.clone() for name, x in weights.items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ForcedModel(folder, torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("policy", "prompt_mode", "length"),
    [
        ("vase-attnv", "evict", 45),
        ("vase-attnv", "keep", 20),
        ("vase-dkv", "evict", 12),
        ("rkv", "evict", 45),
        ("random", "keep", 33),
    ],
)
def test_digests_equal_the_schedulers(
    stepped: SteppedScheduler, forced: ForcedModel, policy: str, prompt_mode: str, length: int
) -> None:
    vase: dict[str, Any] = {"budget": 24, "window": 8, "policy": policy, "prompt": prompt_mode}
    vase["seed"] = 2**50 + 3
    prompt = [2 + (19 * i + length) % 250 for i in range(length)]
    stepped.answers.clear()
    stepped.submit("compared", prompt, max_new_tokens=NEW, vase=vase)
    stepped.run()
    answer = stepped.answers["compared"]
    assert answer.statistics is not None and answer.statistics["rounds"] >= 6

    session = forced.start(prompt, [EvictionParams.parse(vase)])
    session.force(answer.tokens)
    report = session.report(0)
    assert list(report.round_digests) == answer.statistics["round_digests"]
    for name in ("rounds", "evicted_tokens", "physical_length", "logical_length", "digest"):
        assert getattr(report, name) == answer.statistics[name]
    again = forced.start(prompt, [EvictionParams.parse(vase)])
    assert again.greedy(NEW)[0].tolist() == answer.tokens
