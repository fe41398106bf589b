"""Retention keys of R-KV: mix_lambda * attention - (1 - mix_lambda) * redundancy.

Two kernels after those of `attention.py`:

    similarity  per candidate: (1/C) * sum of its cosine similarities with the other candidates.
                The unit keys' sum is taken first, so that it costs two reads of K, not C.
    mix         redundancy = softmax of that over the candidates; the key

One program adds up a head's keys, block after block, so a value depends on nothing but the head.
Against the reference, keys differ by rounding: about 1e-6 of 1/C.

Bytes, floor: K of the candidates once (C * head_dim * element size a head); it is read four times,
from L2 where a head's keys fit.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.attention import pooled
from vase_kernels.requests import (
    LENGTH,
    MIX_LAMBDA,
    NUM_SINKS,
    OF_THE_BATCH,
    POOL_WIDTH,
    WINDOW,
    field,
    positions_of,
    rows_of,
)
from vase_kernels.select import order_of


@triton.jit
def _unit_rows(
    k,
    columns,
    inside,
    depth,
    requests,
    n,
    head,
    req_to_token,
    context,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Keys over their norms, float32 [block, BLOCK_D]."""
    rows = rows_of(
        k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
    ).to(tl.float32)
    norm = tl.sqrt(tl.sum(rows * rows, 1))
    return rows / (norm + 1e-8)[:, None]


@triton.jit(do_not_specialize=OF_THE_BATCH)
def similarity_kernel(
    order,
    k_pointers,
    requests,
    req_to_token,
    context,
    max_columns,
    ELEMENT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each candidate's mean similarity. Grid (layers * HEADS, requests).

    order : int32 [requests, layers * HEADS, max_columns], here the bits of float32
    """
    place, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    depth = tl.arange(0, BLOCK_D)[None, :]
    at = n * tl.num_programs(0) + place
    k = tl.load(k_pointers + layer).to(tl.pointer_type(ELEMENT))
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, candidates, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        unit = _unit_rows(
            k,
            columns,
            columns < candidates,
            depth,
            requests,
            n,
            head,
            req_to_token,
            context,
            HEADS,
            HEAD_DIM,
        )
        total += tl.sum(unit, 0)
    for start in range(0, candidates, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        unit = _unit_rows(
            k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        )
        similarity = tl.sum(unit * total[None, :], 1) - tl.sum(unit * unit, 1)
        bits = (similarity / candidates).to(tl.int32, bitcast=True)
        tl.store(order + at * max_columns + columns, bits, mask=inside)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def mix_kernel(
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
    """Replace mean similarities by the order of retention keys, in place; sinks get +inf.

    Grid (layers * HEADS, requests).
    """
    place, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = field(requests, n, LENGTH)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - field(requests, n, WINDOW)).to(tl.int32)
    width = field(requests, n, POOL_WIDTH).to(tl.int32)
    share = field(requests, n, MIX_LAMBDA).to(tl.int32).to(tl.float32, bitcast=True)
    at = n * tl.num_programs(0) + place
    row = order + at * max_columns
    peak = tl.full([], float("-inf"), tl.float32)
    for start in range(0, candidates, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        bits = tl.load(row + columns, mask=inside, other=0)
        similarity = tl.where(inside, bits.to(tl.float32, bitcast=True), float("-inf"))
        peak = tl.maximum(peak, tl.max(similarity))
    total = tl.zeros([], tl.float32)
    for start in range(0, candidates, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        bits = tl.load(row + columns, mask=inside, other=0)
        similarity = bits.to(tl.float32, bitcast=True)
        total += tl.sum(tl.where(inside, tl.exp(similarity - peak), 0.0))
    for start in range(0, candidates, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        bits = tl.load(row + columns, mask=inside, other=0)
        redundancy = tl.exp(bits.to(tl.float32, bitcast=True) - peak) / total
        importance = pooled(weights, at, columns, candidates, width, max_columns)
        key = share * importance - (1.0 - share) * redundancy
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
        tl.store(row + columns, order_of(key), mask=inside)
