"""Storing the newest queries: one launch a layer, static shapes, so decode graphs capture it."""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Of a program.
MOST_ELEMENTS = 1024


@triton.jit
def store_kernel(
    ring,
    queries,
    rows,
    positions,
    ring_rows,
    query_stride,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, j): block j of token i's queries."""
    token = tl.program_id(0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < SIZE
    ring_row = tl.load(ring_rows + tl.load(rows + token)).to(tl.int64)
    place = ring_row * WINDOW + tl.load(positions + token) % WINDOW
    value = tl.load(queries + token * query_stride + element, mask=mask)
    tl.store(ring + place * SIZE + element, value, mask=mask)


def store_queries(
    ring: Tensor, queries: Tensor, rows: Tensor, positions: Tensor, ring_rows: Tensor
) -> None:
    """Write each token's queries to its request's place in one layer's ring.

    Parameters
    ----------
    ring : Tensor [ring rows, window, q_heads, head_dim], contiguous
        Mutated at [ring_rows[rows[i]], positions[i] % window] for every token i. Tokens that
        share a place (padding, requests without a ring row) leave one of their queries there.
    queries : Tensor [tokens, q_heads * head_dim] of the ring's dtype, rows contiguous
    rows, positions : int Tensor [tokens]
        Request row and token position of each token.
    ring_rows : int32 Tensor [request rows]
        Row of the ring that belongs to each request row.
    """
    tokens, size = queries.shape
    if queries.stride(1) != 1 or not ring.is_contiguous() or ring[0, 0].numel() != size:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit ring {tuple(ring.shape)}")
    block = min(MOST_ELEMENTS, triton.next_power_of_2(size))
    store_kernel[(tokens, triton.cdiv(size, block))](
        ring,
        queries,
        rows,
        positions,
        ring_rows,
        queries.stride(0),
        WINDOW=ring.shape[1],
        SIZE=size,
        BLOCK=block,
    )
