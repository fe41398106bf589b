"""`VASE_CHECK_INTEGRITY=1`: prove after every step what the design promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.environ import envs

from vase_sgl.engine.integrity_log import integrity_error
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.request_cache import evicting_cache_of


def ask_for_checks() -> None:
    """Mutates the environment: SGLang's event loops call its own check, and so ours, if asked."""
    if not envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
        envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.set(1)


def after_step(original: Callable[..., None], checker: Any) -> None:
    """AROUND `SchedulerInvariantChecker.self_check_during_busy`: where a turn of the loop ends.

    There every request with slots is in the last batch, among those that decode, or between two
    chunks of its prompt, and upstream proves that free, owned and tree slots add up to the pool.
    """
    check_bookkeeping(checker)
    try:
        original(checker)
    except AssertionError as error:
        raise integrity_error(str(error) or "SGLang's own check failed") from error


def check_bookkeeping(checker: Any) -> None:
    """Raise `IntegrityError` unless every private slot has one owner and is not free, slots shared
    with the prefix tree are not free and no round may write them, and, of requests that decode,
    lengths are within bounds and every kept (layer, head) set of positions has no duplicate and
    contains the whole recent window.
    """
    owners = _owners(checker)
    if not owners:
        return
    # A step's rounds run on a stream of their own.
    torch.get_device_module(checker.req_to_token_pool.device).synchronize()
    _check_decoding(checker.get_running_batch())
    rows = checker.req_to_token_pool.req_to_token
    private, shared = [], []
    for kv in owners:
        slots = rows[kv.req_pool_idx, : kv.kv_allocated_len].to(torch.int64)
        private.append(slots[kv.cache_protected_len :])
        shared.append(slots[: kv.cache_protected_len])
    owned, tree = torch.cat(private), torch.cat(shared)
    _require(len(owned.unique()) == len(owned), None, "a slot is owned twice")
    _require(not torch.isin(owned, tree).any(), None, "a shared slot is owned by a request too")
    free = _free_slots(checker.token_to_kv_pool_allocator)
    _require(not torch.isin(owned, free).any(), None, "an owned slot is in the free list")
    _require(not torch.isin(tree, free).any(), None, "a shared slot is in the free list")


def _owners(checker: Any) -> list[Any]:
    """The KV records of all requests that have slots."""
    batches = (checker.get_last_batch(), checker.get_running_batch())
    reqs = [req for batch in batches if batch is not None for req in batch.reqs]
    if (chunked := checker.get_chunked_req()) is not None:
        reqs.append(chunked)
    return list({id(req.kv): req.kv for req in reqs if req.kv.holds_kv}.values())


def _check_decoding(batch: Any) -> None:
    """Lengths and kept positions."""
    # Rows beyond the requests are members of beam groups.
    lengths = batch.seq_lens_cpu.tolist() if batch.reqs else []
    for req, length in zip(batch.reqs, lengths, strict=False):
        cache = evicting_cache_of(req)
        if cache is None or req.finished():
            continue  # finished: its slots have been given back
        kv = req.kv
        allocated, limit = kv.kv_allocated_len, cache.trigger
        _require(length <= allocated, req, f"{length} entries in {allocated} slots")
        _require(length <= limit, req, f"{length} entries, round due at {limit}")
        _require(allocated <= limit, req, f"{allocated} slots, reservation {limit}")
        if cache.planned_rounds:
            writable = kv.cache_protected_len - cache.pinned
            _require(writable <= 0, req, f"{writable} columns of the prefix tree are writable")
            slots = batch.req_to_token_pool.req_to_token[kv.req_pool_idx, :length]
            _check_positions(BudgetPool.of(batch.req_to_token_pool), req, cache, slots.long())


def _free_slots(allocator: Any) -> torch.Tensor:
    """int64 slots that the allocator may hand out."""
    if allocator.page_size == 1:
        return torch.cat([allocator.free_pages, allocator.release_pages]).to(torch.int64)
    pages = allocator.get_all_free_pages().to(torch.int64) * allocator.page_size
    return (pages[:, None] + torch.arange(allocator.page_size, device=pages.device)).flatten()


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
