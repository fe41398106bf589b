"""Retention keys that read no row of K or V: `random` and `streaming`.

Bytes: 4 written a column. `random` and `streaming` equal the reference bit for bit.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.philox import uniform, words
from vase_kernels.requests import (
    LENGTH,
    NUM_SINKS,
    OF_THE_BATCH,
    ROUND,
    WINDOW,
    field,
    positions_of,
)
from vase_kernels.select import order_of


@triton.jit(do_not_specialize=OF_THE_BATCH)
def simple_kernel(
    order,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    first_head,
    RANDOM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the order of uniform draws (RANDOM) or of token positions; sinks get +inf.

    Grid (split, layers * HEADS, requests); the programs of a head share its columns.
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    round = field(requests, n, ROUND)
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    at = n * tl.num_programs(1) + place
    for start in range(part * BLOCK, candidates, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        older = columns < candidates
        positions = positions_of(
            columns, older, requests, n, layer, head, req_to_token, context, store, num_slots, HEADS
        )
        if RANDOM:
            word, _, _, _ = words(requests, n, layer, first_head + head, round, positions)
            key = uniform(word)
        else:
            key = positions.to(tl.float32)
        key = tl.where(positions < field(requests, n, NUM_SINKS), float("inf"), key)
        tl.store(order + at * max_columns + columns, order_of(key), mask=older)
