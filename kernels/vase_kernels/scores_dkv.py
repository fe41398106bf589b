"""Retention keys of vase-dkv and curdkv: ||kG||^2 * ||vG||^2, the Gaussian G drawn in registers.

G never touches memory: a program draws it once and multiplies its share of the columns by it.
Rows keep their 16 bits for the tensor cores, and G is split into parts of their type that add up
to it (three of bfloat16, two of float16, which holds float8 exactly), so products are as exact as
float32 ones. float32 rows take three TF32 products. Against the reference, keys differ by
rounding, about 1e-5 relative.

Bytes, floor: K and V of the candidates once (2 * C * head_dim * element size a head), and that is
what is read; 4 bytes a column are written.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.philox import normal, words
from vase_kernels.requests import (
    LENGTH,
    NUM_SINKS,
    OF_THE_BATCH,
    PROJECTION_DIM,
    ROUND,
    WINDOW,
    field,
    positions_of,
    rows_of,
)
from vase_kernels.select import order_of

_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _gaussian(
    requests,
    n,
    layer,
    head,
    round,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """G [BLOCK_D, BLOCK_J] float32, zero outside; item e of it is normal e % 4 of counter e // 4.

    layer, head: global indices.
    """
    projection = field(requests, n, PROJECTION_DIM).to(tl.int32)
    row, column = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_J)[None, :]
    item = row * projection + column
    w0, w1, w2, w3 = words(requests, n, layer, head, round, item // 4)
    second_pair = item % 4 >= 2
    normals = normal(
        tl.where(second_pair, w2, w0), tl.where(second_pair, w3, w1), second=item % 2 == 1
    )
    return tl.where((row < HEAD_DIM) & (column < projection), normals, 0.0)


@triton.jit
def _energy(rows, high, middle, low, projection, BLOCK_J: tl.constexpr, PART: tl.constexpr):
    """Squared norm of each row's projection by the parts of G."""
    products = tl.dot(rows, high, input_precision="tf32x3")
    if tl.float32 != PART:
        rest = tl.dot(rows, middle)
        if tl.bfloat16 == PART:
            rest = tl.dot(rows, low, rest)
        # The parts of an infinite product may cancel to NaN; its sign is that of the first.
        products += tl.where(tl.abs(products) < float("inf"), rest, 0.0)
    real = tl.arange(0, BLOCK_J)[None, :] < projection  # padding may be inf * 0
    return tl.sum(tl.where(real, products * products, 0.0), 1)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def dkv_kernel(
    order,
    k_pointers,
    v_pointers,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    first_head,
    ELEMENT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PART: tl.constexpr,
    DOT: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the order of each candidate's energy; sinks get +inf, NaN counts as -inf.

    Grid (split, layers * HEADS, requests); the programs of a head share its columns.

    PART : type of the parts of G
    DOT : type of the products' operands: PART, where the backend can multiply it
    FIXED : curdkv: G of round 0, which no round has; else a fresh one each round
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    projection = field(requests, n, PROJECTION_DIM)
    at = n * tl.num_programs(1) + place
    k = tl.load(k_pointers + layer).to(tl.pointer_type(ELEMENT))
    v = tl.load(v_pointers + layer).to(tl.pointer_type(ELEMENT))
    depth = tl.arange(0, BLOCK_D)[None, :]
    round = field(requests, n, ROUND)
    if FIXED:
        round = round * 0
    gaussian = _gaussian(requests, n, layer, first_head + head, round, HEAD_DIM, BLOCK_D, BLOCK_J)
    high = gaussian.to(PART)
    middle = (gaussian - high.to(tl.float32)).to(PART)
    low = (gaussian - high.to(tl.float32) - middle.to(tl.float32)).to(PART).to(DOT)
    high = high.to(DOT)
    middle = middle.to(DOT)
    for start in range(part * BLOCK, candidates, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        keys = rows_of(
            k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        )
        values = rows_of(
            v, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        )
        key = _energy(keys.to(DOT), high, middle, low, projection, BLOCK_J, PART)
        key *= _energy(values.to(DOT), high, middle, low, projection, BLOCK_J, PART)
        # +inf is reserved for forced tokens. A comparison keeps NaN, which `order_of` places.
        key = tl.where(key > _FLOAT32_MAX, _FLOAT32_MAX, key)
        positions = positions_of(
            columns,
            inside,
            requests,
            n,
            layer,
            head,
            req_to_token,
            context,
            store,
            num_slots,
            HEADS,
        )
        key = tl.where(positions < field(requests, n, NUM_SINKS), float("inf"), key)
        tl.store(order + at * max_columns + columns, order_of(key), mask=inside)
