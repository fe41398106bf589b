"""The loop detector: exact on made sequences, precision and recall on labelled text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vase_sgl.eval.loops import (
    MANY_COPIES,
    MANY_LENGTH,
    MIN_LENGTH,
    TAIL,
    Loop,
    detect_loop,
    repetition,
    words,
)

LABELLED = Path(__file__).parent / "data" / "loops.jsonl"


def _prose(length: int, seed: int = 0) -> list[int]:
    """Units of which none repeats."""
    return random.Random(seed).sample(range(50_000), length)


@pytest.mark.parametrize("period", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("cut", [0, 1])
def test_start_and_period_are_exact(period: int, cut: int) -> None:
    before, block = _prose(100, seed=1), list(range(60_000, 60_000 + period))
    copies = max(4, 2 * MIN_LENGTH // period)
    units = before + block * copies + block[: cut * period // 2]
    assert detect_loop(units) == Loop(start=100, period=period, copies=copies)


def test_a_loop_that_joins_what_came_before_starts_there() -> None:
    units = [*_prose(50), 3, *[1, 2, 3] * 40]
    assert detect_loop(units) == Loop(start=50, period=3, copies=40)


def test_two_copies_are_no_loop() -> None:
    block = _prose(90)
    assert detect_loop(block + block) is None
    assert detect_loop(block + block + block) == Loop(start=0, period=90, copies=3)


def test_a_short_run_is_no_loop() -> None:
    before = _prose(60)
    assert detect_loop(before + [7] * (MANY_LENGTH - 1)) is None
    assert detect_loop(before + [7] * MANY_LENGTH) == Loop(start=60, period=1, copies=MANY_LENGTH)
    block = list(range(60_000, 60_008))
    assert 8 * (MANY_COPIES - 1) < MIN_LENGTH
    assert detect_loop(before + block * (MANY_COPIES - 1)) is None
    assert detect_loop(before + block * MANY_COPIES) == Loop(60, 8, MANY_COPIES)


def test_a_loop_that_the_text_has_left_is_none() -> None:
    assert detect_loop([7] * 400 + _prose(TAIL)) is None


def test_a_loop_with_variations_has_no_period() -> None:
    draw = random.Random(3)
    lines = [list(range(start, start + 12)) for start in (100, 200)]
    units = _prose(500) + [unit for _ in range(40) for unit in draw.choice(lines)]
    loop = detect_loop(units)
    assert loop is not None and (loop.period, loop.copies) == (None, None)
    assert len(units) - TAIL <= loop.start < len(units)
    assert repetition(units) > 0.75


@pytest.mark.parametrize("units", [[], [1], [1, 1], "ab", _prose(3000)])
def test_nothing_to_find(units: list[int]) -> None:
    assert detect_loop(units) is None
    assert repetition(units) == 0.0


def test_a_long_sequence_takes_linear_time() -> None:
    # Quadratic work on this one would take hours.
    assert detect_loop([5] * 300_000) == Loop(start=0, period=1, copies=300_000)


@pytest.mark.parametrize(
    "text",
    [
        "1/3 = 0." + "3" * 5000,
        "It is 1" + "0" * 5000,
        "0." + "142857" * 300,
        "ha" * 3000,
        "等等" * 500,
        "然后我再检查" * 300,
        "-" * 3000,
        "_" * 3001,
        "..." * 1000,
        "= 2" + "2" * 240,
        "10" * 130,
        "haha" * 60,
        "!" * 250,
    ],
    ids=lambda text: text[:12],
)
def test_a_loop_without_spaces(text: str) -> None:
    assert detect_loop(words(text)) is not None


@pytest.mark.parametrize(
    "text",
    [
        "-" * 400,
        "+" * 400,
        "1" + "0" * 200,
        "!" * 200,
        "0123456789abcdef" * 4,
        "等" * 40,
        "2" * 600 + " is the sum.",
        "507f1f77bcf86cd799439011\n" * 12,
    ],
    ids=lambda text: text[:12],
)
def test_a_long_line_without_spaces_is_no_loop(text: str) -> None:
    assert detect_loop(words(text)) is None


def test_a_word_without_end_starts_at_its_first_whole_piece() -> None:
    loop = Loop(start=3, period=1, copies=10)
    for cut in ("", "2", "2" * 23):
        assert detect_loop(words("It is 1" + "2" * (23 + 240) + cut)) == loop
    assert detect_loop(words("It is 1" + "2" * (23 + 239))) is None
    assert detect_loop(words("222" * 100 + "3")) is None


def test_a_loop_may_be_cut_within_a_word() -> None:
    units = words("Wait. " + "check it again " * 28)
    loop = Loop(start=2, period=3, copies=28)
    assert detect_loop(units) == detect_loop([*units, "che"]) == loop
    assert detect_loop([*units, "done"]) is None


def test_words_are_lower_case_with_punctuation_by_itself() -> None:
    assert words("Ha, ha! x=1_0\n思考") == ["ha", ",", "ha", "!", "x", "=", "1", "_", "0", "思考"]
    assert words("-" * 72 + "\n::=") == ["-" * 72, "::", "="]
    assert len(words("-" * 4000)) == 50 and words("!" * 25) == ["!" * 24, "!"]
    assert words("a" * 24) == ["a" * 24] and words("a" * 50) == ["a" * 24, "a" * 24, "aa"]


@pytest.mark.parametrize(("split", "least_recall"), [("tuning", 0.69), ("held-out", 0.81)])
def test_precision_and_recall_on_labelled_text(
    split: str, least_recall: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every miss is a loop in its first copies, or one just left."""
    rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    flagged = [
        (row, detect_loop(words(row["text"])) is not None) for row in rows if row["split"] == split
    ]
    hits = [row for row, loop in flagged if loop and row["loops"]]
    wrong = [row["source"] for row, loop in flagged if loop and not row["loops"]]
    missed = [row["source"] for row, loop in flagged if not loop and row["loops"]]
    precision, recall = len(hits) / (len(hits) + len(wrong)), len(hits) / (len(hits) + len(missed))
    with capsys.disabled():
        print(
            f"\nloops, {split}: {len(flagged)} texts, {len(hits) + len(missed)} with a loop, "
            f"precision {precision:.2f}, recall {recall:.2f}"
        )
    assert not wrong, wrong
    assert recall >= least_recall, missed
