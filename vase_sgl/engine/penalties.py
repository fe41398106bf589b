"""Frequency, presence and repetition penalties that do not depend on a request's neighbours.

Upstream penalises the newest token that the scheduler knows. With the overlap loop the token that a
step starts from is still on the device, and whether the one before it is known too depends on what
else was scheduled: one is then counted twice and another never. Here every step counts the token
before the one it starts from, once, in either loop; the first step has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.utils.common import is_pin_memory_available

#: Upstream's tables [rows, vocabulary] and what they hold where nothing was counted.
_TABLES = {
    "cumulated_frequency_penalties": 0.0,
    "cumulated_presence_penalties": 0.0,
    "cumulated_repetition_penalties": 1.0,
}


def count_last_but_one(original: Callable[..., None], batch: Any) -> None:
    """AROUND `ScheduleBatch.cumulate_penalty_output_tokens`, which is not called.

    Mutates the penalty tables of the batch.
    """
    tokens = [_last_but_one(req) for req in batch.reqs]
    ids = _to(batch.device, [0 if token is None else token for token in tokens])
    orchestrator = batch.sampling_info.penalizer_orchestrator
    orchestrator.cumulate_output_tokens(ids)
    fresh = [row for row, token in enumerate(tokens) if token is None]
    if not fresh:
        return
    rows = _to(batch.device, fresh)
    for penalizer in orchestrator.penalizers.values():
        for name, neutral in _TABLES.items():
            table = getattr(penalizer, name, None)
            if table is not None:
                table[rows, 0] = neutral  # the token 0 that stood for none


def _last_but_one(req: Any) -> int | None:
    """None in the first step. Of retracted requests and beams the newest, as upstream has it."""
    step, known = req.decode_batch_idx, req.output_ids
    if req.retraction_count or step > len(known):
        return int(known[-1] if len(known) else req.origin_input_ids[-1])
    return int(known[step - 1]) if step else None


def _to(device: Any, values: list[int]) -> torch.Tensor:
    """int64, without waiting for the device."""
    pinned = is_pin_memory_available(device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)
