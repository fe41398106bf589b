"""Batch-invariant linear layers on CPU.

A GEMM's rounding depends on its number of rows M, so a request's logits would depend on how many
others share the batch. With M fixed, a row's result is independent of its neighbours, and with most
kernels of its place (`tests/engine/test_cpu_platform.py`). So rows are cut into tiles of a fixed
height, the last one padded with zeros. Tiles read the weights again and again, so several are
multiplied at once.

Kernels round a row by its place where threads get unequal shares of the rows, or shares that end in
rows for another kernel: MKL's for AVX2 with four threads, oneDNN's for bfloat16 on AVX-512 without
AVX512_BF16 with three. So a trial of each product, in the forward that first needs it, decides how
high tiles may be and how many go at once.

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

#: Largest tile heights: decode batches are small, prefills long. A row is always in the same kind.
DECODE_TILE = 16
EXTEND_TILE = 64
#: Decode's tile where products of several rows are no faster than products of one.
ROW = 1
#: Most tiles multiplied at once.
_TILES_AT_ONCE = 4
#: Results compared in a trial, and rows at least: bfloat16 hides most differences, so that few
#: would show none.
_TRIAL_RESULTS, _TRIAL_ROWS = 2**18, 64
#: How far a trial's rows are moved: past the border of whatever two kernels share a tile.
_TRIAL_SHIFTS = (1, 5, 11, 23)

Linear = Callable[[torch.Tensor], torch.Tensor]


def in_tiles(linear: Linear, x: torch.Tensor, tile: int, at_once: int = 1) -> torch.Tensor:
    """`linear` over x [rows, features] in tiles of `tile` rows; same value for any batch.

    Up to `at_once` (a power of two) tiles go through one call; see `tiling`.
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


def tiling(linear: Linear, features: int, dtype: torch.dtype, tallest: int) -> tuple[int, int]:
    """Height of tiles and how many may go through one call, by trials.

    The largest of `tallest`, its half, and so on with which a row's bits do not depend on its
    place; at last single rows. Then twice as many at once as long as the bits stay the same.
    """
    tile, at_once = tallest, 1
    while True:
        rows = _trial(linear, features, dtype, tile)
        alone = in_tiles(linear, rows, tile)
        if tile == ROW or _gives(linear, rows, tile, 1, alone):
            break
        tile //= 2
    while at_once < _TILES_AT_ONCE and _gives(linear, rows, tile, 2 * at_once, alone):
        at_once *= 2
    return tile, at_once


def _trial(linear: Linear, features: int, dtype: torch.dtype, tile: int) -> torch.Tensor:
    """Random rows [rows, features], whole groups of as many tiles as may go at once."""
    generator = torch.Generator().manual_seed(0)
    results = linear(torch.zeros(tile, features, dtype=dtype)).shape[-1]
    rows = max(_TRIAL_ROWS, _TRIAL_RESULTS // results)
    rows += -rows % (_TILES_AT_ONCE * tile)
    return torch.randn(rows, features, generator=generator).to(dtype)


def _gives(
    linear: Linear, rows: torch.Tensor, tile: int, at_once: int, expected: torch.Tensor
) -> bool:
    """Whether rows have the bits of `expected` wherever they are."""
    return all(
        torch.equal(in_tiles(linear, rows.roll(shift, 0), tile, at_once), expected.roll(shift, 0))
        for shift in _TRIAL_SHIFTS
    )


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
    """Most rows of a tile in decode steps, and of logits."""
    return DECODE_TILE if has_fast_products(dtype) else ROW


def arithmetic(dtype: torch.dtype) -> str:
    """Most rows of a tile in decode and prefill, and the type of prefill's products.

    For a fingerprint: the rest follows from it, the CPU and the number of threads.
    """
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
        return tiled(in_float32(layer.weight, bias), x, layer.weight, EXTEND_TILE)
    tile = EXTEND_TILE if _extending else decode_tile(x.dtype)
    return tiled(lambda part: original(method, layer, part, bias), x, layer.weight, tile)


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
    return tiled(
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


def tiled(linear: Linear, x: torch.Tensor, weight: torch.Tensor, tallest: int) -> torch.Tensor:
    """`linear`, with this weight, over x [rows, features]: each row's bits are its own.

    In tiles of up to `tallest` rows; the first call for a kind of weight finds out by `tiling`.
    """
    shape = (weight.shape, weight.stride(), weight.dtype, tallest)
    if shape not in _trials:
        _trials[shape] = tiling(linear, x.shape[-1], x.dtype, tallest)
        if _trials[shape][0] < tallest:
            logger.warning(
                "with %d threads this CPU's matrix kernels round a row by its place: products of "
                "%s weights %s go %d rows at a time instead of %d, which takes longer; another "
                "number of threads may do without (OMP_NUM_THREADS, SGLANG_CPU_OMP_THREADS_BIND)",
                torch.get_num_threads(),
                str(weight.dtype).removeprefix("torch."),
                list(weight.shape),
                _trials[shape][0],
                tallest,
            )
    return in_tiles(linear, x, *_trials[shape])


#: Outcome of the trials for each kind of weight and tile, in this process.
_trials: dict[tuple[Any, ...], tuple[int, int]] = {}
