"""Text chunks and forced-thought tasks: deterministic items, rows that pair over arms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from typing import Any

import pytest

from vase_sgl.eval.forced import (
    ForcedArm,
    ForcedModel,
    nll_rows,
    passkey_items,
    state_items,
    task_rows,
    text_chunks,
)
from vase_sgl.eval.rows import question_of
from vase_sgl.eviction import EvictionParams

FILLER = [32 + (i * i) % 90 for i in range(400)]


def params(**changes: Any) -> EvictionParams:
    return EvictionParams.parse({"budget": 24, "window": 8, "seed": 5} | changes)


def test_nll_rows_pair_arms_on_the_same_tokens(tiny: ForcedModel) -> None:
    chunks = text_chunks("text", FILLER, prompt_tokens=10, forced_tokens=90, count=2)
    assert chunks[0].prompt + chunks[0].forced + chunks[1].prompt == tuple(FILLER[:110])
    arms = [ForcedArm("full", None), ForcedArm("a", params()), ForcedArm("a", params(seed=6), 1)]
    rows = list(nll_rows(tiny, chunks, arms, "run"))
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["item_id"], row["arm"], row["seed_index"]) for row in rows] == [
        (item, *arm) for item in ("text/0", "text/1") for arm in (("full", 0), ("a", 0), ("a", 1))
    ]
    for row, chunk in zip(rows, [chunks[0]] * 3 + [chunks[1]] * 3, strict=True):
        arm = {0: None, 5: params(), 6: params(seed=6)}[row["seeds"].get("eviction", 0)]
        alone = tiny.start(chunk.prompt, [arm])
        assert row["nll_sum"] == pytest.approx(float(alone.force(chunk.forced).sum()), rel=1e-4)
        assert row["digest"] == alone.report(0).digest
        assert (row["nll_tokens"], row["output_tokens"], row["full_kv_slots"]) == (90, 90, 100)
        assert (row["budget"], row["reserved_slots"]) == ((None, 100) if arm is None else (24, 32))
        # 99 entries, of which rounds at 32, 40, ... left 24 + at most 8.
        rounds = 0 if arm is None else 1 + (98 - 32) // 8
        assert (row["rounds"], row["evicted_tokens"]) == (rounds, 8 * rounds)
        assert row["physical_length"] == 99 - 8 * rounds


@pytest.mark.parametrize(
    ("mode", "forced", "slots"), [("evict", 90, 32), ("keep", 90, 92), ("evict", 5, 65)]
)
def test_slots_are_those_at_the_end(tiny: ForcedModel, mode: str, forced: int, slots: int) -> None:
    """Not those of the first round, which a prompt longer than the budget makes more."""
    chunks = text_chunks("text", FILLER, prompt_tokens=60, forced_tokens=forced, count=1)
    (row,) = nll_rows(tiny, chunks, [ForcedArm("a", params(prompt=mode))], "run")
    assert row["reserved_slots"] == slots >= row["physical_length"]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="text has 400 tokens, but 5 chunks of 10 \\+ 90 need 500"):
        text_chunks("text", FILLER, prompt_tokens=10, forced_tokens=90, count=5)


@pytest.mark.parametrize("make", [passkey_items, state_items])
def test_items_follow_the_seed_alone(tiny: ForcedModel, make: Any) -> None:
    def items(seed: int, count: int = 3) -> Any:
        return make("sea", tiny.tokenizer, FILLER, thought_tokens=200, count=count, seed=seed)

    assert items(1) == items(1, count=4)[:3]
    assert len({item.answer for item in items(1) + items(2)}) > 1
    assert all(len(item.thought) >= 200 for item in items(1))
    with pytest.raises(ValueError, match="filler"):
        make("sea", tiny.tokenizer, FILLER, thought_tokens=401, count=1, seed=1)
    # Another text gets other questions, or its items would not be independent of these.
    others = make("land", tiny.tokenizer, FILLER, thought_tokens=200, count=3, seed=1)
    for one, other in zip(items(1), others, strict=True):
        assert one.item_id != other.item_id and one.prompt != other.prompt
        assert question_of(one.item_id) == (one.item_id, None)


def test_the_pass_key_is_in_the_prompt_and_nowhere_else(tiny: ForcedModel) -> None:
    decode = tiny.tokenizer.decode
    for item in passkey_items("sea", tiny.tokenizer, FILLER, thought_tokens=100, count=3, seed=1):
        assert re.search(r"is (\d{5})\.", decode(item.prompt))[1] == item.answer_text
        assert item.answer_text not in decode(item.thought + item.question)
        assert decode(item.answer) == f" {item.answer_text}"


def test_the_last_state_is_the_answer(tiny: ForcedModel) -> None:
    decode = tiny.tokenizer.decode
    for item in state_items("sea", tiny.tokenizer, FILLER, thought_tokens=100, count=6, seed=1):
        told = decode(item.prompt + item.thought)
        asked = re.search(r"value: (\w+) is$", decode(item.question))[1]
        assert re.findall(rf"{asked} is (?:now )?(\d\d)\b", told)[-1] == item.answer_text


def test_task_rows_grade_by_greedy_decoding(tiny: ForcedModel) -> None:
    arms = [ForcedArm("full", None), ForcedArm("streaming", params(policy="streaming"))]
    items = passkey_items("sea", tiny.tokenizer, FILLER, thought_tokens=60, count=2, seed=1)
    rows = list(task_rows(tiny, items, arms, "run"))
    assert [row["nll_tokens"] for row in rows] == [len(item.answer) for item in items for _ in arms]
    assert not any(row["correct"] for row in rows)  # a random model
    item, arm = items[0], arms[1]
    session = tiny.start(item.prompt, [arm.params])
    session.force(item.thought + item.question)
    greedy = tuple(session.greedy(3)[0].tolist())
    wrong = (*greedy[:2], (greedy[2] + 1) % 256)
    for answer, correct in ((greedy, True), (wrong, False)):
        asked = dataclasses.replace(item, answer=answer)
        assert [row["correct"] for row in task_rows(tiny, [asked], [arm], "run")] == [correct]


def test_a_clock_that_is_set_back_takes_no_seconds_away(
    tiny: ForcedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 60 * next(readings))
    arms = [ForcedArm("full", None)]
    chunks = text_chunks("text", FILLER, prompt_tokens=10, forced_tokens=20, count=1)
    items = passkey_items("sea", tiny.tokenizer, FILLER, thought_tokens=20, count=1, seed=1)
    for found in (nll_rows(tiny, chunks, arms, "run"), task_rows(tiny, items, arms, "run")):
        assert [0 < row["total_seconds"] < 60 for row in found] == [True]
