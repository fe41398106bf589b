"""Attention of a window's queries on the candidates: the weight of vase-attnv, snapkv and rkv.

    stats    per query of the window: max and sum of its softmax over the candidates
    weights  per candidate: mean probability over the group's queries
    pooled   the weight: average of `weights` over neighbouring columns, in the kernels that use it

A value never depends on the grid, only on the order of blocks within one request and head: so not
on the batch. Logits are products on tensor cores with float32 sums; float32 operands take three
TF32 products.

Bytes: K of the candidates twice (2 * C * head_dim * element size a head), the second time from L2
where a head's keys fit.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vase_kernels.requests import (
    LENGTH,
    LOGICAL_LENGTH,
    OF_THE_BATCH,
    RING_ROW,
    WINDOW,
    field,
    rows_of,
)


@triton.jit
def _query_rows(
    queries,
    index,
    depth,
    requests,
    n,
    layer,
    head,
    ring_rows,
    ring_window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Queries [block, BLOCK_D] of a KV head: the group's heads one after another, by position."""
    # In 32 bits: 64-bit division is a call of some hundred instructions.
    window = field(requests, n, WINDOW).to(tl.int32)
    position = field(requests, n, LOGICAL_LENGTH).to(tl.int32) - window + index % window
    entry = (
        layer * ring_rows + field(requests, n, RING_ROW)
    ) * ring_window + position % ring_window
    row = entry * (HEADS * GROUP) + head * GROUP + index // window
    mask = (index < GROUP * window)[:, None] & (depth < HEAD_DIM)
    at = queries + row[:, None] * HEAD_DIM + depth
    return tl.load(tl.multiple_of(at, [1, 16]), mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def stats_kernel(
    stats,
    k_pointers,
    queries,
    requests,
    req_to_token,
    context,
    max_queries,
    ring_rows,
    ring_window,
    scale,
    ELEMENT: tl.constexpr,
    DOT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each query's softmax maximum and sum. Grid (query blocks, layers * HEADS, requests).

    stats : float32 [requests, layers * HEADS, 2, max_queries]
    queries : [layers, ring_rows, ring_window, HEADS * GROUP, HEAD_DIM], position p at p % window
    """
    block, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length, window = field(requests, n, LENGTH), field(requests, n, WINDOW)
    if (length == 0) | (block * BLOCK_Q >= GROUP * window):
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - window).to(tl.int32)
    index = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    depth = tl.arange(0, BLOCK_D)[None, :]
    q = _query_rows(
        queries,
        index,
        depth,
        requests,
        n,
        layer,
        head,
        ring_rows,
        ring_window,
        HEADS,
        GROUP,
        HEAD_DIM,
        DOT,
    )
    k = tl.load(k_pointers + layer).to(tl.pointer_type(ELEMENT))
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, candidates, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        rows = rows_of(
            k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        ).to(DOT)
        logits = tl.dot(q, tl.trans(rows), input_precision="tf32x3") * scale
        logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # A row of -inf alone has no finite base; 0 keeps its exponentials at 0, not NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        peak = higher
    at = stats + (n * tl.num_programs(1) + place) * 2 * max_queries + index
    real = index < GROUP * window
    tl.store(at, tl.where(peak == float("-inf"), 0.0, peak), mask=real)
    tl.store(at + max_queries, total, mask=real)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def weights_kernel(
    weights,
    stats,
    k_pointers,
    queries,
    requests,
    req_to_token,
    context,
    max_columns,
    max_queries,
    ring_rows,
    ring_window,
    scale,
    ELEMENT: tl.constexpr,
    DOT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each candidate's mean probability. Grid (split, layers * HEADS, requests).

    weights : float32 [requests, layers * HEADS, max_columns]
    """
    part, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length, window = field(requests, n, LENGTH), field(requests, n, WINDOW)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = (length - window).to(tl.int32)
    num_queries = (GROUP * window).to(tl.int32)
    depth = tl.arange(0, BLOCK_D)[None, :]
    at = n * tl.num_programs(1) + place
    k = tl.load(k_pointers + layer).to(tl.pointer_type(ELEMENT))
    for start in range(part * BLOCK, candidates, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        rows = rows_of(
            k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        ).to(DOT)
        mean = tl.zeros([BLOCK], tl.float32)
        for first in range(0, num_queries, BLOCK_Q):
            index = first + tl.arange(0, BLOCK_Q)
            real = index < num_queries
            q = _query_rows(
                queries,
                index,
                depth,
                requests,
                n,
                layer,
                head,
                ring_rows,
                ring_window,
                HEADS,
                GROUP,
                HEAD_DIM,
                DOT,
            )
            logits = tl.dot(q, tl.trans(rows), input_precision="tf32x3") * scale
            stat = stats + at * 2 * max_queries + index
            peak = tl.load(stat, mask=real, other=0.0)
            total = tl.load(stat + max_queries, mask=real, other=1.0)
            probability = tl.exp(logits - peak[:, None]) / total[:, None]
            mean += tl.sum(tl.where(real[:, None], probability, 0.0), 0)
        tl.store(weights + at * max_columns + columns, mean / num_queries, mask=inside)


@triton.jit
def pooled(weights, at, columns, candidates, width, max_columns):
    """Average of `width` neighbouring weights of row `at`, zeros outside; float32 like columns."""
    total = tl.zeros(columns.shape, tl.float32)
    for offset in range(width):
        near = columns + offset - width // 2
        inside = (near >= 0) & (near < candidates)
        total += tl.load(weights + at * max_columns + near, mask=inside, other=0.0)
    return total / width
