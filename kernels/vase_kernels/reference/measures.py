"""What policies measure of the candidates' rows. Every value depends on its own request, layer and
head only, down to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vase_kernels.reference.candidates import Candidates, Layers
from vase_kernels.reference.linear import fold_sum, row_products
from vase_kernels.reference.philox import normal_pair

#: Rows are measured in pieces of this many float32; the result does not depend on it.
_SCRATCH_FLOATS = 1 << 20


def _pieces(
    c: Candidates, layers: Layers, floats: int | None = None
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Cut requests and layers into pieces whose float32 scratch stays in cache.

    floats: scratch of one layer of one request; None: its rows. Yields the piece's requests and
    layers, and its rows [n, l, H, C, D].
    """
    requests, num_layers = c.positions.shape[:2]
    first = layers[0]  # to gather a layer is work, so once
    floats = floats or first[0].numel()
    layers_at_once = max(1, _SCRATCH_FLOATS // (floats * requests))
    requests_at_once = max(1, _SCRATCH_FLOATS // floats)
    for layer in range(0, num_layers, layers_at_once):
        group = range(layer, min(layer + layers_at_once, num_layers))
        rows = [layers[i] if i else first for i in group]
        stacked = torch.stack(rows, dim=1) if len(rows) > 1 else rows[0][:, None]
        for request in range(0, requests, requests_at_once):
            some = slice(request, request + requests_at_once)
            yield (some, slice(group.start, group.stop)), stacked[some]


def value_range(c: Candidates, values: Layers) -> Tensor:
    """max - min over head_dim, float32 [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for piece, rows in _pieces(c, values):
        rows = rows.to(torch.float32)
        out[piece] = rows.amax(-1).sub_(rows.amin(-1))
    return out


def attention(c: Candidates, queries: Tensor, keys: Layers) -> Tensor:
    """Mean attention of a group's queries on each candidate, float32 [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    heads, num_candidates = out.shape[2:]
    query_heads, window, dim = queries.shape[2:]
    scale = dim**-0.5 if c.attention_scale is None else c.attention_scale
    for piece, rows in _pieces(c, keys, query_heads * window * num_candidates):
        # The query heads of a group one after another: [n, l, H, group * W, D].
        q = queries[piece].reshape(*rows.shape[:2], heads, -1, dim)
        scores = row_products(q, rows).mul_(scale)
        probability = torch.softmax(scores, dim=-1, out=scores)  # fresh pages would cost more
        out[piece] = fold_sum(probability, -2).div_(q.shape[-2])
    return out


def pooled(x: Tensor, width: int) -> Tensor:
    """Average over `width` neighbouring columns, zeros outside, always divided by `width`."""
    if width == 1:
        return x
    padded = torch.nn.functional.pad(x, (width // 2, width // 2))
    return fold_sum(padded.unfold(-1, width, 1).clone(), -1) / width


def gaussian(c: Candidates, round: Tensor, rows: int, columns: int) -> Tensor:
    """Standard normals [N, L, H, rows, columns]: flat item e is normal e % 4 of counter e // 4.

    `round` [N] is the round word of the counter.
    """
    calls = torch.arange(-(-rows * columns // 4), device=c.positions.device)
    w0, w1, w2, w3 = c.words(calls, round)
    normals = torch.stack((*normal_pair(w0, w1), *normal_pair(w2, w3)), dim=-1)
    flat = normals.flatten(-2)[..., : rows * columns]
    return flat.reshape(*flat.shape[:-1], rows, columns)


def energy(c: Candidates, layers: Layers, projection: Tensor) -> Tensor:
    """Squared norm of every row times its layer's `projection` [N, L, H, D, J], [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for piece, rows in _pieces(c, layers):
        out[piece] = fold_sum(row_products(rows, projection[piece].mT).square_(), -1)
    return out


def squared_norm(c: Candidates, layers: Layers) -> Tensor:
    """Squared L2 norm of every row, float32 [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for piece, rows in _pieces(c, layers):
        out[piece] = fold_sum(rows.to(torch.float32).square(), -1)
    return out


def mean_similarity(c: Candidates, layers: Layers) -> Tensor:
    """Sum of a row's cosine similarities with the other candidates / C, float32 [N, L, H, C].

    Linear in C: for unit rows u and s their sum, the sum over j != i of u_i.u_j is u_i.s - u_i.u_i.
    """
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for piece, rows in _pieces(c, layers):
        rows = rows.to(torch.float32)
        norm = fold_sum(rows.square(), -1).sqrt_()
        unit = rows / (norm + 1e-8)[..., None]
        total = fold_sum(unit.clone(), -2)[..., None, :]
        similarity = fold_sum(unit * total, -1)
        out[piece] = similarity.sub_(fold_sum(unit.square_(), -1))
    return out.div_(out.shape[-1])
