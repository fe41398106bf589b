"""Storing queries: each at its request's place and nowhere else."""

from __future__ import annotations

import pytest
import torch
from vase_kernels.query_ring import store_queries

from tests.triton.device import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 9])
def test_queries_land_in_their_rings(dtype: torch.dtype, heads: int) -> None:
    ring = torch.full((5, 6, heads, 16), 7.0, dtype=dtype)
    wide = torch.randn(4, heads * 16 + 3).to(dtype)
    queries = wide[:, : heads * 16]  # rows may lie apart, as slices of a fused QKV do
    rows = torch.tensor([3, 1, 6, 2])
    positions = torch.tensor([5, 12, 6007, 0])
    ring_rows = torch.tensor([0, 4, 1, 2, 0, 0, 3], dtype=torch.int32)
    expected = ring.clone()
    for token in range(4):
        row, place = int(ring_rows[rows[token]]), int(positions[token]) % 6
        expected[row, place] = queries[token].view(heads, 16)
    # Moved as a whole, so that the slice stays one.
    there, of_tokens = ring.to(DEVICE), wide.to(DEVICE)[:, : heads * 16]
    store_queries(there, of_tokens, *(x.to(DEVICE) for x in (rows, positions, ring_rows)))
    assert torch.equal(there.cpu(), expected)


def test_a_wrong_shape_is_refused() -> None:
    ring = torch.zeros(2, 4, 2, 16)
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit ring"):
        store_queries(ring, torch.zeros(1, 16), index, index, index.int())
