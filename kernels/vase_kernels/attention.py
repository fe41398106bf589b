"""Attention of a window's queries on the candidates: the weight of vase-attnv, snapkv and rkv.

    lse      per query of the window: log2 of the sum of its softmax's terms over the candidates
    weights  per candidate: mean probability over the group's queries
    pooled   the weight: average of `weights` over neighbouring columns, in the kernels that use it

A value never depends on the grid, only on the order of blocks within one request and head: so not
on the batch. Logits are products on tensor cores with float32 sums; float32 operands take three
TF32 products.

A window's queries are counted in groups of a power of two, so that no program divides to find
one. Padding repeats a real query and weighs nothing: its `lse` is +inf. A query of zeros would
not do, for it makes NaN of keys with an infinity.

Bytes: K of the candidates twice (2 * C * head_dim * element size a head), the second time from L2
where a head's keys fit. Arithmetic: 4 * C * queries * head_dim operations on tensor cores and
2 * C * queries exponentials, each of which takes an H100 as long as the bytes of K and V from some
300 queries on (64 of 5 heads are 320).
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
from vase_kernels.workspace import MAX_BLOCK_Q

_LOG2_E = tl.constexpr(1.4426950408889634)
_ROW = tl.constexpr(MAX_BLOCK_Q)


@triton.jit
def _log2_ceil(n):
    """The exponent of the next power of two, of a scalar from 1 to 2**22."""
    return ((2 * n - 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


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
    window = field(requests, n, WINDOW).to(tl.int32)
    bits = _log2_ceil(window)
    of_group = tl.minimum(index >> bits, GROUP - 1)
    # From the window's first entry of the ring on, around its end.
    entry = (field(requests, n, LOGICAL_LENGTH).to(tl.int32) - window) % ring_window
    entry += tl.minimum(index & ((1 << bits) - 1), window - 1)
    entry = tl.where(entry >= ring_window, entry - ring_window, entry)
    ring = (layer * ring_rows + field(requests, n, RING_ROW)) * ring_window
    first = queries + ring * (HEADS * GROUP * HEAD_DIM)
    at = first + ((entry * HEADS + head) * GROUP + of_group)[:, None] * HEAD_DIM + depth
    return tl.load(tl.multiple_of(at, [1, 16]), mask=depth < HEAD_DIM, other=0.0).to(DOT)


@triton.jit
def _operand(rows, DOT: tl.constexpr):
    """Rows of K as the products take them, exactly.

    Compiled, float8_e5m2 must not become bfloat16 in one step: infinities come out as 65536, NaN
    as numbers beyond.
    """
    if rows.dtype == tl.float8e5:
        rows = rows.to(tl.float16)
    return rows.to(DOT)


@triton.jit
def _add_block(
    peak,
    total,
    q,
    k,
    start,
    candidates,
    depth,
    requests,
    n,
    head,
    req_to_token,
    context,
    log2_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A block more in the running maximum and sum of each query's softmax.

    WHOLE : all of the block's columns are candidates
    """
    columns = start + tl.arange(0, BLOCK)
    inside = columns >= 0 if WHOLE else columns < candidates
    rows = rows_of(
        k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
    )
    logits = tl.dot(q, tl.trans(_operand(rows, DOT)), input_precision="tf32x3")
    if not WHOLE:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, 1))
    # A row of -inf alone has no finite base; 0 keeps its exponentials at 0, not NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher) * log2_scale
    total *= tl.exp2(peak * log2_scale - base)
    total += tl.sum(tl.exp2(logits * log2_scale - base[:, None]), 1)
    return higher, total


@triton.jit(do_not_specialize=OF_THE_BATCH)
def lse_kernel(
    lse,
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
    """Write each query's log2 of the sum of 2**logit over the candidates.

    Grid (query blocks, layers * HEADS, requests).

    lse : float32 [requests, layers * HEADS, max_queries], +inf where padded
    queries : [layers, ring_rows, ring_window, HEADS * GROUP, HEAD_DIM], position p at p % window
    scale : positive
    """
    block, place, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length, window = field(requests, n, LENGTH), field(requests, n, WINDOW).to(tl.int32)
    if length == 0:
        return
    bits = _log2_ceil(window)
    if block * BLOCK_Q >= GROUP << bits:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = length.to(tl.int32) - window
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
    log2_scale = scale * _LOG2_E
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    whole = candidates // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        peak, total = _add_block(
            peak,
            total,
            q,
            k,
            start,
            candidates,
            depth,
            requests,
            n,
            head,
            req_to_token,
            context,
            log2_scale,
            HEADS,
            HEAD_DIM,
            DOT,
            BLOCK,
            True,
        )
    if whole < candidates:
        peak, total = _add_block(
            peak,
            total,
            q,
            k,
            whole,
            candidates,
            depth,
            requests,
            n,
            head,
            req_to_token,
            context,
            log2_scale,
            HEADS,
            HEAD_DIM,
            DOT,
            BLOCK,
            False,
        )
    real = ((index & ((1 << bits) - 1)) < window) & (index >> bits < GROUP)
    found = tl.where(real, peak * log2_scale + tl.log2(total), float("inf"))
    row = tl.multiple_of((n * tl.num_programs(1) + place) * max_queries, _ROW)
    tl.store(lse + row + index, found)


@triton.jit(do_not_specialize=OF_THE_BATCH)
def weights_kernel(
    weights,
    lse,
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
    length, window = field(requests, n, LENGTH), field(requests, n, WINDOW).to(tl.int32)
    if length == 0:
        return
    layer, head = place // HEADS, place % HEADS
    candidates = length.to(tl.int32) - window
    padded = GROUP << _log2_ceil(window)
    depth = tl.arange(0, BLOCK_D)[None, :]
    at = n * tl.num_programs(1) + place
    row = tl.multiple_of(at * max_queries, _ROW)
    k = tl.load(k_pointers + layer).to(tl.pointer_type(ELEMENT))
    log2_scale = scale * _LOG2_E
    for start in range(part * BLOCK, candidates, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < candidates
        rows = rows_of(
            k, columns, inside, depth, requests, n, head, req_to_token, context, HEADS, HEAD_DIM
        )
        rows = _operand(rows, DOT)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, padded, BLOCK_Q):
            index = first + tl.arange(0, BLOCK_Q)
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
            logits = tl.dot(rows, tl.trans(q), input_precision="tf32x3")
            of_query = tl.load(lse + row + index)
            total += tl.sum(tl.exp2(logits * log2_scale - of_query[None, :]), 1)
        tl.store(weights + at * max_columns + columns, total / (GROUP * window), mask=inside)


@triton.jit
def pooled(weights, at, columns, candidates, width, max_columns):
    """Average of `width` neighbouring weights of row `at`, zeros outside; float32 like columns."""
    total = tl.zeros(columns.shape, tl.float32)
    for offset in range(width):
        near = columns + offset - width // 2
        inside = (near >= 0) & (near < candidates)
        total += tl.load(weights + at * max_columns + near, mask=inside, other=0.0)
    return total / width
