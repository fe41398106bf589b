"""What policies measure of the candidates' rows. Every value depends on its own request, layer and
head only, down to the last bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vase_kernels.reference.candidates import Candidates, Layers
from vase_kernels.reference.linear import fold_sum, row_products
from vase_kernels.reference.philox import normal_pair

#: Rows are measured in chunks of this many float32; the result does not depend on it.
_SCRATCH_FLOATS = 1 << 18


def _chunks(floats_per_request: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors along the requests so that a chunk's float32 scratch stays in cache."""
    step = max(1, _SCRATCH_FLOATS // floats_per_request)
    for start in range(0, tensors[0].shape[0], step):
        yield tuple(x[start : start + step] for x in tensors)


def value_range(c: Candidates, values: Layers) -> Tensor:
    """max - min over head_dim, float32 [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for layer in range(out.shape[1]):
        rows = values[layer]
        for x, difference in _chunks(rows[0].numel(), rows, out[:, layer]):
            x = x.to(torch.float32)
            difference.copy_(x.amax(-1)).sub_(x.amin(-1))
    return out


def attention(c: Candidates, queries: Tensor, keys: Layers) -> Tensor:
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
    for layer in range(out.shape[1]):
        rows, g = layers[layer], projection[:, layer].mT
        for x, columns, squares in _chunks(rows[0].numel(), rows, g, out[:, layer]):
            squares.copy_(fold_sum(row_products(x, columns).square_(), -1))
    return out


def squared_norm(c: Candidates, layers: Layers) -> Tensor:
    """Squared L2 norm of every row, float32 [N, L, H, C]."""
    out = torch.empty(c.positions.shape, device=c.positions.device)
    for layer in range(out.shape[1]):
        rows = layers[layer]
        for x, squares in _chunks(rows[0].numel(), rows, out[:, layer]):
            squares.copy_(fold_sum(x.to(torch.float32).square(), -1))
    return out


def mean_similarity(c: Candidates, layers: Layers) -> Tensor:
    """Sum of a row's cosine similarities with the other candidates / C, float32 [N, L, H, C].

    Linear in C: for unit rows u and s their sum, the sum over j != i of u_i.u_j is u_i.s - u_i.u_i.
    """
    out = torch.empty(c.positions.shape, device=c.positions.device)
    num_candidates = out.shape[-1]
    for layer in range(out.shape[1]):
        rows = layers[layer]
        for x, similarity in _chunks(rows[0].numel(), rows, out[:, layer]):
            x = x.to(torch.float32)
            norm = fold_sum(x.square(), -1).sqrt_()
            unit = x / (norm + 1e-8)[..., None]
            total = fold_sum(unit.clone(), -2)[..., None, :]
            similarity.copy_(fold_sum(unit * total, -1)).sub_(fold_sum(unit.square_(), -1))
    return out.div_(num_candidates)
