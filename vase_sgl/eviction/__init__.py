"""What to keep: policies and their parameters. Knows nothing of SGLang or gRPC."""

from __future__ import annotations

from vase_sgl.eviction.params import EvictionLimits, EvictionParams
from vase_sgl.eviction.policies import POLICIES, ParameterError, Policy

__all__ = ["POLICIES", "EvictionLimits", "EvictionParams", "ParameterError", "Policy"]
