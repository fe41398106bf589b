"""Low key norms stay (arXiv 2406.11430, `KnormPress` in kvpress)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import SinkPolicy


@dataclasses.dataclass(frozen=True)
class KNorm(SinkPolicy):
    """The largest ||k|| go first: a key of low norm is usually attended to.

    Ranked by -||k||^2 in float32, k [head_dim] after RoPE. Draws nothing.
    """

    name: ClassVar[str] = "knorm"

    num_sinks: int = 0
