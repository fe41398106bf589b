"""`vase_kernels.reference.select_victims` for one layer of one request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vase_kernels.reference import Candidates, select_victims


def layer_victims(
    policy: str,
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    positions: Tensor,
    num_victims: int,
    *,
    budget: int,
    seed: int,
    layer: int,
    first_head: int,
    round: int,
    **fields: Any,
) -> Tensor:
    """Columns int64 [kv_heads, num_victims], in order of token position.

    keys, values [kv_heads, candidates, head_dim], queries [q_heads, window, head_dim], positions
    [kv_heads, candidates]; `first_head` is the global index of head 0.
    """
    candidates = Candidates(
        keys=(keys[None],),
        values=(values[None],),
        queries=None if queries is None else queries[None, None],
        positions=positions[None, None].to(torch.int64),
        seed=torch.tensor([seed]),
        round=torch.tensor([round]),
        layers=torch.tensor([layer]),
        heads=torch.arange(first_head, first_head + len(keys)),
    )
    return select_victims(policy, candidates, num_victims, budget=budget, **fields)[0, 0]
