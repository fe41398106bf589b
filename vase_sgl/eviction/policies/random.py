"""Uniform eviction outside sinks and window (Random Attention, arXiv 2609.03430)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import SinkPolicy


@dataclasses.dataclass(frozen=True)
class Random(SinkPolicy):
    """Every candidate is equally likely to go, per layer and KV head."""

    name: ClassVar[str] = "random"
