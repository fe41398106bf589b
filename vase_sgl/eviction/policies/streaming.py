"""Sinks and the most recent tokens (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vase_sgl.eviction.policies.base import SinkPolicy


@dataclasses.dataclass(frozen=True)
class Streaming(SinkPolicy):
    """The oldest candidates go first."""

    name: ClassVar[str] = "streaming"
