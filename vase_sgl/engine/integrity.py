"""`VASE_CHECK_INTEGRITY=1`: prove after every decode step what the design promises."""

from __future__ import annotations

from typing import Any

import torch

from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.request_cache import evicting_cache_of


class IntegrityError(RuntimeError):
    """A budget invariant does not hold. The server must not go on."""


def check_batch(scheduler: Any, batch: Any) -> None:
    """Raise `IntegrityError` unless, for every budgeted request of a decode batch:

    lengths are within bounds; the slots of all requests are distinct and not free; every kept
    (layer, head) set of positions has no duplicate, contains the whole recent window, and (before
    the first round) is everything.
    """
    pool = BudgetPool.of(batch.req_to_token_pool)
    rows = batch.req_to_token_pool.req_to_token
    owned: list[torch.Tensor] = []
    # Rows beyond the requests are members of beam groups.
    for req, length in zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=False):
        if req.finished():
            continue  # its slots have been given back
        allocated = req.kv.kv_allocated_len
        slots = rows[req.kv.req_pool_idx, :allocated].to(torch.int64)
        owned.append(slots)
        cache = evicting_cache_of(req)
        if cache is None:
            continue
        _require(length <= allocated, req, f"{length} entries in {allocated} slots")
        limit = cache.trigger
        _require(length <= limit, req, f"{length} entries, round due at {limit}")
        _require(allocated <= limit, req, f"{allocated} slots, reservation {limit}")
        if cache.rounds:
            _check_positions(pool, req, cache, slots[:length])
    if not owned:
        return
    taken = torch.cat(owned)
    _require(len(taken.unique()) == len(taken), None, "a slot is owned twice")
    allocator = scheduler.token_to_kv_pool_allocator
    free = torch.cat([allocator.free_pages, allocator.release_pages]).to(torch.int64)
    _require(not torch.isin(taken, free).any(), None, "an owned slot is in the free list")


def _check_positions(pool: BudgetPool, req: Any, cache: Any, slots: torch.Tensor) -> None:
    """Kept positions of one request, all layers and heads at once."""
    budget = cache.params.budget
    logical = len(slots) + cache.evicted_tokens
    kept = pool.token_positions[:, slots[:budget], :]  # [layers, budget, heads]
    ordered = kept.sort(dim=1).values
    _require(bool((ordered.diff(dim=1) > 0).all()), req, "a token position is kept twice")
    newest = logical - (len(slots) - budget) - 1
    window = torch.arange(
        newest - cache.params.window + 1, newest + 1, dtype=kept.dtype, device=kept.device
    )
    tail = ordered[:, -cache.params.window :, :]
    _require(bool((tail == window[:, None]).all()), req, "the recent window is not kept whole")
    _require(bool((ordered[:, 0] >= 0).all()), req, "a negative token position")


def _require(condition: bool, req: Any, text: str) -> None:
    if not condition:
        raise IntegrityError(f"request {req.rid}: {text}" if req is not None else text)
