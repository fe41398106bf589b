"""Batch-invariant linear layers on CPU.

A GEMM's rounding depends on its number of rows M, so a request's logits would depend on how many
others share the batch. With M fixed, a row's result is independent of its place and neighbours
(`tests/engine/test_cpu_platform.py`). So rows are cut into tiles of a fixed height, the last one
padded with zeros. Tiles read the weights again and again, so several are multiplied at once where
a trial shows that this machine's BLAS gives the same bits.

A CPU for whose bfloat16 or float16 oneDNN has no kernels (x86 without AVX-512, say) multiplies a
tile of 16 rows no faster than 16 single rows. There decode goes row by row, which costs what
upstream's one product of all rows does, and prefills are multiplied in float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Tile heights: decode batches are small, prefills long. A row is always in the same kind.
DECODE_TILE = 16
EXTEND_TILE = 64
#: Decode's tile where products of several rows are no faster than products of one.
ROW = 1
#: Tiles multiplied at once, if the bits are those of one at a time.
_TILES_AT_ONCE = (4, 2)
#: Rows of the trial for that: bfloat16 hides most differences, so that few rows would show none.
_TRIAL_ROWS = 64

Linear = Callable[[torch.Tensor], torch.Tensor]


def in_tiles(linear: Linear, x: torch.Tensor, tile: int, at_once: int = 1) -> torch.Tensor:
    """`linear` over x [rows, features] in tiles of `tile` rows; same value for any batch.

    Up to `at_once` (a power of two) tiles go through one call; see `tiles_at_once`.
    """
    rows = x.shape[0]
    missing = -rows % tile
    rest = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    if rows <= tile:
        return linear(rest)[:rows]
    parts = []
    while True:
        while at_once > 1 and at_once * tile > len(rest):
            at_once //= 2
        parts.append(linear(rest[: at_once * tile]))
        rest = rest[at_once * tile :]
        if not len(rest):
            return torch.cat(parts)[:rows]


def tiles_at_once(linear: Linear, features: int, dtype: torch.dtype, tile: int) -> int:
    """How many tiles one call may take with the bits of one tile at a time, from a trial."""
    generator = torch.Generator().manual_seed(0)
    rows = max(_TILES_AT_ONCE[0] * tile, _TRIAL_ROWS)
    x = torch.randn(rows, features, generator=generator).to(dtype)
    alone = in_tiles(linear, x, tile)
    for count in _TILES_AT_ONCE:
        if torch.equal(torch.cat([linear(part) for part in x.split(count * tile)]), alone):
            return count
    return 1


@functools.cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this type on this CPU."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def warn_of_slow_products(dtype: torch.dtype) -> None:
    """Say what is faster, where a batch takes as long as its requests one after the other."""
    if not has_fast_products(dtype):
        logger.warning(
            "this CPU has no matrix kernels for %s: a batch takes as long as its requests one "
            "after the other; from some ten requests at once --dtype float32 is faster",
            str(dtype).removeprefix("torch."),
        )


def decode_tile(dtype: torch.dtype) -> int:
    """Rows of a tile in decode steps, and of logits."""
    return DECODE_TILE if has_fast_products(dtype) else ROW


def arithmetic(dtype: torch.dtype) -> str:
    """Tile heights of decode and prefill, and the type of prefill's products: for a fingerprint."""
    wide = dtype if has_fast_products(dtype) else torch.float32
    return f"{decode_tile(dtype)}-{EXTEND_TILE}-{str(wide).removeprefix('torch.')}"


def tiled_linear_apply(
    original: Callable[..., torch.Tensor],
    method: Any,
    layer: Any,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """AROUND `UnquantizedLinearMethod.apply`."""
    if _extending and not has_fast_products(x.dtype):
        return _tiled(in_float32(layer.weight, bias), x, layer.weight, EXTEND_TILE)
    tile = EXTEND_TILE if _extending else decode_tile(x.dtype)
    return _tiled(lambda part: original(method, layer, part, bias), x, layer.weight, tile)


def in_float32(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The layer with float32 products; results have the type of its input."""
    wide = weight.float()
    wide_bias = None if bias is None else bias.float()

    def linear(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), wide, wide_bias).to(x.dtype)

    return linear


def tiled_lm_head(
    original: Callable[..., torch.Tensor],
    processor: Any,
    hidden_states: torch.Tensor,
    lm_head: Any,
    *args: Any,
    out: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """AROUND `LogitsProcessor._compute_lm_head`. One row a request, so the decode tile serves."""
    return _tiled(
        lambda part: original(processor, part, lm_head, *args, **kwargs),
        hidden_states,
        lm_head.weight,
        decode_tile(hidden_states.dtype),
    )


_extending = False


def note_forward_mode(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `ForwardBatch.init_new`: remember which tile the coming forward takes."""
    global _extending
    _extending = not result.forward_mode.is_decode()


def _tiled(linear: Linear, x: torch.Tensor, weight: torch.Tensor, tile: int) -> torch.Tensor:
    shape = (weight.shape, weight.stride(), weight.dtype, tile)
    if shape not in _trials:
        _trials[shape] = tiles_at_once(linear, x.shape[-1], x.dtype, tile)
    return in_tiles(linear, x, tile, _trials[shape])


#: Outcome of the trial for each kind of weight and tile, in this process.
_trials: dict[tuple[Any, ...], int] = {}
