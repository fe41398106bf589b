"""One eviction round of a batch of requests, applied to a KV pool in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vase_kernels.reference.candidates import Candidates
from vase_kernels.reference.digest import round_sum
from vase_kernels.reference.overwrite import move_plan
from vase_kernels.reference.select import scorer, select_victims

#: Layers are handled together up to this many candidates; the result does not depend on it.
_GROUP_CANDIDATES = 1 << 19


def evict_reference(
    policy: str,
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    token_positions: Tensor,
    slots: Tensor,
    queries: Tensor | None,
    *,
    budget: int,
    window: int,
    pinned: int = 0,
    seeds: Tensor,
    rounds: Tensor,
    logical_lengths: Tensor,
    first_head: int = 0,
    attention_scale: float | None = None,
    **fields: Any,
) -> Tensor:
    """Evict from `num_columns` to `pinned + budget` rows per layer and KV head.

    Mutates exactly: the K and V rows and the `token_positions` of columns pinned..pinned+budget-1
    of the given requests. Afterwards these hold the kept older tokens and the `window` recent
    ones; the slots of later columns hold nothing the request still needs. A row that stays keeps
    its column (see `move_plan`). Nothing depends on slot numbers or on the other requests.

    Pinned columns are outside all of it: neither victims nor candidates (so outside softmax,
    pooling and protected share), neither read nor written, and not counted by the budget. A call
    with `slots` and `pinned` is the call with `slots[:, pinned:]` and none, which lets requests
    that pin different numbers of columns share a call.

    Parameters
    ----------
    policy : str
        A name in `SCORERS`.
    k_buffers, v_buffers : sequence of Tensor [num_slots, kv_heads, head_dim]
        The pool, one K and one V tensor a layer; any float dtype.
    token_positions : int32 Tensor [layers, num_slots, kv_heads]
        Token position of each kept row, owned by the pool. Read for columns
        pinned..pinned+budget-1 of requests past their first round; need not be written before.
    slots : int Tensor [N, num_columns]
        Slot ids of requests with the same physical length, `num_columns` >= pinned + budget +
        window. All ids from column `pinned` on are distinct; pinned slots may be shared.
    queries : Tensor [N, layers, q_heads, window, head_dim] or None
        Post-RoPE queries of the window, needed by policies that score by attention.
    budget, window : int
        Tokens kept, window included; recent tokens that are never evicted.
    pinned : int
        Leading columns to leave alone: the prompt's, where the prompt is kept.
    seeds, rounds, logical_lengths : int64 Tensor [N]
        Eviction seed, round number counted from 1, tokens seen so far. Column c holds token
        position logical_length - num_columns + c where the store does not say otherwise; in a
        first round, that is c. Sinks are token positions below `num_sinks`, so of a kept prompt
        they are pinned already.
    first_head : int
        Global index of this rank's first KV head.
    attention_scale : float or None
        What the model multiplies q.k by; None for 1/sqrt(head_dim).
    **fields
        The policy's own fields.

    Returns
    -------
    int64 Tensor [N]
        Sum of victim hashes over this pool's layers and heads, to be chained by `digest.chain`.

    Raises
    ------
    ValueError
        Before anything of the group of layers at hand is written: see `select_victims`
        and `move_plan`.
    """
    if pinned < 0:
        raise ValueError(f"pinned must not be negative, got {pinned}")
    slots = slots[:, pinned:]
    num_columns = slots.shape[1]
    num_victims = num_columns - budget
    if not 0 < window < budget or num_victims < window:
        raise ValueError(
            f"need 0 < window < budget and budget + window rows, got window {window}, "
            f"budget {budget}, {num_columns} rows beside {pinned} pinned"
        )
    chosen = scorer(policy, fields)
    num_candidates = num_columns - window
    num_heads = token_positions.shape[-1]
    heads = torch.arange(first_head, first_head + num_heads, device=slots.device)
    slots = slots.to(torch.int64)
    row_ids = _row_ids(slots, num_heads)
    candidate_rows = row_ids[..., :num_candidates]

    sums = torch.zeros_like(seeds)
    num_layers = len(k_buffers)
    step = max(1, _GROUP_CANDIDATES // candidate_rows.numel())
    for start in range(0, num_layers, step):
        group = slice(start, min(start + step, num_layers))
        positions = _positions(token_positions[group], slots, rounds, logical_lengths, budget)
        candidates = Candidates(
            keys=_PoolRows(k_buffers[group], candidate_rows) if chosen.reads_keys else None,
            values=_PoolRows(v_buffers[group], candidate_rows) if chosen.reads_values else None,
            queries=None if queries is None else queries[:, group],
            positions=positions[..., :num_candidates],
            seed=seeds,
            round=rounds,
            layers=torch.arange(group.start, group.stop, device=slots.device),
            heads=heads,
            attention_scale=attention_scale,
        )
        victims = select_victims(policy, candidates, num_victims, budget=budget, **fields)
        forgotten = positions.gather(-1, victims)
        sums += round_sum(forgotten, rounds, candidates.layers, heads)

        dst, src = move_plan(victims, candidates.positions, num_columns, window, budget)
        positions.scatter_(-1, dst, positions.gather(-1, src))
        token_positions[group].index_copy_(
            1,
            slots[:, :budget].flatten(),
            positions[..., :budget].permute(1, 0, 3, 2).flatten(1, 2).to(torch.int32),
        )
        to, source = (_rows_of(columns, row_ids) for columns in (dst, src))
        _move(k_buffers[group], to, source)
        _move(v_buffers[group], to, source)
    return sums


def _positions(
    store: Tensor, slots: Tensor, rounds: Tensor, logical_lengths: Tensor, budget: int
) -> Tensor:
    """int64 token positions [N, layers, kv_heads, num_columns] of every column."""
    num_columns = slots.shape[1]
    columns = torch.arange(num_columns, device=slots.device)
    unmoved = columns + (logical_lengths - num_columns)[:, None]
    layers, _, heads = store.shape
    positions = unmoved[:, None, None, :].repeat(1, layers, heads, 1)
    stored = store[:, slots[:, :budget]].permute(1, 0, 3, 2)
    first = (rounds == 1)[:, None, None, None]
    positions[..., :budget] = torch.where(first, positions[..., :budget], stored)
    return positions


def _row_ids(slots: Tensor, num_heads: int) -> Tensor:
    """Rows [N, kv_heads, columns] of a buffer seen as [num_slots * kv_heads, head_dim]."""
    return slots[:, None, :] * num_heads + torch.arange(num_heads, device=slots.device)[:, None]


def _as_words(buffer: Tensor) -> Tensor:
    """Its rows as int64: faster to gather than 16-bit floats, and float8 has no `index_copy_`."""
    return buffer.view(-1, buffer.shape[-1]).view(torch.int64)


def _rows_of(columns: Tensor, row_ids: Tensor) -> Tensor:
    """Buffer rows [layers, ids] of columns [N, layers, kv_heads, count]."""
    layers = columns.shape[1]
    rows = row_ids[:, None].expand(-1, layers, -1, -1).gather(-1, columns)
    return rows.transpose(0, 1).flatten(1)


class _PoolRows:
    """`Layers` of a pool: rows [N, kv_heads, columns, head_dim] by layer, gathered when read."""

    def __init__(self, buffers: Sequence[Tensor], row_ids: Tensor) -> None:
        self.buffers = buffers
        self.row_ids = row_ids

    def __getitem__(self, layer: int) -> Tensor:
        rows = _as_words(self.buffers[layer]).index_select(0, self.row_ids.flatten())
        return rows.view(self.buffers[layer].dtype).view(*self.row_ids.shape, -1)


def _move(buffers: Sequence[Tensor], rows: Tensor, sources: Tensor) -> None:
    """Copy row `sources`[l, i] of every layer's buffer over its row `rows`[l, i]."""
    for buffer, to, source in zip(buffers, rows, sources, strict=True):
        words = _as_words(buffer)
        words.index_copy_(0, to, words.index_select(0, source))
