"""Random schedules against the real scheduler: slots are never lost, shared or over-reserved.

The integrity check (`VASE_CHECK_INTEGRITY=1`) and upstream's leak checks run after every step.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tiny_model import VOCAB
from vase_sgl.engine import integrity, plugin
from vase_sgl.eviction import POLICIES

POOL = 400
_counter = iter(range(10**6))

budgets = st.integers(9, 60).flatmap(
    lambda budget: st.fixed_dictionaries(
        {
            "budget": st.just(budget),
            "window": st.integers(1, min(budget - 1, 24)),
            "policy": st.sampled_from([name for name, policy in POLICIES.items() if policy.evicts]),
            "prompt": st.sampled_from(["evict", "keep"]),
            "num_sinks": st.just(0),
            "seed": st.integers(0, 2**63 - 1),
        }
    )
)


def _complete(vase: dict[str, Any]) -> dict[str, Any]:
    if vase["policy"] == "vase-attnv":
        # The default share need not fit beside a large window.
        vase = {**vase, "protected_share": 0.5 * (1 - vase["window"] / vase["budget"])}
    return vase


requests = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 150),
        "shares_prompt": st.booleans(),
        "max_new_tokens": st.integers(1, 90),
        "vase": st.one_of(st.none(), st.just({"policy": "full"}), budgets.map(_complete)),
    }
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), requests),
        st.tuples(st.just("step"), st.integers(1, 25)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
    ),
    min_size=1,
    max_size=25,
)


def test_integrity_check_is_installed() -> None:
    assert any(hook.function is integrity.after_step for hook in plugin.active_hooks())


@pytest.mark.parametrize(
    ("overlap", "prefix_cache", "examples"),
    [(False, False, 50), (True, False, 50), (False, True, 40), (True, True, 60)],
)
def test_random_schedules(
    stepped: SteppedScheduler, overlap: bool, prefix_cache: bool, examples: int
) -> None:
    if not os.environ.get("VASE_TEST_SLOW"):
        examples //= 2 if prefix_cache else 5  # with the cache they allocate in the same ways too

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(schedule=actions)
    def check(schedule: list[tuple[str, Any]]) -> None:
        _check_schedule(stepped, schedule)

    with torch.inference_mode():
        stepped.configure(overlap=overlap, prefix_cache=prefix_cache)
        check()
        stepped.configure()


def test_random_schedules_with_priorities(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stepped.scheduler, "enable_priority_scheduling", True)
        patch.setattr(stepped.scheduler.policy, "enable_priority_scheduling", True)
        test_random_schedules(stepped, overlap=True, prefix_cache=True, examples=30)


def _check_schedule(stepped: SteppedScheduler, schedule: list[tuple[str, Any]]) -> None:
    submitted: list[tuple[str, dict[str, Any]]] = []
    aborted: set[str] = set()
    for action, argument in schedule:
        if action == "submit":
            rid = f"s{next(_counter):07d}"
            start = 0 if argument["shares_prompt"] else len(submitted)
            prompt = [2 + (7 * i + start) % (VOCAB - 2) for i in range(argument["prompt"])]
            stepped.submit(
                rid,
                prompt,
                max_new_tokens=argument["max_new_tokens"],
                vase=argument["vase"],
                fields={"priority": argument["prompt"] % 3},
            )
            submitted.append((rid, argument))
        elif action == "step":
            for _ in range(argument):
                stepped.step()
        elif submitted:
            rid = submitted[argument % len(submitted)][0]
            stepped.abort(rid)
            aborted.add(rid)
    stepped.run()
    assert stepped.free_slots == POOL
    assert not stepped.running
    for rid, request in submitted:
        if rid not in aborted:
            _check_answer(stepped, rid, request)
    stepped.answers.clear()


def _check_answer(stepped: SteppedScheduler, rid: str, request: dict[str, Any]) -> None:
    answer, vase = stepped.answers[rid], request["vase"]
    assert answer.finish is not None and answer.finish["type"] == "length", answer.finish
    assert len(answer.tokens) == request["max_new_tokens"]
    if vase is None:
        assert answer.statistics is None
        return
    assert answer.statistics is not None
    logical = request["prompt"] + request["max_new_tokens"]
    assert answer.statistics["logical_length"] == logical
    rounds, evicted = expected_rounds(request["prompt"], request["max_new_tokens"], vase)
    assert answer.statistics["rounds"] == rounds
    assert answer.statistics["evicted_tokens"] == evicted
    assert answer.statistics["physical_length"] == logical - 1 - evicted


def expected_rounds(prompt: int, new: int, vase: dict[str, Any]) -> tuple[int, int]:
    """Rounds and evicted tokens by stepping the rule of the design, one token at a time."""
    if vase["policy"] == "full":
        return 0, 0
    budget, window = vase["budget"], vase["window"]
    length, trigger, kept = prompt, max(prompt, budget) + window, budget
    if vase.get("prompt") == "keep":
        trigger, kept = prompt + budget + window, prompt + budget
    rounds = evicted = 0
    for _ in range(new - 1):  # the first token comes from the prefill
        if length == trigger:
            rounds, evicted = rounds + 1, evicted + length - kept
            length, trigger = kept, kept + window
        length += 1
    return rounds, evicted
