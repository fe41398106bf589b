"""What only a model in bfloat16 can be asked; run by `test_pool_layouts.py`."""

from __future__ import annotations

import pytest
import torch

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tokenized_request import creator

ROW = [0.5] * 64


@torch.inference_mode()
def test_embeddings_are_no_neighbours_of_tokens(stepped: SteppedScheduler) -> None:
    """In one prefill; it would end the scheduler."""
    stepped.answers.clear()
    for index, fields in enumerate([{}, {"input_embeds": [ROW] * 3}, {}]):
        stepped.submit(f"r{index}", [5, 6, 7], max_new_tokens=5, fields=fields)
    stepped.run()
    assert [len(stepped.answers[f"r{index}"].tokens) for index in range(3)] == [5, 5, 5]


def test_embeddings_go_on(stepped: SteppedScheduler) -> None:
    create = creator(stepped.scheduler.model_config)
    assert create({}, input_embeds=[ROW, [0] * 64]).rid == "r"


@pytest.mark.parametrize(
    ("row", "session"),
    [
        (ROW[1:], None),
        ([*ROW[1:], float("nan")], None),
        ([*ROW[1:], 1e39], None),  # infinite as float32
        (ROW, {"id": "s"}),
    ],
)
def test_other_embeddings_are_refused(
    stepped: SteppedScheduler, row: list[float], session: dict[str, str] | None
) -> None:
    create = creator(stepped.scheduler.model_config)
    with pytest.raises(ValueError, match="input_embeds: every token must have 64 finite"):
        create({}, input_embeds=[ROW, row], session_params=session)
