"""Retention keys of SnapKV: the pooled attention weight of `attention.py`, as it is.

Against the reference, keys differ by rounding: about 1e-6 relative. Bytes, floor: K of the
candidates once (C * head_dim * element size a head).
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.attention import pooled
from vase_kernels.requests import (
    LENGTH,
    NUM_SINKS,
    OF_THE_BATCH,
    POOL_WIDTH,
    WINDOW,
    field,
    positions_of,
)
from vase_kernels.select import order_of


@triton.jit(do_not_specialize=OF_THE_BATCH)
def snapkv_kernel(
    order,
    weights,
    requests,
    req_to_token,
    store,
    context,
    num_slots,
    max_columns,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the order of each candidate's weight; sinks get +inf, NaN counts as -inf.

    Grid (split, layers * HEADS, requests).
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    width = field(requests, n, POOL_WIDTH).to(tl.int32)
    at = n * tl.num_programs(1) + place
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
        key = pooled(weights, at, columns, candidates, width, max_columns)
        key = tl.where(positions < field(requests, n, NUM_SINKS), float("inf"), key)
        tl.store(order + at * max_columns + columns, order_of(key), mask=inside)
