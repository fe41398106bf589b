"""Eviction policies by name. To add one: a file here, a line below, its scores in vase_kernels."""

from __future__ import annotations

from vase_sgl.eviction.policies.base import ParameterError, Policy
from vase_sgl.eviction.policies.curdkv import CurDKV
from vase_sgl.eviction.policies.evict_largest_values import EvictLargestValues
from vase_sgl.eviction.policies.full import Full
from vase_sgl.eviction.policies.knorm import KNorm
from vase_sgl.eviction.policies.random import Random
from vase_sgl.eviction.policies.rkv import RKV
from vase_sgl.eviction.policies.snapkv import SnapKV
from vase_sgl.eviction.policies.streaming import Streaming
from vase_sgl.eviction.policies.vase_attnv import VaseAttnV
from vase_sgl.eviction.policies.vase_dkv import VaseDKV

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        VaseAttnV,
        VaseDKV,
        CurDKV,
        SnapKV,
        RKV,
        Random,
        Streaming,
        KNorm,
        EvictLargestValues,
        Full,
    )
}


def policy_class(name: object) -> type[Policy]:
    """The policy registered under `name`; `ParameterError` lists the names that exist."""
    if not isinstance(name, str) or name not in POLICIES:
        raise ParameterError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


__all__ = ["POLICIES", "ParameterError", "Policy", "policy_class"]
