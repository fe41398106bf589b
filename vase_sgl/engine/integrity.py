"""`VASE_CHECK_INTEGRITY=1`: prove after every decode step what the design promises."""

from __future__ import annotations

from typing import Any

import torch

from vase_sgl.engine.integrity_log import integrity_error
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.request_cache import evicting_cache_of


def after_step(result: None, scheduler: Any, *args: Any) -> None:
    """AFTER `Scheduler.process_batch_result`."""
    check_running(scheduler)


def check_running(scheduler: Any) -> None:
    """Raise `IntegrityError` unless, for the requests that are decoding:

    lengths are within bounds; every private slot has one owner and is not free; slots shared with
    the prefix tree are not free and no round may write them; every kept (layer, head) set of
    positions has no duplicate and contains the whole recent window.
    """
    batch = scheduler.running_batch
    rows = batch.req_to_token_pool.req_to_token if batch.reqs else None
    private: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []
    # Rows beyond the requests are members of beam groups.
    for req, length in zip(batch.reqs, _lengths(batch), strict=False):
        if rows is None or req.finished():
            continue  # its slots have been given back
        kv = req.kv
        slots = rows[kv.req_pool_idx, : kv.kv_allocated_len].to(torch.int64)
        private.append(slots[kv.cache_protected_len :])
        shared.append(slots[: kv.cache_protected_len])
        cache = evicting_cache_of(req)
        if cache is None:
            continue
        allocated, limit = kv.kv_allocated_len, cache.trigger
        _require(length <= allocated, req, f"{length} entries in {allocated} slots")
        _require(length <= limit, req, f"{length} entries, round due at {limit}")
        _require(allocated <= limit, req, f"{allocated} slots, reservation {limit}")
        if cache.planned_rounds:
            writable = kv.cache_protected_len - cache.pinned
            _require(writable <= 0, req, f"{writable} columns of the prefix tree are writable")
            _check_positions(BudgetPool.of(batch.req_to_token_pool), req, cache, slots[:length])
    if not private:
        return
    owned, tree = torch.cat(private), torch.cat(shared)
    _require(len(owned.unique()) == len(owned), None, "a slot is owned twice")
    _require(not torch.isin(owned, tree).any(), None, "a shared slot is owned by a request too")
    free = _free_slots(scheduler.token_to_kv_pool_allocator)
    _require(not torch.isin(owned, free).any(), None, "an owned slot is in the free list")
    _require(not torch.isin(tree, free).any(), None, "a shared slot is in the free list")


def _free_slots(allocator: Any) -> torch.Tensor:
    """int64 slots that the allocator may hand out."""
    if allocator.page_size == 1:
        return torch.cat([allocator.free_pages, allocator.release_pages]).to(torch.int64)
    pages = allocator.get_all_free_pages().to(torch.int64) * allocator.page_size
    return (pages[:, None] + torch.arange(allocator.page_size, device=pages.device)).flatten()


def _lengths(batch: Any) -> list[int]:
    return batch.seq_lens_cpu.tolist() if batch.reqs else []


def _check_positions(pool: BudgetPool, req: Any, cache: Any, slots: torch.Tensor) -> None:
    """Kept positions of one request, all layers and heads at once."""
    params = cache.params
    logical = len(slots) + cache.evicted_by(cache.planned_rounds)
    # [layers, budget, heads]
    kept = pool.token_positions[:, slots[cache.pinned : cache.kept_length], :]
    ordered = kept.sort(dim=1).values
    _require(bool((ordered.diff(dim=1) > 0).all()), req, "a token position is kept twice")
    newest = logical - (len(slots) - cache.kept_length) - 1
    window = torch.arange(
        newest - params.window + 1, newest + 1, dtype=kept.dtype, device=kept.device
    )
    tail = ordered[:, -params.window :, :]
    _require(bool((tail == window[:, None]).all()), req, "the recent window is not kept whole")
    _require(bool((ordered[:, 0] >= cache.pinned).all()), req, "a pinned position was moved")


def _require(condition: bool, req: Any, text: str) -> None:
    if not condition:
        raise integrity_error(f"request {req.rid}: {text}" if req is not None else text)
