"""Numbers with their uncertainty. Nothing here gives a value without its interval and n.

Intervals are two-sided 95 %. Bootstrap intervals are percentile intervals of `RESAMPLES` resamples
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) from a generator with a
fixed seed, so the same data gives the same interval. Means are float64.

Samples are keyed by (item id, seed index). The unit that is resampled is the *item* with all its
seeds: answers to one question under several seeds are not independent, and resampling them one by
one would make the interval too narrow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000

#: Item id of one sample, and which of its item's samples it is: the seed index, as a rule.
Key = tuple[str, Any]
Samples = Mapping[Key, float]

_SEED = 20260603
_NAMED = 5
_CHUNK = 1 << 22


class IncompleteCellError(ValueError):
    """Samples that an estimate or a comparison needs are missing."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float
    #: Samples behind it.
    n: int


@dataclasses.dataclass(frozen=True)
class SignTest:
    """The exact two-sided sign test: do two arms win equally often, ties left out?"""

    wins: int
    losses: int
    ties: int
    #: Probability of a split at least this uneven if both arms were the same; 1 without a decision.
    p_value: float

    @property
    def n(self) -> int:
        """Samples compared, ties included."""
        return self.wins + self.losses + self.ties


def proportion(successes: float, n: int) -> Estimate:
    """The share of successes among independent trials, with Wilson's score interval.

    Where trials succeed in part the successes are no whole number. Source: Wilson, JASA 22
    (1927).

    Raises:
        ValueError: not 0 <= successes <= n, or n is 0.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1: {successes} of {n}")
    share, z2 = successes / n, float(stats.norm.ppf((1 + CONFIDENCE) / 2)) ** 2
    center = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (n * share * (1 - share) + z2 / 4)) / (n + z2)
    low, high = max(center - half, 0.0), min(center + half, 1.0)
    return Estimate(share, min(low, share), max(high, share), n)


def mean(samples: Samples) -> Estimate:
    """The mean over items and seeds, with a bootstrap interval over items.

    Raises:
        IncompleteCellError: fewer than two items, or an item lacks a seed that another one has.
        ValueError: a sample is not finite.
    """
    table = _table(samples)
    low, high = _interval(table.mean(axis=1))
    return Estimate(float(table.mean()), low, high, table.size)


def share(samples: Samples) -> Estimate:
    """The mean of samples that are 0 or 1.

    With one seed per item the interval is Wilson's. Else it is the bootstrap's, unless all items
    have the same mean over their seeds: a bootstrap would have no width then, however few they are,
    and the interval is Wilson's over the items.

    Raises:
        IncompleteCellError: items with different means of which one lacks a seed that another has.
        ValueError: no samples.
    """
    by_item: dict[str, list[float]] = {}
    for (item, _), value in samples.items():
        by_item.setdefault(item, []).append(value)
    alike = len({sum(values) / len(values) for values in by_item.values()}) == 1
    n = len(by_item)
    if n < len(samples) and not alike:
        return mean(samples)
    return dataclasses.replace(
        proportion(sum(samples.values()) * n / max(len(samples), 1), n), n=len(samples)
    )


def paired_difference(arm: Samples, baseline: Samples) -> Estimate:
    """The mean of `arm - baseline` over the same items and seeds, bootstrapped over items.

    Raises:
        IncompleteCellError: the two do not hold exactly the same items and seeds, or either is
            ragged; the text names what is missing.
        ValueError: a sample is not finite.
    """
    differences = _differences(arm, baseline)
    low, high = _interval(differences.mean(axis=1))
    return Estimate(float(differences.mean()), low, high, differences.size)


def paired_share_difference(arm: Samples, baseline: Samples) -> Estimate:
    """The same for samples that are 0 or 1.

    A bootstrap of few items is too narrow here, and has no width at all where every item agrees.
    So with one seed per item, and where all items differ alike, the interval is Bonett and Price's
    over the items (J. Educ. Behav. Stat. 37 (2012): a Wald interval after one more item won and one
    more lost); else it is the bootstrap's.

    Raises:
        IncompleteCellError, ValueError: as for `paired_difference`.
    """
    bootstrapped = paired_difference(arm, baseline)
    by_item = _differences(arm, baseline).mean(axis=1)
    if bootstrapped.n > len(by_item) and bootstrapped.low < bootstrapped.high:
        return bootstrapped
    n = len(by_item) + 2
    won, lost = (float((sign * by_item > 0).sum()) + 1 for sign in (1, -1))
    center = (won - lost) / n
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(
        ((won + lost) / n - center**2) / n
    )
    value = bootstrapped.value
    return Estimate(
        value,
        low=min(value, max(center - half, -1.0)),
        high=max(value, min(center + half, 1.0)),
        n=bootstrapped.n,
    )


def sign_test(arm: Samples, baseline: Samples) -> SignTest:
    """How often `arm` is above, below and equal to `baseline` on the same items and seeds.

    An item counts once, by its mean over the seeds, because its seeds are not independent.

    Raises:
        IncompleteCellError: as for `paired_difference`.
        ValueError: a sample is not finite.
    """
    by_item = _differences(arm, baseline).mean(axis=1)
    wins, losses = int((by_item > 0).sum()), int((by_item < 0).sum())
    decided = wins + losses
    p_value = float(stats.binomtest(wins, decided).pvalue) if decided else 1.0
    return SignTest(wins, losses, len(by_item) - decided, p_value)


def _differences(arm: Samples, baseline: Samples) -> npt.NDArray[np.float64]:
    problems = [
        _listed("missing in the arm", baseline.keys() - arm.keys()),
        _listed("missing in the baseline", arm.keys() - baseline.keys()),
    ]
    if any(problems):
        raise IncompleteCellError("not the same samples: " + "; ".join(filter(None, problems)))
    return _table(arm) - _table(baseline)


def _table(samples: Samples) -> npt.NDArray[np.float64]:
    """Samples as float64 [items, seeds], both sorted; refuses holes."""
    if not samples:
        raise IncompleteCellError("no samples")
    items = sorted({item for item, _ in samples})
    seeds = sorted({seed for _, seed in samples})
    if len(items) < 2:
        raise IncompleteCellError(f"an interval needs at least 2 items; there is only {items[0]}")
    missing = {(item, seed) for item in items for seed in seeds} - samples.keys()
    if missing:
        raise IncompleteCellError(f"ragged: {_listed('missing', missing)}")
    table = np.array([[samples[item, seed] for seed in seeds] for item in items], dtype=np.float64)
    if not np.isfinite(table).all():
        item, seed = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"the sample of item {items[item]} seed {seeds[seed]} is not finite")
    return table


def _interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [items]."""
    generator = np.random.Generator(np.random.Philox(_SEED))
    rows = max(1, _CHUNK // len(values))
    means = np.concatenate(
        [
            values[
                generator.integers(len(values), size=(min(rows, RESAMPLES - done), len(values)))
            ].mean(axis=1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _listed(label: str, keys: Collection[Key]) -> str:
    if not keys:
        return ""
    named = [f"item {item} seed {seed}" for item, seed in sorted(keys)[:_NAMED]]
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{label}: {', '.join(named)}{more}"
