"""Teacher-forced evaluation: recorded text goes through a KV cache that is evicted as it grows."""

from __future__ import annotations

from vase_sgl.eval.forced.branch import CacheReport
from vase_sgl.eval.forced.model import ForcedModel
from vase_sgl.eval.forced.session import Session

__all__ = ["CacheReport", "ForcedModel", "Session"]
