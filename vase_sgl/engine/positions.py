"""Between SGLang's batch and its forward: logical positions, and the queued compaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vase_sgl.engine.pool import BudgetPool

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def prepare_forward(
    result: ForwardBatch, cls: type, batch: ScheduleBatch, model_runner: Any, **kwargs: Any
) -> ForwardBatch:
    """AFTER `ForwardBatch.init_new`: decode positions are logical; due rounds run now.

    `batch.seq_lens` is physical, `batch.orig_seq_lens` logical; without a budget they are equal.
    Called under the forward stream, so a round is ordered after the last forward's KV writes and
    before the writes of the next one.
    """
    pool = BudgetPool.of_runner(model_runner)
    if not result.forward_mode.is_decode():
        if pool.compaction.pending:
            raise RuntimeError("a compaction is due but the batch left the decode path")
        return result
    result.positions = (batch.orig_seq_lens.to(torch.int64) - 1).clamp_(min=0)
    pool.compaction.run(pool)
    return result
