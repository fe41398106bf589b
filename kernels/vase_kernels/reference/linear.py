"""Batch-invariant float32 products and sums.

A BLAS library picks its summation order by shape, batch count and alignment, so one request's
product can differ in the last bit with its neighbours; one bit can flip a kept set for good.
Here every matrix is multiplied as if by its own call on padded, aligned operands, and sums are
elementwise additions in a fixed order: a row's result depends on that row alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

#: Rows and depth are padded to multiples of this many float32 (64 bytes), which keeps every
#: matrix of a batch aligned alike.
_ALIGN = 16
#: Fewest rows: below it BLAS falls back to vector kernels, whose order depends on alignment.
_MIN_ROWS = 32
#: Matrices multiplied by one call, if a trial shows the bits of one at a time.
_AT_ONCE = 4


def _padded(x: Tensor) -> Tensor:
    """`x` [..., rows, depth] as contiguous float32, zero-padded; zeros add exactly nothing."""
    rows, depth = x.shape[-2:]
    more_rows = max(_MIN_ROWS, rows + -rows % _ALIGN) - rows
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    more_depth = -depth % _ALIGN
    return F.pad(x, (0, more_depth, 0, more_rows)) if more_depth or more_rows else x


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """All inner products of rows, `a @ b.mT`, with the bits of one BLAS call per leading index.

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
    done = 0
    if len(products) >= _AT_ONCE and _may_share_a_call(lefts, rights):
        for done in range(_AT_ONCE, len(products) + 1, _AT_ONCE):
            some = slice(done - _AT_ONCE, done)
            torch.bmm(lefts[some], rights[some], out=products[some])
    for i in range(done, len(products)):
        torch.mm(lefts[i], rights[i], out=products[i])
    return out[..., :m, :n]


def _may_share_a_call(lefts: Tensor, rights: Tensor) -> bool:
    """Whether `_AT_ONCE` matrices of this shape get the same bits from one call as from many."""
    _, rows, depth = lefts.shape
    return not lefts.is_cuda and _trial(rows, depth, rights.shape[-1], torch.get_num_threads())


@functools.lru_cache(maxsize=4096)
def _trial(rows: int, depth: int, columns: int, threads: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    lefts = torch.randn(_AT_ONCE, rows, depth, generator=generator)
    rights = torch.randn(_AT_ONCE, columns, depth, generator=generator).mT
    alone = torch.stack([torch.mm(*pair) for pair in zip(lefts, rights, strict=True)])
    return torch.equal(torch.bmm(lefts, rights), alone)


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
