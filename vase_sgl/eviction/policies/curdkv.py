"""CurDKV: projected key and value energy, one projection per request (arXiv 2509.15038)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import SinkPolicy, require_int


@dataclasses.dataclass(frozen=True)
class CurDKV(SinkPolicy):
    """Keeps sinks and the largest ||kG||^2 * ||vG||^2, as `vase-dkv`, but with a G that stays.

    G [head_dim, projection_dim] is drawn from (seed, layer, KV head) with round 0 in the counter,
    which no round has (they count from 1). So every round of a request uses the same G.
    """

    name: ClassVar[str] = "curdkv"

    projection_dim: int = 20

    def validate(self, budget: int, window: int) -> None:
        super().validate(budget, window)
        require_int("projection_dim", self.projection_dim, 1, 32)
