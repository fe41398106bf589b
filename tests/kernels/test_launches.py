"""What a round does beside its kernels: a CUDA graph captures it whole, so nothing that waits for
the device, copies from the host or allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from vase_kernels.evict import POLICIES, PoolView, evict
from vase_kernels.requests import DueRequest, pack
from vase_kernels.scoring import attention_blocks
from vase_kernels.workspace import MAX_BLOCK_Q, Maxima, Workspace


class Seen(TorchDispatchMode):
    """Notes every operation of torch that gives a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **kwargs or {})
        if isinstance(found, torch.Tensor):
            self.operations.append(str(func))
        return found


@pytest.mark.parametrize("policy", POLICIES)
def test_a_round_is_launches_and_two_fills(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: grids.append(grid)
    )
    slots, heads, dim, requests = 90, 2, 64, 3
    rows = [torch.zeros(slots, heads, dim) for _ in range(4)]
    positions = torch.zeros(2, slots, heads, dtype=torch.int32)
    req_to_token = torch.arange(slots, dtype=torch.int32).view(2, 45)
    view = PoolView.of(rows[:2], rows[2:], positions, req_to_token)
    due = DueRequest(
        row=1, length=45, budget=32, window=13, round=2, logical_length=70, seed=1, num_protected=8
    )
    table = pack([due], requests)
    ring = torch.zeros(2, 2, 16, heads * 3, dim)
    workspace = Workspace(
        Maxima(requests, 45, 32, 13, 3), layers=2, kv_heads=heads, device=rows[0].device
    )
    with Seen() as seen:
        evict(policy, view, table, ring, workspace)
    assert seen.operations == ["aten.zero_.default"] * 2
    # Every grid covers all layers, heads and rows of the table, whoever is due.
    assert len(grids) >= 4 and {grid[-2:] for grid in grids} == {(2 * heads, requests)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_no_sum_is_read_that_was_not_written(head_dim: int, dtype: torch.dtype) -> None:
    """Scratch holds anything before a round."""
    for_lse, for_weights = attention_blocks(head_dim, dtype)
    assert MAX_BLOCK_Q % for_lse.queries == 0 and for_lse.queries % for_weights.queries == 0
