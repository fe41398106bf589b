"""Seeded sampling on CPU.

SGLang honours `sampling_seed` only under `--enable-deterministic-inference`, which refuses the
CPU's attention backend. Here a seeded row is drawn by inverse CDF with one counter-based uniform
per position, so the token depends on (seed, position, the row's probabilities) and nothing else.
Rows without a seed take the stock path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from vase_kernels.reference.philox import philox4x32

#: First counter word: keeps these draws apart from eviction's, which put a layer index there.
_SAMPLING_STREAM = 0xFFFFFFFF


def carry_seeds(result: Any, cls: type, batch: Any, vocab_size: int) -> Any:
    """AFTER `SamplingBatchInfo.from_schedule_batch`: put the requests' seeds into the batch.

    int64 [rows, 2]: whether there is a seed, for which upstream takes any int64, and the seed.
    Always a tensor, because upstream merges batches field by field.
    """
    seeds = [req.sampling_params.sampling_seed for req in batch.reqs]
    result.sampling_seed = torch.tensor(
        [(seed is not None, seed or 0) for seed in seeds], dtype=torch.int64, device=batch.device
    ).reshape(len(seeds), 2)
    return result


def sample_with_seeds(
    original: Callable[..., Any],
    sampler: Any,
    probs: torch.Tensor,
    sampling_info: Any,
    positions: torch.Tensor,
    simple_sampling_case: bool,
) -> Any:
    """AROUND `Sampler._sample_from_probs`: stock draw for all rows, then seeded rows replaced."""
    has_seed, seeds = sampling_info.sampling_seed.unbind(dim=1)
    seeded = has_seed.nonzero().flatten()
    stock_info = dataclasses.replace(sampling_info, sampling_seed=None)
    if seeded.numel() == 0:
        return original(sampler, probs, stock_info, positions, simple_sampling_case)
    own = probs[seeded].clone()  # the stock path may write to probs
    tokens, capture = original(sampler, probs, stock_info, positions, simple_sampling_case)
    tokens[seeded] = draw(
        own,
        seeds[seeded],
        positions[seeded],
        top_k=sampling_info.top_ks[seeded],
        top_p=sampling_info.top_ps[seeded],
        min_p=sampling_info.min_ps[seeded],
    ).to(tokens.dtype)
    if capture is not None:
        # For `return_sampling_mask`: the weight is that of the stock draw, so upstream looks it up.
        capture = capture._replace(selected_weight=None)
    return tokens, capture


def draw(
    probs: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """One token per row by inverse CDF over tokens in order of falling probability.

    probs [rows, vocab] float32; seeds, positions, top_k, top_p, min_p [rows]. Ties in probability
    keep token order. A token is kept while it is among the first `top_k`, the mass before it is at
    most `top_p`, and it has at least `min_p` of the largest probability (the order of SGLang's
    torch path). Of a row with NaN it is the first of these, as by `argmax`. Each row is computed on
    its own, so neighbours cannot change it.
    """
    tokens = [
        _draw_row(probs[row], uniforms, int(top_k[row]), float(top_p[row]), float(min_p[row]))
        for row, uniforms in enumerate(_uniforms(seeds, positions).tolist())
    ]
    return torch.tensor(tokens, dtype=torch.int64, device=probs.device)


def _draw_row(probs: torch.Tensor, uniform: float, top_k: int, top_p: float, min_p: float) -> int:
    values, order = probs.double().sort(descending=True, stable=True)
    values = values[: min(top_k, len(values))]
    before = values.cumsum(0) - values
    if values[0].isnan():
        return int(order[0])
    kept = (before <= top_p) & (values >= min_p * values[0])
    mass = (values * kept).cumsum(0)
    index = torch.searchsorted(mass, uniform * mass[-1], right=True)
    last = kept.nonzero()[-1, 0]
    return int(order[torch.minimum(index, last)])


def _uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniforms in [0, 1) with 53 bits, float64 [rows], keyed by (seed, position)."""
    seeds, positions = seeds.to(torch.int64), positions.to(torch.int64)
    zero = torch.zeros_like(positions)
    words = philox4x32(
        (seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF),
        (zero + _SAMPLING_STREAM, zero, zero, positions),
    )
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53
