"""The eviction kernels in plain torch: their specification, and the CPU path."""

from __future__ import annotations

from vase_kernels.reference.candidates import Candidates
from vase_kernels.reference.digest import chain, format_digest, round_sum
from vase_kernels.reference.evict import evict_reference
from vase_kernels.reference.overwrite import move_plan
from vase_kernels.reference.scores import SCORERS
from vase_kernels.reference.select import retention_keys, select_victims

__all__ = [
    "SCORERS",
    "Candidates",
    "chain",
    "evict_reference",
    "format_digest",
    "move_plan",
    "retention_keys",
    "round_sum",
    "select_victims",
]
