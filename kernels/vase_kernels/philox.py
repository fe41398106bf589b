"""Philox4x32-10 as Triton device functions: the bits of `reference/philox.py`, in registers."""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.requests import SEED, field


@triton.jit
def philox4x32(k0, k1, c0, c1, c2, c3):
    """Ten rounds on uint32 words: key (k0, k1), counter (c0, c1, c2, c3), all one shape."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        low0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        low1 = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def words(requests, n, layer, head, round, last):
    """The four words at counter (layer, head, round, last) under the request's seed.

    layer, head: global indices. round: a scalar. last: a block of ints in [0, 2**32).
    """
    c3 = last.to(tl.uint32)
    zero = c3 * 0
    seed = field(requests, n, SEED)
    return philox4x32(
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
        zero + layer.to(tl.uint32),
        zero + head.to(tl.uint32),
        zero + round.to(tl.uint32),
        c3,
    )


@triton.jit
def uniform(word):
    """float32 in (0, 1): the middle of one of 2**23 equal cells. Exact on every device."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def gumbel(word):
    """Standard Gumbel draw in float32; equal to the reference up to the device's `log`."""
    return -tl.log(-tl.log(uniform(word)))


@triton.jit
def normal(radius_word, angle_word, second):
    """One of the two normals of a Box-Muller pair: r cos(2 pi u), or r sin where `second`.

    The quadrant of u is exact, so two polynomials on [-pi/4, pi/4] suffice; they differ from the
    reference's cos and sin by less than 4e-7. The general functions would reserve local memory
    for angles that never occur.
    """
    radius = tl.sqrt(-2.0 * tl.log(uniform(radius_word)))
    turns = 4.0 * uniform(angle_word)
    quarter = tl.floor(turns + 0.5)
    x = (turns - quarter) * 1.5707963267948966
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = (
        1.0
        - 0.5 * z
        + z * z * (4.166664568298827e-2 + z * (2.443315711809948e-5 * z - 1.388731625493765e-3))
    )
    quadrant = quarter.to(tl.int32) + tl.where(second, 0, 1)  # cos a = sin(a + a quarter turn)
    value = tl.where(quadrant % 2 == 1, cosine, sine)
    return radius * tl.where(quadrant % 4 >= 2, -value, value)
