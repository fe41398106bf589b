"""The smallest keys of a row without sorting it: radix select, ties by lower token position.

A key is kept as the int32 that orders like its float does. With the token position below it, it
forms one int64 per column, distinct within a row; a selection is then a single such number, the
largest selected. NaN counts as -inf and -0.0 as 0.0, as in `reference/order.py`.

Bytes: at most 4 reads of 4 bytes a column (8 KiB for 2048 columns: cache hits after the first),
8 where keys tie across the edge. No row is too long: blocks are looped over.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.requests import (
    BUDGET,
    LENGTH,
    NUM_PROTECTED,
    OF_THE_BATCH,
    WINDOW,
    field,
    positions_of,
)

_INT32_MIN = tl.constexpr(-(2**31))
_INF_ORDER = tl.constexpr(0x7F800000)
_NO_COLUMN = tl.constexpr(-(2**63))


@triton.jit
def order_of(key):
    """int32 image of float32 keys that orders like the floats do."""
    key = tl.where(key != key, float("-inf"), key)
    key = tl.where(key == 0.0, 0.0, key)
    bits = key.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def packed(order, positions):
    """int64 that orders by key, then by token position."""
    return (order.to(tl.int64) << 32) | positions.to(tl.int64)


@triton.jit
def _digit_of_rank(counts, rank):
    """The digit that holds the `rank`-th item (from 1), items below it, items that share it."""
    digits = tl.arange(0, 256)
    upto = tl.cumsum(counts, 0)
    below = upto - counts
    chosen = (below < rank) & (rank <= upto)
    return (
        tl.sum(tl.where(chosen, digits, 0)),
        tl.sum(tl.where(chosen, below, 0)),
        tl.sum(tl.where(chosen, counts, 0)),
    )


@triton.jit(do_not_specialize=OF_THE_BATCH)
def select_kernel(
    order,
    edges,
    faults,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    VICTIMS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the largest selected `packed` of each row to `edges`. Grid (layers * HEADS, requests).

    order : int32 [requests, layers * HEADS, max_columns], the row's keys
    edges : int64 [requests, layers * HEADS]
    faults : int32 [requests], counts rows whose victims include a forced token
    VICTIMS : select `length - budget` victims; else the `num_protected` of vase-attnv
    """
    place, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    if VICTIMS:
        rank = (length - field(requests, n, BUDGET)).to(tl.int32)
    else:
        rank = tl.minimum(field(requests, n, NUM_PROTECTED).to(tl.int32), candidates)
    at = n * tl.num_programs(0) + place
    if rank == 0:
        tl.store(edges + at, _NO_COLUMN)
        return
    row = order + at * max_columns

    # Digit by digit from the top: keys as unsigned, so that digits order like the keys.
    prefix = tl.zeros([], tl.uint32)
    tied = candidates
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for start in range(0, candidates, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < candidates
            key = (tl.load(row + columns, mask=inside, other=0) ^ _INT32_MIN).to(
                tl.uint32, bitcast=True
            )
            if step > 0:
                inside = inside & (((key ^ prefix) >> (shift + 8)) == 0)
            digits = ((key >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digits, 256, mask=inside)
        digit, below, tied = _digit_of_rank(counts, rank)
        prefix = prefix | (digit.to(tl.uint32) << shift)
        rank = rank - below
    edge = prefix.to(tl.int32, bitcast=True) ^ _INT32_MIN

    # `tied` columns hold the edge key and `rank` of them are selected.
    position = tl.full([], 0x7FFFFFFF, tl.uint32)
    if rank < tied:
        position = tl.zeros([], tl.uint32)
        for step in tl.static_range(4):
            shift = 24 - 8 * step
            counts = tl.zeros([256], tl.int32)
            for start in range(0, candidates, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < candidates
                inside = inside & (tl.load(row + columns, mask=inside, other=0) == edge)
                place_of = positions_of(
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
                ).to(tl.uint32)
                if step > 0:
                    inside = inside & (((place_of ^ position) >> (shift + 8)) == 0)
                digits = ((place_of >> shift) & 255).to(tl.int32)
                counts += tl.histogram(digits, 256, mask=inside)
            digit, below, _ = _digit_of_rank(counts, rank)
            position = position | (digit.to(tl.uint32) << shift)
            rank = rank - below
    tl.store(edges + at, packed(edge, position))
    if VICTIMS:  # noqa: SIM102 - one is decided at compile time
        if edge >= _INF_ORDER:
            tl.atomic_add(faults + n, 1)
