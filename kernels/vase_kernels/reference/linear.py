"""Batch-invariant float32 products and sums.

A BLAS library picks its summation order by shape, batch count and alignment, so one request's
product can differ in the last bit with its neighbours; one bit can flip a kept set for good.
Here every matrix is multiplied by its own call on padded, aligned operands, and sums are
elementwise additions in a fixed order: a row's result depends on that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Rows and depth are padded to multiples of this many float32 (64 bytes), which keeps every
#: matrix of a batch aligned alike.
_ALIGN = 16
#: Fewest rows: below it BLAS falls back to vector kernels, whose order depends on alignment.
_MIN_ROWS = 32


def _padded(x: Tensor) -> Tensor:
    """`x` [..., rows, depth] as contiguous float32, zero-padded; zeros add exactly nothing."""
    rows, depth = x.shape[-2:]
    more_rows = max(_MIN_ROWS, rows + -rows % _ALIGN) - rows
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    more_depth = -depth % _ALIGN
    return F.pad(x, (0, more_depth, 0, more_rows)) if more_depth or more_rows else x


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """All inner products of rows, `a @ b.mT`, one BLAS call per leading index.

    Parameters
    ----------
    a : Tensor [..., m, d]
        Any float dtype.
    b : Tensor [..., n, d]
        Any float dtype, the same leading dimensions as `a`.

    Returns
    -------
    Tensor [..., m, n]
        float32, a view of a fresh tensor.
    """
    m, n = a.shape[-2], b.shape[-2]
    a, b = _padded(a), _padded(b)
    out = a.new_empty(*a.shape[:-1], b.shape[-2])
    lefts, rights, products = (x.flatten(0, -3) for x in (a, b.mT, out))
    for i in range(len(products)):
        torch.mm(lefts[i], rights[i], out=products[i])
    return out[..., :m, :n]


def fold_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim` by halving: second half onto first half, an odd last item onto item 0.

    Overwrites `x`.
    """
    size = x.shape[dim]
    while size > 1:
        half = size // 2
        x.narrow(dim, 0, half).add_(x.narrow(dim, half, half))
        if size % 2:
            x.select(dim, 0).add_(x.select(dim, size - 1))
        size = half
    return x.select(dim, 0)
