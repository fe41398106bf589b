"""R-KV: attended and not redundant (arXiv 2505.24133)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import (
    SinkPolicy,
    require_pool_width,
    require_share,
)


@dataclasses.dataclass(frozen=True)
class RKV(SinkPolicy):
    """Keeps the largest `mix_lambda` * importance - (1 - `mix_lambda`) * redundancy.

    Per layer and KV head, float32, over the C candidates (sinks among them, window and pinned
    columns not). importance: the weight of `snapkv`. redundancy of candidate i: softmax over the
    candidates of (1/C) * sum over j != i of cos(k_i, k_j), k after RoPE, norms + 1e-8.
    `mix_lambda` 0.1 is the default of R-KV's evaluation script (`HuggingFace/run_math.py`; its
    class says 0.07, and the authors of VaSE compare with 0.5). Draws nothing.

    It is R-KV as VaSE's authors run it (`attn_rkv` in their code). R-KV's own code differs: it
    takes a maximum over the query group before the softmax and over neighbouring columns after
    it, counts the window's keys as partners, and sets each row's most recent similarity above 0.5
    to zero.
    """

    name: ClassVar[str] = "rkv"
    needs_queries: ClassVar[bool] = True

    num_sinks: int = 0
    pool_width: int = 5
    mix_lambda: float = 0.1

    def validate(self, budget: int, window: int) -> None:
        super().validate(budget, window)
        require_pool_width(self.pool_width)
        require_share("mix_lambda", self.mix_lambda)
