"""Arms as they are written on the command line."""

from __future__ import annotations

import pytest

from vase_sgl.eval.arms import CONSTRAINED, FP8, PRODUCTION, WORKER_FLAGS, ArmError, plan
from vase_sgl.eviction import POLICIES, EvictionParams


def test_the_matrix_has_every_arm_of_the_comparison() -> None:
    arms = {arm.name: arm for arm in plan(["matrix"], [128], 64)}
    assert set(POLICIES) <= set(arms)
    assert {"full-constrained", "full-fp8", "vase-attnv+keep", "vase-dkv+keep"} <= set(arms)
    assert arms["random+keep"].prompt_mode == "keep" and arms["random"].prompt_mode == "evict"
    assert arms["evict-largest-values"].budget == 128
    # Two that differ by the draw alone, and each from its default by one part.
    drawn, ranked = arms["vase-attnv?protected_share=0"], arms["snapkv?num_sinks=4"]
    assert drawn.eviction["num_sinks"] == ranked.eviction["num_sinks"] == 4
    assert drawn.eviction["protected_share"] == 0
    assert arms["rkv?mix_lambda=0.5"].eviction["mix_lambda"] == 0.5
    assert arms["full"].budget is None and arms["full"].worker == PRODUCTION
    assert arms["full-fp8"].worker == FP8 and "fp8_e4m3" in WORKER_FLAGS[FP8]
    assert arms["full-constrained"].worker == CONSTRAINED


def test_an_arm_per_budget_with_every_field_explicit() -> None:
    arms = plan(["full-fp8", "rkv?mix_lambda=0.5", "full"], [128, 256], 32)
    assert [arm.label for arm in arms] == [
        "rkv?mix_lambda=0.5 @ 128",
        "rkv?mix_lambda=0.5 @ 256",
        "full",
        "full-fp8",
    ]
    params = EvictionParams.parse(arms[1].params(seed=7))
    assert params.to_mapping() == arms[1].params(seed=7)
    assert (params.budget, params.window, params.policy.fields()["mix_lambda"]) == (256, 32, 0.5)


@pytest.mark.parametrize(
    ("name", "budgets", "text"),
    [
        ("snapkvv", [128], "there is no policy 'snapkvv'; choose from vase-attnv,"),
        ("snapkv", [], "snapkv needs a budget: give --budgets"),
        ("snapkv+kept", [128], "after the + only `keep` is known"),
        ("snapkv?pool_width=4", [128], "snapkv?pool_width=4 at budget 128: pool_width must be odd"),
        ("snapkv?mix_lambda=1", [128], "unknown key mix_lambda"),
        ("snapkv?budget=9", [128], "budget, window and seeds are options"),
        ("snapkv?pool_width=x", [128], "pool_width is not a number: 'x'"),
        ("snapkv", [32], "budget 32 must be greater than window 64"),
        ("full+keep", [128], "a full cache takes no further parameters; write full"),
    ],
)
def test_a_wrong_arm_is_named_with_the_cure(name: str, budgets: list[int], text: str) -> None:
    with pytest.raises(ArmError) as caught:
        plan([name], budgets, 64)
    assert text in str(caught.value)
