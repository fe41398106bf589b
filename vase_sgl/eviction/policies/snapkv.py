"""SnapKV at decode time: the most attended stay, without a draw (arXiv 2404.14469)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import SinkPolicy, require_pool_width


@dataclasses.dataclass(frozen=True)
class SnapKV(SinkPolicy):
    """Keeps the largest weights; the baseline that VaSE-AttnV adds protection and a draw to.

    Weight of candidate c in one layer and KV head, float32: softmax of the model's logits (q.k by
    its scale) over the candidates, averaged over the window's queries and the query heads of the
    group, then average-pooled over `pool_width` columns (odd; 1 turns it off). Draws nothing: the
    seed has no effect. Ties go to the lower token position, as for every policy. This is `attn` in
    the code of VaSE's authors, with their pool of 5 and no sinks.
    """

    name: ClassVar[str] = "snapkv"
    needs_queries: ClassVar[bool] = True

    num_sinks: int = 0
    pool_width: int = 5

    def validate(self, budget: int, window: int) -> None:
        super().validate(budget, window)
        require_pool_width(self.pool_width)
