"""VaSE-DKV: projected key and value energy, projection drawn anew each round (arXiv 2606.03928)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import SinkPolicy, require_int


@dataclasses.dataclass(frozen=True)
class VaseDKV(SinkPolicy):
    """Keeps sinks and the largest ||kG||^2 * ||vG||^2, G: head_dim x projection_dim Gaussian."""

    name: ClassVar[str] = "vase-dkv"

    projection_dim: int = 20

    def validate(self, budget: int, window: int) -> None:
        super().validate(budget, window)
        require_int("projection_dim", self.projection_dim, 1, 32)
