"""Batch-invariant linear layers on CPU.

A GEMM's rounding depends on its number of rows M, so a request's logits would depend on how many
others share the batch. With M fixed, a row's result is independent of its place and neighbours
(`tests/engine/test_linear_cpu.py`). So rows are cut into tiles of a fixed height, the last one
padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Tile heights: decode batches are small, prefills long. A row is always in the same kind.
DECODE_TILE = 16
EXTEND_TILE = 64


def in_tiles(
    linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int
) -> torch.Tensor:
    """`linear` over x [rows, features], `tile` rows at a time; same value for any batch."""
    rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % tile))
    parts = [linear(part) for part in padded.split(tile)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def tiled_linear_apply(
    original: Callable[..., torch.Tensor],
    method: Any,
    layer: torch.nn.Module,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """AROUND `UnquantizedLinearMethod.apply`."""
    return in_tiles(lambda part: original(method, layer, part, bias), x, _tile_height())


def tiled_lm_head(
    original: Callable[..., torch.Tensor],
    processor: Any,
    hidden_states: torch.Tensor,
    *args: Any,
    out: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """AROUND `LogitsProcessor._compute_lm_head`. One row a request, so the decode tile serves."""
    return in_tiles(
        lambda part: original(processor, part, *args, **kwargs), hidden_states, DECODE_TILE
    )


_extending = False


def note_forward_mode(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `ForwardBatch.init_new`: remember which tile the coming forward takes."""
    global _extending
    _extending = not result.forward_mode.is_decode()


def _tile_height() -> int:
    return EXTEND_TILE if _extending else DECODE_TILE
