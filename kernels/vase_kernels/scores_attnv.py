"""Retention keys of VaSE-AttnV: protect large value ranges, draw the rest by attention.

Four kernels, with a selection of the protected between the last two:

    lse, weights    of `attention.py`: how the window's queries attend to each candidate
    ranges          of `scores_rows.py`: per candidate, order of -(max - min of its value row)
    draw            per candidate: log(pooled weight) + Gumbel, +inf where protected

Against the reference, keys differ by rounding: about 1e-5 relative to the weight.

Bytes, floor: K and V of the candidates once (2 * C * head_dim * element size a head).
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.attention import pooled
from vase_kernels.philox import gumbel, words
from vase_kernels.requests import (
    LENGTH,
    NUM_SINKS,
    OF_THE_BATCH,
    POOL_WIDTH,
    ROUND,
    WINDOW,
    field,
    positions_of,
)
from vase_kernels.select import order_of, packed


@triton.jit(do_not_specialize=OF_THE_BATCH)
def draw_kernel(
    order,
    weights,
    edges,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    first_head,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace the order of value ranges by the order of retention keys, in place.

    Grid (split, layers * HEADS, requests). `edges` holds the last protected of each head.
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    width = field(requests, n, POOL_WIDTH).to(tl.int32)
    at = n * tl.num_programs(1) + place
    edge = tl.load(edges + at)
    round = field(requests, n, ROUND)
    for start in range(part * BLOCK, candidates, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
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
        ranges = tl.load(order + at * max_columns + columns, mask=inside, other=0)
        protected = packed(ranges, positions) <= edge
        weight = pooled(weights, at, columns, candidates, width, max_columns)
        word, _, _, _ = words(requests, n, layer, first_head + head, round, positions)
        key = tl.log(weight) + gumbel(word)
        forced = protected | (positions < field(requests, n, NUM_SINKS))
        key = tl.where(forced, float("inf"), key)
        tl.store(order + at * max_columns + columns, order_of(key), mask=inside)
