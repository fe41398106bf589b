"""Estimates against known values, and the refusal of cells with holes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from vase_sgl.eval.statistics import (
    Estimate,
    IncompleteCellError,
    Samples,
    mean,
    paired_difference,
    paired_share_difference,
    proportion,
    share,
    sign_test,
)


def _samples(values: object) -> dict[tuple[str, int], float]:
    table = np.asarray(values, dtype=np.float64)
    return {
        (f"item-{item}", seed): float(table[item, seed])
        for item in range(table.shape[0])
        for seed in range(table.shape[1])
    }


def test_wilson_interval_of_a_textbook_case() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 -> 0.2553 to 0.3662.
    estimate = proportion(81, 263)
    assert estimate.n == 263
    assert estimate.value == pytest.approx(0.3080, abs=5e-5)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)]
)
def test_wilson_interval_at_the_ends(successes: int, n: int, low: float, high: float) -> None:
    estimate = proportion(successes, n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("n", [1, 5, 64, 263])
def test_wilson_interval_is_that_of_scipy(n: int) -> None:
    for successes in {0, n // 3, n - 1, n}:
        known = stats.binomtest(successes, n).proportion_ci(method="wilson")
        estimate = proportion(successes, n)
        assert (estimate.low, estimate.high) == pytest.approx((known.low, known.high), abs=1e-12)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_shares_of_items_that_are_alike_have_an_interval() -> None:
    """Of four questions with two samples each, one of which is right: that says little."""
    alike = share(_samples([[1, 0], [0, 1], [1, 0], [0, 1]]))
    assert (alike.value, alike.n) == (0.5, 8)
    assert (alike.low, alike.high) == pytest.approx((0.1500, 0.8500), abs=1e-4)  # of 2 in 4
    never = share(_samples(np.zeros((20, 3))))
    assert (never.value, never.low, never.n) == (0, 0, 60)
    assert never.high == pytest.approx(0.1611, abs=1e-4)
    assert share(_samples([[1, 0]])) == dataclasses.replace(proportion(0.5, 1), n=2)


def test_shares_by_one_seed_and_by_several() -> None:
    one = _samples([[1], [0], [1]])
    assert share(one) == proportion(2, 3)
    several = _samples([[1, 0], [1, 1], [0, 0]])
    assert share(several) == mean(several)
    with pytest.raises(IncompleteCellError, match="ragged"):
        share({("a", 0): 1.0, ("b", 0): 1.0, ("b", 1): 0.0})
    with pytest.raises(ValueError, match="n >= 1"):
        share({})


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_no_proportion_of_nothing(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        proportion(successes, n)


def test_mean_with_interval() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(5.0, 2.0, size=(200, 1))
    estimate = mean(_samples(values))
    assert estimate.n == 200
    assert estimate.value == pytest.approx(values.mean())
    # With one seed the bootstrap agrees with the normal approximation.
    half = 1.96 * values.std() / np.sqrt(200)
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(60):
        item_effect = generator.normal(0.0, 1.0, size=(30, 1))
        values = 0.3 + item_effect + generator.normal(0.0, 0.2, size=(30, 4))
        estimate = mean(_samples(values))
        covered += estimate.low <= 0.3 <= estimate.high
    # Seeds of one item are alike; taking 120 samples for independent would cover about 65 %.
    assert covered >= 51


def test_estimates_repeat_exactly() -> None:
    values = np.random.default_rng(3).normal(size=(40, 2))
    assert mean(_samples(values)) == mean(dict(reversed(_samples(values).items())))


def test_pairing_removes_what_the_items_share() -> None:
    generator = np.random.default_rng(4)
    difficulty = generator.normal(0.0, 10.0, size=(50, 1))
    baseline = difficulty + generator.normal(0.0, 0.1, size=(50, 2))
    arm = difficulty + 0.2 + generator.normal(0.0, 0.1, size=(50, 2))
    estimate = paired_difference(_samples(arm), _samples(baseline))
    assert estimate.n == 100
    assert 0.15 < estimate.low < estimate.value < estimate.high < 0.25


def test_a_difference_of_shares_covers_the_truth() -> None:
    """A bootstrap of eight items misses it in two runs of three: nothing happens in most."""
    generator = np.random.default_rng(6)
    covered = 0
    for _ in range(300):
        baseline = np.ones((8, 1))
        arm = (generator.random((8, 1)) >= 0.05).astype(np.float64)
        estimate = paired_share_difference(_samples(arm), _samples(baseline))
        covered += estimate.low <= -0.05 <= estimate.high
    assert covered >= 285


@pytest.mark.parametrize(
    ("won", "lost", "low", "high"),
    [(0, 0, -0.277, 0.277), (0, 3, -0.697, 0.097), (0, 7, -1.0, -0.303), (8, 0, 0.428, 1.0)],
)
def test_a_difference_of_shares_of_few_items(won: int, lost: int, low: float, high: float) -> None:
    table = np.zeros((8, 2))
    table[:won, 0] = 1
    table[won : won + lost, 1] = 1
    estimate = paired_share_difference(_samples(table[:, :1]), _samples(table[:, 1:]))
    assert estimate.value == (won - lost) / 8 and estimate.n == 8
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-4)


def test_a_difference_of_shares_with_several_seeds() -> None:
    generator = np.random.default_rng(7)
    arm = _samples(generator.integers(0, 2, size=(12, 4)))
    baseline = _samples(generator.integers(0, 2, size=(12, 4)))
    assert paired_share_difference(arm, baseline) == paired_difference(arm, baseline)
    same = paired_share_difference(arm, arm)  # alike everywhere: that says little about 12 items
    assert (same.value, same.n) == (0.0, 48) and same.low == -same.high < -0.19


def test_equal_arms_do_not_differ() -> None:
    samples = _samples(np.random.default_rng(5).integers(0, 2, size=(20, 3)))
    assert paired_difference(samples, samples) == Estimate(0.0, 0.0, 0.0, 60)
    test = sign_test(samples, samples)
    assert (test.wins, test.losses, test.ties, test.p_value, test.n) == (0, 0, 20, 1.0, 20)


def test_sign_test_of_a_textbook_case() -> None:
    # 9 wins and 1 loss: p = 2 * (1 + 10) / 2**10.
    arm = _samples([[1.0]] * 9 + [[0.0]] + [[0.5]] * 2)
    baseline = _samples([[0.5]] * 12)
    test = sign_test(arm, baseline)
    assert (test.wins, test.losses, test.ties) == (9, 1, 2)
    assert test.p_value == pytest.approx(22 / 1024)


def test_an_item_is_one_vote_however_many_seeds() -> None:
    test = sign_test(_samples([[1, 1, 0], [0, 0, 0]]), _samples([[0, 0, 0], [0, 1, 0]]))
    assert (test.wins, test.losses, test.n) == (1, 1, 2)


@pytest.mark.parametrize(
    ("arm", "baseline", "text"),
    [
        (
            {("a", 0): 1.0, ("b", 0): 1.0},
            {("a", 0): 1.0, ("c", 0): 1.0},
            "missing in the arm: item c seed 0; missing in the baseline: item b seed 0",
        ),
        (
            {("a", 0): 1.0, ("b", 0): 1.0, ("b", 1): 0.0},
            {("a", 0): 1.0, ("b", 0): 1.0, ("b", 1): 0.0},
            "ragged: missing: item a seed 1",
        ),
        ({}, {}, "no samples"),
    ],
)
def test_cells_with_holes_are_refused(arm: Samples, baseline: Samples, text: str) -> None:
    for compare in (paired_difference, sign_test):
        with pytest.raises(IncompleteCellError, match=text):
            compare(arm, baseline)


def test_one_item_has_no_interval() -> None:
    with pytest.raises(IncompleteCellError, match="2 items"):
        mean({("a", 0): 1.0, ("a", 1): 0.0})


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="item b seed 0 is not finite"):
        mean({("a", 0): 1.0, ("b", 0): float("nan")})
