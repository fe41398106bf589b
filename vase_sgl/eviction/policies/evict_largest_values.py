"""Ablation: the largest value ranges go first. It must look bad (arXiv 2606.03928)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import SinkPolicy


@dataclasses.dataclass(frozen=True)
class EvictLargestValues(SinkPolicy):
    """VaSE-AttnV turned round: what that protects, this evicts. For evaluation, not for serving.

    Ranked by -(max - min over head_dim of v), float32. Draws nothing. VaSE's authors report 14 %
    on GSM8K where evicting at random gives 53 %.
    """

    name: ClassVar[str] = "evict-largest-values"

    num_sinks: int = 0
