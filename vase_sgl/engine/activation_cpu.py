"""Batch-invariant activation functions on CPU.

torch gives each thread a share of a long tensor's elements. The last few of a share go through
scalar code, whose exp and erf round differently from the vector code of the others. Where shares
end depends on the number of rows. So rows go in calls too short to be shared, each of which leaves
over the same elements of every row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]

#: Elements that torch leaves to one thread: GELU's; others' are more.
_OF_ONE_THREAD = 16384
#: Elements that vector code takes at once, at most.
_AT_ONCE = 64


def in_short_calls(
    activation: Activation, x: torch.Tensor, features: int, *, singly: bool = False
) -> torch.Tensor:
    """`activation` over x [..., inputs] with `features` outputs a row; same bits in any batch.

    `singly`: every row in a call of its own.
    """
    rows = x.reshape(-1, x.shape[-1])
    # Also rows that leave something over: torch takes contiguous ones for one long row.
    height = 1 if singly or features % _AT_ONCE else max(1, _OF_ONE_THREAD // features)
    if len(rows) <= height:
        return activation(x)
    return torch.cat([activation(part) for part in rows.split(height)]).view(*x.shape[:-1], -1)


def gated(original: Callable[..., torch.Tensor], op: Any, x: torch.Tensor) -> torch.Tensor:
    """AROUND `forward_native` of activations that multiply one half of a row with the other."""
    # The exact GELU of a half row is oneDNN's, that of several is not: they are not contiguous.
    singly = getattr(op, "approximate", None) == "none"
    return in_short_calls(functools.partial(original, op), x, x.shape[-1] // 2, singly=singly)


def ungated(result: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """AFTER `get_act_fn`, whose modules are shared by all layers."""
    if "forward" not in vars(result):
        forward = result.forward
        result.forward = lambda x: in_short_calls(forward, x, x.shape[-1])
    return result
