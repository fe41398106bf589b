"""Exact selection with a stated tie order."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest(key: Tensor, positions: Tensor, count: int) -> Tensor:
    """Columns of the `count` smallest keys, smallest first.

    Ties go to the lower token position; NaN counts as -inf, -0.0 equals 0.0. Exact and
    deterministic: key and position are packed into one distinct integer per column.

    Parameters
    ----------
    key : float32 Tensor [..., columns]
    positions : int64 Tensor [..., columns]
        Distinct within a row, in [0, 2**32).
    count : int

    Returns
    -------
    int64 Tensor [..., count]
    """
    bits = (key.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0).view(
        torch.int32
    )
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders like the floats do
    packed = (ordered.to(torch.int64) << 32) | positions
    return packed.topk(count, dim=-1, largest=False).indices
