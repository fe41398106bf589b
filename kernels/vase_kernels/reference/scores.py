"""Retention keys: what each policy thinks of each candidate. Larger means keep.

A scorer takes `Candidates` and its policy's own fields and returns float32
[requests, layers, kv_heads, candidates]. Every value depends on its own request, layer and head
only, down to the last bit. Forced tokens hold +inf, nothing else does.

NaN is allowed and counts as -inf in a selection, so what is undefined goes first. A NaN in a row
makes that candidate's norm, energy or value range undefined; attention and similarity relate all
candidates of a head, so there it makes all of the head's keys undefined, and the lowest token
positions go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vase_kernels.reference.candidates import Candidates
from vase_kernels.reference.measures import (
    attention,
    energy,
    gaussian,
    mean_similarity,
    pooled,
    squared_norm,
    value_range,
)
from vase_kernels.reference.order import smallest
from vase_kernels.reference.philox import gumbel, uniform


def vase_attnv(
    c: Candidates,
    *,
    budget: int,
    num_sinks: int = 4,
    protected_share: float = 0.25,
    pool_width: int = 5,
) -> Tensor:
    """VaSE-AttnV (arXiv 2606.03928): protect large value ranges, draw the rest by attention.

    Protected: the `int(budget * protected_share)` candidates of largest value range (max - min
    over head_dim), sinks ranking first. The rest: log(weight) + Gumbel, whose top k is a draw of
    k without replacement. weight = softmax of the model's logits (q.k by its scale) over the
    candidates, averaged over the window's queries and the query heads of the group, then
    average-pooled over `pool_width` columns (zeros outside).
    """
    assert c.keys is not None and c.values is not None and c.queries is not None
    ranges = value_range(c, c.values).nan_to_num_(nan=-torch.inf, posinf=torch.inf)
    ranges.masked_fill_(c.positions < num_sinks, torch.inf)
    count = min(int(budget * protected_share), ranges.shape[-1])
    protected = smallest(-ranges, c.positions, count)

    weight = pooled(attention(c, c.queries, c.keys), pool_width)
    key = torch.log(weight) + gumbel(c.words(c.positions)[0])
    key.scatter_(-1, protected, torch.inf)
    return _force(key, c.positions, num_sinks)


def snapkv(c: Candidates, *, budget: int, num_sinks: int = 0, pool_width: int = 5) -> Tensor:
    """SnapKV (arXiv 2404.14469) at decode time: the weight of `vase_attnv` itself, no draw."""
    assert c.keys is not None and c.queries is not None
    weight = pooled(attention(c, c.queries, c.keys), pool_width)
    return _force(weight, c.positions, num_sinks)


def rkv(
    c: Candidates,
    *,
    budget: int,
    num_sinks: int = 0,
    pool_width: int = 5,
    mix_lambda: float = 0.1,
) -> Tensor:
    """R-KV (arXiv 2505.24133): `mix_lambda` * importance - (1 - `mix_lambda`) * redundancy.

    importance: the weight of `vase_attnv`. redundancy: softmax over the candidates of
    `mean_similarity` of their keys. This is R-KV as the authors of VaSE compare with it
    (`attn_rkv` in their code): beside R-KV's own code it averages where that takes a maximum
    (over the query group and over neighbouring columns), and a similarity counts whatever its
    size and however recent the token, for the tokens that R-KV spares lie in the window.
    """
    assert c.keys is not None and c.queries is not None
    importance = pooled(attention(c, c.queries, c.keys), pool_width)
    redundancy = torch.softmax(mean_similarity(c, c.keys), dim=-1)
    key = importance.mul_(mix_lambda).sub_(redundancy.mul_(1 - mix_lambda))
    return _force(key, c.positions, num_sinks)


def vase_dkv(c: Candidates, *, budget: int, num_sinks: int = 4, projection_dim: int = 20) -> Tensor:
    """VaSE-DKV (arXiv 2606.03928): ||kG||^2 * ||vG||^2 with a fresh Gaussian G each round."""
    return _projected_energy(c, c.round, num_sinks, projection_dim)


def curdkv(c: Candidates, *, budget: int, num_sinks: int = 4, projection_dim: int = 20) -> Tensor:
    """CurDKV (arXiv 2509.15038): as `vase_dkv`, but all rounds of a request share one G.

    G is that of round 0, which no round has: one per layer and head.
    """
    return _projected_energy(c, torch.zeros_like(c.round), num_sinks, projection_dim)


def knorm(c: Candidates, *, budget: int, num_sinks: int = 0) -> Tensor:
    """Low key norms stay (arXiv 2406.11430): -||k||^2, which ranks as -||k|| does."""
    assert c.keys is not None
    return _force(squared_norm(c, c.keys).neg_(), c.positions, num_sinks)


def evict_largest_values(c: Candidates, *, budget: int, num_sinks: int = 0) -> Tensor:
    """Ablation of VaSE (arXiv 2606.03928): minus the value range. What it protects goes first."""
    assert c.values is not None
    return _force(value_range(c, c.values).neg_(), c.positions, num_sinks)


def random(c: Candidates, *, budget: int, num_sinks: int = 4) -> Tensor:
    """Random Attention (arXiv 2609.03430): uniform in (0, 1), exact on every device."""
    return _force(uniform(c.words(c.positions)[0]), c.positions, num_sinks)


def streaming(c: Candidates, *, budget: int, num_sinks: int = 4) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): the token position, so the oldest go first."""
    return _force(c.positions.to(torch.float32), c.positions, num_sinks)


class Scorer(NamedTuple):
    """A policy's scoring function and what it reads of the candidates."""

    score: Callable[..., Tensor]
    reads_keys: bool = False
    reads_values: bool = False
    reads_queries: bool = False


SCORERS = {
    "vase-attnv": Scorer(vase_attnv, reads_keys=True, reads_values=True, reads_queries=True),
    "vase-dkv": Scorer(vase_dkv, reads_keys=True, reads_values=True),
    "curdkv": Scorer(curdkv, reads_keys=True, reads_values=True),
    "snapkv": Scorer(snapkv, reads_keys=True, reads_queries=True),
    "rkv": Scorer(rkv, reads_keys=True, reads_queries=True),
    "random": Scorer(random),
    "streaming": Scorer(streaming),
    "knorm": Scorer(knorm, reads_keys=True),
    "evict-largest-values": Scorer(evict_largest_values, reads_values=True),
}


def _projected_energy(c: Candidates, round: Tensor, num_sinks: int, projection_dim: int) -> Tensor:
    """||kG||^2 * ||vG||^2 with the G of `round`."""
    assert c.keys is not None and c.values is not None
    projection = gaussian(c, round, c.keys[0].shape[-1], projection_dim)
    key = energy(c, c.keys, projection).mul_(energy(c, c.values, projection))
    key.clamp_(max=torch.finfo(torch.float32).max)  # +inf is reserved for forced tokens
    return _force(key, c.positions, num_sinks)


def _force(key: Tensor, positions: Tensor, num_sinks: int) -> Tensor:
    """Give the sinks, token positions below `num_sinks`, the key +inf."""
    return key.masked_fill_(positions < num_sinks, torch.inf)
