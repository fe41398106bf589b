"""Move the recent rows over the victims' rows, in place.

The victims in columns below the budget are holes. In order of token position, the i-th hole takes
the i-th of: the kept candidates in columns from the budget on, then the recent columns. These
sources lie in order of token position already, and none is ever written, so holes and sources are
listed in column order by one kernel and every pair moves independently in the next.

Bytes of a round, per layer and head: window rows of K and V read and written in steady state
(4 * window * head_dim * element size), plus 4 bytes a column of keys and of token positions.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.digest import victim_hashes
from vase_kernels.requests import (
    BUDGET,
    LENGTH,
    LOGICAL_LENGTH,
    OF_THE_BATCH,
    ROUND,
    WINDOW,
    field,
    positions_of,
    slots_of,
)
from vase_kernels.select import packed


@triton.jit(do_not_specialize=OF_THE_BATCH)
def plan_kernel(
    order,
    edges,
    holes,
    sources,
    num_holes,
    round_sums,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    max_pairs,
    first_head,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List holes and sources, add up the digest. Grid (layers * HEADS, requests).

    holes : int64 [requests, layers * HEADS, max_pairs], token position << 32 | column
    sources : int32 [requests, layers * HEADS, max_pairs], columns by token position
    num_holes : int32 [requests, layers * HEADS], also the number of sources
    round_sums : int64 [requests], the victims' hashes are added
    store : in a first round, the positions of the rows that stay are written
    """
    place, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    budget, round = field(requests, n, BUDGET), field(requests, n, ROUND)
    candidates = length - field(requests, n, WINDOW)
    at = n * tl.num_programs(0) + place
    edge = tl.load(edges + at)
    hole_count = tl.zeros([], tl.int32)
    source_count = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.int64)
    for start in range(0, length.to(tl.int32), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        older = columns < candidates
        positions = positions_of(
            columns, older, requests, n, layer, head, req_to_token, context, store, num_slots, HEADS
        )
        key = tl.load(order + at * max_columns + columns, mask=older, other=0)
        victim = older & (packed(key, positions) <= edge)
        kept = (columns < length) & (victim == 0)

        hole = (victim & (columns < budget)).to(tl.int32)
        entry = hole_count + tl.cumsum(hole, 0) - hole
        listed = (positions.to(tl.int64) << 32) | columns.to(tl.int64)
        tl.store(holes + at * max_pairs + entry, listed, mask=hole == 1)
        hole_count += tl.sum(hole)

        source = (kept & (columns >= budget)).to(tl.int32)
        entry = source_count + tl.cumsum(source, 0) - source
        tl.store(sources + at * max_pairs + entry, columns, mask=source == 1)
        source_count += tl.sum(source)

        hashes = victim_hashes(layer, first_head + head, round, positions)
        total += tl.sum(tl.where(victim, hashes, 0))

        stays = kept & (columns < budget) & (round == 1)
        slots = slots_of(columns, stays, requests, n, req_to_token, context)
        tl.store(store + (layer * num_slots + slots) * HEADS + head, positions, mask=stays)
    tl.store(num_holes + at, hole_count)
    tl.atomic_add(round_sums + n, total)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def move_kernel(
    k_pointers,
    v_pointers,
    holes,
    sources,
    num_holes,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_pairs,
    ELEMENT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy every source over its hole: K row, V row, token position.

    Grid (split, layers * HEADS, requests); the programs of a head share its pairs.

    k_pointers, v_pointers : int64 [layers], addresses of [num_slots, HEADS, HEAD_DIM] buffers
    ELEMENT : integer type as wide as an element: rows move as bits
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    at = n * tl.num_programs(1) + place
    count = tl.load(num_holes + at)
    in_order = field(requests, n, ROUND) == 1  # then columns lie in order of token position
    k = tl.load(k_pointers + layer).to(tl.pointer_type(ELEMENT))
    v = tl.load(v_pointers + layer).to(tl.pointer_type(ELEMENT))
    depth = tl.arange(0, BLOCK_D)[None, :]
    for start in range(part * BLOCK, count, tl.num_programs(0) * BLOCK):
        pair = start + tl.arange(0, BLOCK)
        valid = pair < count
        hole = tl.load(holes + at * max_pairs + pair, mask=valid, other=0)
        rank = pair
        if in_order == 0:
            rank = tl.zeros([BLOCK], tl.int32)
            for other_start in range(0, count, BLOCK):
                other = other_start + tl.arange(0, BLOCK)
                others = tl.load(
                    holes + at * max_pairs + other, mask=other < count, other=0x7FFFFFFFFFFFFFFF
                )
                rank += tl.sum((others[None, :] < hole[:, None]).to(tl.int32), 1)
        source = tl.load(sources + at * max_pairs + rank, mask=valid, other=0)
        to = slots_of((hole & 0xFFFFFFFF).to(tl.int32), valid, requests, n, req_to_token, context)
        come = slots_of(source, valid, requests, n, req_to_token, context)
        position = source + (field(requests, n, LOGICAL_LENGTH) - length)
        tl.store(store + (layer * num_slots + to) * HEADS + head, position.to(tl.int32), mask=valid)
        mask = valid[:, None] & (depth < HEAD_DIM)
        src = (come[:, None] * HEADS + head) * HEAD_DIM + depth
        dst = (to[:, None] * HEADS + head) * HEAD_DIM + depth
        # Pool buffers come from the allocator, so rows start on 16 bytes: wide loads.
        tl.store(
            tl.multiple_of(v + dst, [1, 16]), tl.load(tl.multiple_of(v + src, [1, 16]), mask), mask
        )
        tl.store(
            tl.multiple_of(k + dst, [1, 16]), tl.load(tl.multiple_of(k + src, [1, 16]), mask), mask
        )
