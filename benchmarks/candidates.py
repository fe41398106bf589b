"""Candidates for a policy of our own, in the torch reference alone. No worker knows them.

    key = mix_lambda * importance - (1 - mix_lambda) * redundancy

importance: each candidate's mean attention (that of `snapkv`) times a weight of its value row, as a
share of the head's sum, average-pooled over columns. redundancy: R-KV's, as `rkv` has it. Sinks are
kept. On top, optionally: VaSE's protection of the largest value ranges, and a draw instead of a
ranking, by key plus its distance to the most redundant candidate.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from vase_kernels.reference import SCORERS, Candidates
from vase_kernels.reference.measures import attention, mean_similarity, pooled, value_range
from vase_kernels.reference.order import smallest
from vase_kernels.reference.philox import gumbel
from vase_kernels.reference.scores import Scorer

from vase_sgl.eviction.policies.base import SinkPolicy

NAME = "candidate"


@dataclasses.dataclass(frozen=True)
class Candidate(SinkPolicy):
    """value_weight: `none`, `l1` (its L1 norm), or `deviation` (its L2 distance from the head's
    mean attention output: what is lost, to first order, if the candidate alone goes)."""

    name: ClassVar[str] = NAME
    needs_queries: ClassVar[bool] = True

    mix_lambda: float = 0.5
    pool_width: int = 5
    value_weight: str = "l1"
    protected_share: float = 0.0
    draw: bool = False


def score(
    c: Candidates,
    *,
    budget: int,
    num_sinks: int,
    mix_lambda: float,
    pool_width: int,
    value_weight: str,
    protected_share: float,
    draw: bool,
) -> Tensor:
    assert c.keys is not None and c.values is not None and c.queries is not None
    weight = attention(c, c.queries, c.keys)
    if value_weight != "none":
        weight = weight * _value_weight(c, weight, value_weight)
        weight /= weight.sum(-1, keepdim=True)
    importance = pooled(weight, pool_width)
    redundancy = torch.softmax(mean_similarity(c, c.keys), dim=-1)
    key = mix_lambda * importance - (1 - mix_lambda) * redundancy
    if draw:
        key += (1 - mix_lambda) * redundancy.amax(-1, keepdim=True)
        key = key.log_().add_(gumbel(c.words(c.positions)[0]))
    sinks = c.positions < num_sinks
    if protected_share:
        ranges = value_range(c, c.values).masked_fill_(sinks, torch.inf)
        protected = smallest(-ranges, c.positions, int(budget * protected_share))
        key.scatter_(-1, protected, torch.inf)
    return key.masked_fill_(sinks, torch.inf)


def _value_weight(c: Candidates, weight: Tensor, kind: str) -> Tensor:
    assert c.values is not None
    if kind not in ("l1", "deviation"):
        raise ValueError(f"value_weight must be none, l1 or deviation, got {kind!r}")
    layers = []
    for layer in range(weight.shape[1]):
        rows = c.values[layer].to(torch.float32)
        if kind == "l1":
            layers.append(rows.abs().sum(-1))
        else:
            output = (weight[:, layer, :, :, None] * rows).sum(-2, keepdim=True)
            layers.append((rows - output).norm(dim=-1))
    return torch.stack(layers, dim=1)


def register() -> None:
    """Make the candidates known to the reference of this process."""
    SCORERS[NAME] = Scorer(score, reads_keys=True, reads_values=True, reads_queries=True)
