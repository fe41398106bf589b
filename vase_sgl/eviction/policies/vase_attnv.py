"""VaSE-AttnV: protect large value ranges, draw the rest by attention (arXiv 2606.03928)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import (
    SinkPolicy,
    require,
    require_pool_width,
    require_share,
)


@dataclasses.dataclass(frozen=True)
class VaseAttnV(SinkPolicy):
    """Keeps sinks and the largest value ranges; draws the rest with weight = recent attention.

    `protected_share`: share of the budget (rounded down to tokens, sinks included) protected by
    value range. `pool_width`: odd width of the average pool over columns, 1 turns it off.
    """

    name: ClassVar[str] = "vase-attnv"
    needs_queries: ClassVar[bool] = True

    protected_share: float = 0.25
    pool_width: int = 5

    def validate(self, budget: int, window: int) -> None:
        super().validate(budget, window)
        share = self.protected_share
        require_share("protected_share", share)
        require_pool_width(self.pool_width)
        protected = int(budget * share)
        require(
            protected <= budget - window,
            f"protected_share {share} protects {protected} tokens, but budget {budget} minus "
            f"window {window} leaves {budget - window}; raise budget, or lower window or "
            "protected_share",
        )
