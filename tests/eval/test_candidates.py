"""The candidates of `benchmarks/candidates.py` are measured against what they extend."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from vase_kernels.reference import SCORERS

from vase_sgl.eval.forced import ForcedModel
from vase_sgl.eviction import EvictionParams

TEXT = [2 + (31 * i * i + 7) % 250 for i in range(120)]


def test_switched_off_they_are_the_policies_they_come_from(
    tiny: ForcedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = importlib.import_module("benchmarks.candidates")
    monkeypatch.setitem(SCORERS, candidates.NAME, None)  # takes it out again
    candidates.register()

    def digest(policy: Any) -> str:
        session = tiny.start(TEXT[:30], [EvictionParams(24, 8, policy, "evict", 7)])
        session.force(TEXT[30:])
        return session.report(0).digest

    def known(**fields: Any) -> Any:
        return EvictionParams.parse({"budget": 24, "window": 8, **fields}).policy

    plain = {"value_weight": "none", "mix_lambda": 0.3}
    own = candidates.Candidate
    assert digest(own(**plain)) == digest(known(policy="rkv", mix_lambda=0.3, num_sinks=4))
    plain["mix_lambda"] = 1.0
    assert digest(own(**plain)) == digest(known(policy="snapkv", num_sinks=4))
    drawn = own(**plain, protected_share=0.25, draw=True)
    assert digest(drawn) == digest(known(policy="vase-attnv"))
    changes: list[dict[str, Any]] = [
        {"value_weight": "l1"},
        {"value_weight": "deviation"},
        {"protected_share": 0.5},
        {"draw": True},
    ]
    digests = {digest(own(**plain)), *(digest(own(**(plain | change))) for change in changes)}
    assert len(digests) == len(changes) + 1
