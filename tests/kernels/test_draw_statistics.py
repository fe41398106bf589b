"""The draw is weighted sampling without replacement, judged by chi-square on whole kept sets."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from vase_kernels.reference import Candidates, select_victims

DRAWS = 6_000


def exact_set_probabilities(weights: list[float], size: int) -> dict[frozenset[int], float]:
    """Draw one by one, each time proportionally to the weights left; sum over orders."""
    out: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(len(weights)), size):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        out[frozenset(order)] = out.get(frozenset(order), 0.0) + probability
    return out


def draw_kept(policy: str, weights: list[float], size: int, vary: str, **fields) -> Counter:
    """Kept sets of many draws that differ in one counter or key word only."""
    n = len(weights)
    many = torch.arange(DRAWS)
    logits = torch.tensor([math.log(w) for w in weights])
    keys = logits[:, None] * torch.tensor([1.0, 0, 0, 0])  # head_dim 4: q = 2 gives q.k/2 = logit
    candidates = Candidates(
        keys=(keys.expand(DRAWS, 1, n, 4),),
        values=(torch.zeros(DRAWS, 1, n, 4),),
        queries=torch.tensor([2.0, 0, 0, 0]).expand(DRAWS, 1, 1, 1, 4),
        positions=torch.arange(10, 10 + n).expand(DRAWS, 1, 1, n),
        seed=many if vary == "seed" else torch.full((DRAWS,), 99),
        round=many + 1 if vary == "round" else torch.ones(DRAWS, dtype=torch.int64),
        layers=torch.tensor([3]),
        heads=torch.tensor([1]),
    )
    victims = select_victims(policy, candidates, n - size, budget=8, **fields)
    everything = set(range(n))
    return Counter(frozenset(everything - set(row)) for row in victims[:, 0, 0].tolist())


def assert_chi_square(counts: Counter, probabilities: dict[frozenset[int], float]) -> None:
    assert counts.keys() <= probabilities.keys()
    observed = np.array([counts[s] for s in probabilities])
    expected = np.array(list(probabilities.values())) * DRAWS
    assert expected.min() > 5
    assert stats.chisquare(observed, expected * (DRAWS / expected.sum())).pvalue > 1e-3


@pytest.mark.parametrize("vary", ["seed", "round"])
@pytest.mark.parametrize(
    ("weights", "size"), [([1, 2, 3, 4, 5, 6], 3), ([1, 1, 1, 10], 2), ([5, 1, 3, 2, 7], 4)]
)
def test_attention_draw(weights, size, vary):
    fields = {"num_sinks": 0, "protected_share": 0.0, "pool_width": 1}
    counts = draw_kept("vase-attnv", weights, size, vary, **fields)
    assert_chi_square(counts, exact_set_probabilities(weights, size))


@pytest.mark.parametrize("vary", ["seed", "round"])
def test_random_is_uniform_over_sets(vary):
    counts = draw_kept("random", [1] * 6, 3, vary, num_sinks=0)
    assert_chi_square(counts, exact_set_probabilities([1] * 6, 3))


def test_inclusion_frequencies():
    weights = [1.0, 2.0, 4.0, 8.0]
    fields = {"num_sinks": 0, "protected_share": 0.0, "pool_width": 1}
    counts = draw_kept("vase-attnv", weights, 2, "seed", **fields)
    sets = exact_set_probabilities(weights, 2)
    for item in range(4):
        p = sum(q for s, q in sets.items() if item in s)
        seen = sum(n for s, n in counts.items() if item in s) / DRAWS
        assert abs(seen - p) < 4 * math.sqrt(p * (1 - p) / DRAWS)
