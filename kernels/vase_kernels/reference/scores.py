"""Retention keys: what each policy thinks of each candidate. Larger means keep.

A scorer takes `Candidates` and its policy's own fields and returns float32
[requests, layers, kv_heads, candidates]. Every value depends on its own request, layer and head
only, down to the last bit. Forced tokens hold +inf, nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vase_kernels.reference.linear import fold_sum, row_products
from vase_kernels.reference.order import smallest
from vase_kernels.reference.philox import Words, gumbel, normal_pair, philox4x32, seed_key, uniform

#: Rows are scored in chunks of this many float32; the result does not depend on it.
_SCRATCH_FLOATS = 1 << 18


class Layers(Protocol):
    """Rows by layer: a tuple of tensors, or something that gathers a layer when asked for it."""

    def __getitem__(self, layer: int, /) -> Tensor: ...


class Candidates(NamedTuple):
    """The tokens a round may evict, of N requests, L layers, H KV heads, C candidates each.

    keys, values : Layers or None
        Tensor [N, H, C, D] for each of the L layers, any float dtype; None where the policy does
        not read them. A tensor x [N, L, H, C, D] is given as `x.unbind(1)`.
    queries : Tensor [N, L, Hq, W, D] or None
        Post-RoPE queries of the window; query head h reads KV head h // (Hq // H).
    positions : int64 Tensor [N, L, H, C]
        Token positions, distinct within a head, below 2**31.
    seed, round : int64 Tensor [N]
        Eviction seed (63 bits) and round number, counted from 1.
    layers : int64 Tensor [L]
    heads : int64 Tensor [H]
        Global indices, so that a draw does not depend on which rank owns the head.
    """

    keys: Layers | None
    values: Layers | None
    queries: Tensor | None
    positions: Tensor
    seed: Tensor
    round: Tensor
    layers: Tensor
    heads: Tensor

    def words(self, last: Tensor) -> Words:
        """Philox words at counter (layer, head, round, `last`), `last` [..., K] -> [N, L, H, K]."""
        k0, k1 = seed_key(self.seed[:, None, None, None])
        counter = (
            self.layers[None, :, None, None],
            self.heads[None, None, :, None],
            self.round[:, None, None, None],
            last,
        )
        return philox4x32((k0, k1), counter)


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
    k without replacement. weight = softmax of q.k / sqrt(D) over the candidates, averaged over
    the window's queries and the query heads of the group, then average-pooled over `pool_width`
    columns (zeros outside).
    """
    assert c.keys is not None and c.values is not None and c.queries is not None
    value_range = _range(c, c.values).nan_to_num_(nan=-torch.inf, posinf=torch.inf)
    value_range.masked_fill_(c.positions < num_sinks, torch.inf)
    count = min(int(budget * protected_share), value_range.shape[-1])
    protected = smallest(-value_range, c.positions, count)

    weight = _pooled(_attention(c, c.queries, c.keys), pool_width)
    key = torch.log(weight) + gumbel(c.words(c.positions)[0])
    key.scatter_(-1, protected, torch.inf)
    return _force(key, c.positions, num_sinks)


def vase_dkv(c: Candidates, *, budget: int, num_sinks: int = 4, projection_dim: int = 20) -> Tensor:
    """VaSE-DKV (arXiv 2606.03928): ||kG||^2 * ||vG||^2 with a fresh Gaussian G each round."""
    assert c.keys is not None and c.values is not None
    projection = _gaussian(c, c.keys[0].shape[-1], projection_dim)
    energy = _energy(c, c.keys, projection).mul_(_energy(c, c.values, projection))
    energy.clamp_(max=torch.finfo(torch.float32).max)  # +inf is reserved for forced tokens
    return _force(energy, c.positions, num_sinks)


def random(c: Candidates, *, budget: int, num_sinks: int = 4) -> Tensor:
    """Random Attention (arXiv 2609.03430): uniform in (0, 1), exact on every device."""
    return _force(uniform(c.words(c.positions)[0]), c.positions, num_sinks)


def streaming(c: Candidates, *, budget: int, num_sinks: int = 4) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): the token position, so the oldest go first."""
    return _force(c.positions.to(torch.float32), c.positions, num_sinks)


class Scorer(NamedTuple):
    """A policy's scoring function and what it reads of the candidates."""

    score: Callable[..., Tensor]
    reads_rows: bool
    reads_queries: bool


SCORERS = {
    "vase-attnv": Scorer(vase_attnv, reads_rows=True, reads_queries=True),
    "vase-dkv": Scorer(vase_dkv, reads_rows=True, reads_queries=False),
    "random": Scorer(random, reads_rows=False, reads_queries=False),
    "streaming": Scorer(streaming, reads_rows=False, reads_queries=False),
}


def _chunks(floats_per_request: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors along the requests so that a chunk's float32 scratch stays in cache."""
    step = max(1, _SCRATCH_FLOATS // floats_per_request)
    for start in range(0, tensors[0].shape[0], step):
        yield tuple(x[start : start + step] for x in tensors)


def _range(c: Candidates, values: Layers) -> Tensor:
    """max - min over head_dim, float32 [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for layer in range(out.shape[1]):
        rows = values[layer]
        for x, difference in _chunks(rows[0].numel(), rows, out[:, layer]):
            x = x.to(torch.float32)
            difference.copy_(x.amax(-1)).sub_(x.amin(-1))
    return out


def _attention(c: Candidates, queries: Tensor, keys: Layers) -> Tensor:
    """Mean attention of a group's queries on each candidate, float32 [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    requests, num_layers, heads, num_candidates = out.shape
    for layer in range(num_layers):
        k, dim = keys[layer], queries.shape[-1]
        # The query heads of a group one after another: [N, H, group * W, D].
        q = queries[:, layer].reshape(requests, heads, -1, dim)
        scratch = heads * q.shape[2] * num_candidates
        for rows, columns, mean in _chunks(scratch, q, k, out[:, layer]):
            probability = torch.softmax(row_products(rows, columns).mul_(dim**-0.5), dim=-1)
            mean.copy_(fold_sum(probability, -2)).div_(q.shape[2])
    return out


def _pooled(x: Tensor, width: int) -> Tensor:
    """Average over `width` neighbouring columns, zeros outside, always divided by `width`."""
    if width == 1:
        return x
    padded = torch.nn.functional.pad(x, (width // 2, width // 2))
    return fold_sum(padded.unfold(-1, width, 1).clone(), -1) / width


def _gaussian(c: Candidates, rows: int, columns: int) -> Tensor:
    """Standard normals [N, L, H, rows, columns]: flat item e is normal e % 4 of counter e // 4."""
    calls = torch.arange(-(-rows * columns // 4), device=c.positions.device)
    w0, w1, w2, w3 = c.words(calls)
    normals = torch.stack((*normal_pair(w0, w1), *normal_pair(w2, w3)), dim=-1)
    flat = normals.flatten(-2)[..., : rows * columns]
    return flat.reshape(*flat.shape[:-1], rows, columns)


def _energy(c: Candidates, layers: Layers, projection: Tensor) -> Tensor:
    """Squared norm of every row times its layer's `projection` [N, L, H, D, J], [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for layer in range(out.shape[1]):
        rows, g = layers[layer], projection[:, layer].mT
        for x, columns, energy in _chunks(rows[0].numel(), rows, g, out[:, layer]):
            energy.copy_(fold_sum(row_products(x, columns).square_(), -1))
    return out


def _force(key: Tensor, positions: Tensor, num_sinks: int) -> Tensor:
    """Give the sinks, token positions below `num_sinks`, the key +inf."""
    return key.masked_fill_(positions < num_sinks, torch.inf)
