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
        real = depth < HEAD_DIM
        high = tl.max(tl.where(real, rows, float("-inf")), 1)
        low = tl.min(tl.where(real, rows, float("inf")), 1)
        # Maxima may drop NaN; a row that holds one has no range.
        undefined = tl.max((rows != rows).to(tl.int32), 1)
        value_range = high - low
        undefined = (undefined == 1) | (value_range != value_range)
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
