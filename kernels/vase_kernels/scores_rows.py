"""Keys that are one number of one row: the value range, and the key norm of knorm.

The value range is what evict-largest-values evicts and what vase-attnv protects. It is read here
rather than cached at write time: a cache takes 4 bytes a token and head from the KV pool, which
costs as many tokens per second as the read (docs/performance.md has the sum). Value ranges equal
the reference bit for bit, norms up to rounding.

Bytes: V or K of the candidates once (C * head_dim * element size a head), 4 written a column.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.requests import (
    LENGTH,
    NUM_SINKS,
    OF_THE_BATCH,
    WINDOW,
    field,
    positions_of,
    rows_of,
)
from vase_kernels.select import order_of

#: Above every float's image among the integers, and itself a NaN's bits.
_NAN = tl.constexpr(0x7FFFFFFF)


@triton.constexpr_function
def _log2(power: int) -> int:
    return power.bit_length() - 1


@triton.jit
def _neighbours(x):
    """Columns [rows, columns / 2] of even and of odd number."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _range_of(rows, real, NEIGHBOURS: tl.constexpr):
    """Maximum minus minimum of each row of [rows, columns]; NaN if it has one, or none but one inf.

    real : [1, columns], which columns count
    NEIGHBOURS : power of two, columns that one thread loads together. They are compared in its
        registers by maxima that keep NaN; of what is left, threads exchange integers that order
        like the floats do, NaN on top, for an exchange costs as much as several comparisons.
    """
    high = tl.where(real, rows, float("-inf"))
    low = tl.where(real, rows, float("inf"))
    for _ in tl.static_range(_log2(NEIGHBOURS)):
        left, right = _neighbours(high)
        high = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
        left, right = _neighbours(low)
        low = tl.minimum(left, right)
    bits = high.to(tl.int32, bitcast=True)
    bits = tl.where(high != high, _NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    top = tl.max(bits, 1)
    highest = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return highest - tl.min(low, 1)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def ranges_kernel(
    order,
    v_pointers,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    ELEMENT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the order of minus each candidate's value range.

    Grid (split, layers * HEADS, requests).

    KEYS : these are the keys of evict-largest-values: sinks get +inf, an undefined range counts
        as -inf. Else vase-attnv ranks by them what it protects: sinks first, undefined last.
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    depth = tl.arange(0, BLOCK_D)[None, :]
    at = n * tl.num_programs(1) + place
    v = tl.load(v_pointers + layer).to(tl.pointer_type(ELEMENT))
    for start in range(part * BLOCK, candidates, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        rows = rows_of(
            v, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        ).to(tl.float32)
        value_range = _range_of(rows, depth < HEAD_DIM, 128 // ELEMENT.primitive_bitwidth)
        undefined = value_range != value_range
        first = float("inf") if KEYS else float("-inf")
        key = tl.where(undefined, -first, -value_range)
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
        key = tl.where(positions < field(requests, n, NUM_SINKS), first, key)
        tl.store(order + at * max_columns + columns, order_of(key), mask=inside)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def norms_kernel(
    order,
    k_pointers,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    ELEMENT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the order of minus each key's squared norm; sinks get +inf, NaN counts as -inf.

    Grid (split, layers * HEADS, requests).
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    depth = tl.arange(0, BLOCK_D)[None, :]
    at = n * tl.num_programs(1) + place
    k = tl.load(k_pointers + layer).to(tl.pointer_type(ELEMENT))
    for start in range(part * BLOCK, candidates, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        rows = rows_of(
            k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        ).to(tl.float32)
        key = -tl.sum(rows * rows, 1)
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
