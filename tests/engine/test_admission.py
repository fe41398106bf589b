"""Who is let in beside whom: prompts in chunks, requests without a budget, output lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tiny_model import CONTEXT

POOL = 400
PROMPT = [2 + (11 * i) % 250 for i in range(300)]
BUDGET: dict[str, Any] = {"budget": 24, "window": 8, "policy": "streaming"}


@pytest.fixture(autouse=True)
def _clean(stepped: SteppedScheduler) -> Iterator[None]:
    stepped.answers.clear()
    with torch.inference_mode():
        stepped.configure()
        yield
        stepped.abort("")  # whatever it is called
        stepped.run()
        stepped.configure()
    assert stepped.free_slots == POOL


def _waiting(stepped: SteppedScheduler) -> list[str]:
    return [req.rid for req in stepped.scheduler.waiting_queue]


def test_an_aligned_first_chunk_lets_nobody_into_the_slots_of_the_rest(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with flashinfer and --enable-deterministic-inference, where it is 4096 tokens."""
    stepped.configure(overlap=True)
    monkeypatch.setattr(stepped.scheduler, "truncation_align_size", 128)
    for name, prompt, new in (("small", 10, 30), ("long", 300, 60), ("third", 100, 30)):
        stepped.submit(name, PROMPT[:prompt], max_new_tokens=new, vase=BUDGET)
    stepped.step()
    assert stepped.scheduler.chunked_req.rid == "long"
    assert _waiting(stepped) == ["third"]
    stepped.run()
    lengths = {rid: len(answer.tokens) for rid, answer in stepped.answers.items()}
    assert lengths == {"small": 30, "long": 60, "third": 30}


@pytest.mark.parametrize(("budget", "waiting"), [(231, []), (232, ["beside"])])
def test_a_last_chunk_reserves_the_growth_after_it(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, budget: int, waiting: list[str]
) -> None:
    """The rest of 36 tokens, a spare one and growth by 58 leave 241 of the 336 slots."""
    monkeypatch.setattr(stepped.scheduler, "chunked_prefill_size", 64)
    stepped.submit("long", PROMPT[:100], max_new_tokens=500, vase={**BUDGET, "budget": 150})
    stepped.step()
    assert stepped.free_slots == POOL - 64
    stepped.submit("beside", PROMPT[:20], max_new_tokens=500, vase={**BUDGET, "budget": budget})
    stepped.step()
    assert stepped.scheduler.chunked_req is None
    assert _waiting(stepped) == waiting


@pytest.mark.parametrize("running", [False, True], ids=["idle", "beside a stock request"])
def test_full_length_requests_do_not_wait_for_a_budget_of_their_own_step(
    stepped: SteppedScheduler, running: bool
) -> None:
    """SGLang's simulation, without a prefix cache, counts who is let in as it does who runs."""
    if running:
        stepped.submit("running", PROMPT[:30], max_new_tokens=60)
        stepped.step()
    stepped.submit("budget", PROMPT[:30], max_new_tokens=1500, vase=BUDGET)
    stepped.submit("stock", PROMPT[:30], max_new_tokens=60)
    stepped.step()
    assert not _waiting(stepped)


def test_a_least_output_is_bounded_as_the_most(stepped: SteppedScheduler) -> None:
    stepped.submit("long", PROMPT[:30], max_new_tokens=60, vase=BUDGET)
    (req,) = stepped.scheduler.waiting_queue
    stepped.abort("long")  # without a tokenizer it could not run
    sampling = req.sampling_params
    sampling.max_new_tokens, sampling.min_new_tokens = 10 * CONTEXT, 2 * CONTEXT
    stepped.scheduler.init_req_max_new_tokens(req)
    assert sampling.min_new_tokens == sampling.max_new_tokens == CONTEXT - 2 - 30


@pytest.fixture
def by_priority(stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with --enable-priority-scheduling --disable-priority-preemption."""
    assert not stepped.scheduler.enable_priority_preemption
    monkeypatch.setattr(stepped.scheduler, "enable_priority_scheduling", True)
    monkeypatch.setattr(stepped.scheduler.policy, "enable_priority_scheduling", True)


def _submit(stepped: SteppedScheduler, rid: str, priority: int | None) -> None:
    """All alike: 158 slots until the first round, then 32. Two fit at once."""
    stepped.submit(rid, PROMPT[:150], max_new_tokens=60, vase=BUDGET, fields={"priority": priority})


def _expect_equal_answers(stepped: SteppedScheduler, rids: set[str]) -> None:
    answers = [stepped.answers[rid] for rid in rids]
    assert all(answer.finish and answer.finish["type"] == "length" for answer in answers)
    assert all(answer.tokens == answers[0].tokens for answer in answers)
    assert all(answer.statistics == answers[0].statistics for answer in answers)


def test_priorities_sort_who_waits_and_take_nobodys_slots(
    stepped: SteppedScheduler, by_priority: None
) -> None:
    _submit(stepped, "first", 0)
    _submit(stepped, "second", 0)
    stepped.step()
    for rid, priority in (("none", None), ("low", 1), ("middle", 2), ("high", 3)):
        _submit(stepped, rid, priority)
    order: list[str] = []
    while not stepped.idle:
        stepped.step()
        order += [req.rid for req in stepped.running if req.rid not in order]
    assert order == ["first", "second", "high", "middle", "low", "none"]
    _expect_equal_answers(stepped, set(order))


def test_who_waits_makes_way_for_a_higher_priority(
    stepped: SteppedScheduler, by_priority: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --max-queued-requests. Nobody who runs does."""
    monkeypatch.setattr(stepped.scheduler, "max_queued_requests", 2)
    for rid in ("first", "second"):
        _submit(stepped, rid, 0)
    stepped.step()
    for rid, priority in (("low", 1), ("middle", 2), ("high", 3), ("late", 1)):
        _submit(stepped, rid, priority)
    for rid, text in (("low", "by a higher priority request"), ("late", "queue is full")):
        finish = stepped.answers[rid].finish
        assert finish is not None and finish["status_code"] == 503 and text in finish["message"]
    stepped.run()
    _expect_equal_answers(stepped, {"first", "second", "middle", "high"})
