"""Decode-time slots: grow to the reservation, then overwrite. Who is due is host arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.allocation import alloc_for_decode_default, alloc_token_slots
from sglang.srt.runtime_context import get_exec

from vase_sgl.engine import platform_cpu
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.request_cache import RequestCache, cache_of, evicting_cache_of
from vase_sgl.engine.rounds import PlannedRound
from vase_sgl.engine.transfer import to_device

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def alloc_for_decode(batch: ScheduleBatch, token_per_req: int) -> torch.Tensor:
    """The decode allocation of SGLang's registry (`ALLOC_FOR_DECODE_FUNCS`).

    A batch without budgets takes the stock path. Otherwise, in this order: shorten the physical
    length of due requests and queue their round, allocate slots for rows that still grow, give
    back surplus slots of long prompts and locks on shared ones (allocations before frees: a slot
    freed here may still be the source of this step's compaction).

    Mutates `batch.seq_lens`, `batch.seq_lens_cpu` (replaced, never written in place), the
    requests' `kv` records and token rows. Returns slots [batch] int64 for the new tokens.
    """
    caches = [cache_of(req) for req in batch.reqs]
    if not any(caches):
        return alloc_for_decode_default(batch, token_per_req)
    if token_per_req != 1:
        raise RuntimeError("a KV budget needs one token per decode step; turn off speculation")
    pool = BudgetPool.of(batch.req_to_token_pool)
    pool.query_ring.map_new(batch.reqs)
    lengths = batch.seq_lens_cpu.tolist()
    frees: list[Callable[[], None]] = []
    due: list[PlannedRound] = []
    for index, req in enumerate(batch.reqs):
        cache = evicting_cache_of(req)
        if cache is not None and lengths[index] >= cache.trigger:
            due.append(_plan_round(batch, req, cache, lengths[index], frees))
            lengths[index] = cache.kept_length
    if due:
        pool.compaction.queue(due)
        batch.seq_lens_cpu = torch.tensor(lengths, dtype=batch.seq_lens_cpu.dtype)
        host_lengths = batch.seq_lens_cpu.to(batch.seq_lens.dtype)
        batch.seq_lens = to_device(host_lengths, batch.seq_lens.device)
    _grow(batch, lengths)
    for free in frees:
        free()
    if frees:
        batch.batch_is_full = False  # room came back although nobody left: reopen admission
    for req in batch.reqs:
        req.kv.kv_committed_len = req.kv.kv_allocated_len
    rows = batch.req_to_token_pool.req_to_token
    return rows[batch.req_pool_indices, batch.seq_lens].to(torch.int64)


def keep_decoded_out(
    original: Callable[..., None], tree: Any, req: Req, *, up_to: int, **kwargs: Any
) -> None:
    """AROUND `UnifiedRadixCache.checkpoint_into_tree`: only rows of a prefill enter the tree.

    Decode rounds differently, so whoever found its rows there would answer differently from one
    who has to prefill them. The row's other slots are freed as if the tree had not been asked.
    """
    if platform_cpu.is_active() or get_exec().deterministic.enable_deterministic_inference:
        up_to = min(up_to, req.extend_end)
    original(tree, req, up_to=up_to, **kwargs)


def _plan_round(
    batch: ScheduleBatch,
    req: Req,
    cache: RequestCache,
    length: int,
    frees: list[Callable[[], None]],
) -> PlannedRound:
    if length != cache.trigger or req.decode_batch_idx < 1:
        raise RuntimeError(
            f"request {req.rid} holds {length} KV entries after {req.decode_batch_idx} decode "
            f"steps but was due at {cache.trigger}"
        )
    row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    slots = row[cache.pinned : length].to(torch.int64)
    shared = max(0, req.kv.cache_protected_len - cache.pinned)
    logical_length = cache.plan_round()
    copied = None
    if shared:
        slots, copied = _leave_prefix_tree(batch, req, cache, slots, shared, frees)
    elif length > cache.steady_slots:
        _free_columns(batch, req, cache.in_pages(cache.steady_slots), length, frees)
        req.kv.kv_allocated_len = cache.steady_slots
    if (trace := req.time_stats.trace_ctx).tracing_enable:
        trace.trace_event(
            "vase.evict",
            level=1,
            attrs={
                "vase.round": cache.planned_rounds,
                "vase.logical_length": logical_length,
                "vase.physical_length": length,
                "vase.kept_length": cache.kept_length,
            },
        )
    req.skip_radix_cache_insert = True  # compacted KV never enters a prefix tree
    return PlannedRound(
        cache=cache,
        round=cache.planned_rounds,
        slots=slots,
        logical_length=logical_length,
        copied=copied,
    )


def _leave_prefix_tree(
    batch: ScheduleBatch,
    req: Req,
    cache: RequestCache,
    slots: torch.Tensor,
    shared: int,
    frees: list[Callable[[], None]],
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Give the request private slots in place of the `shared` leading columns of the tree.

    Columns below the budget are copied, because the round writes them; shared columns beyond it
    are only read by the round. Surplus slots and the lock on the prefix are given back after
    this step's allocations (`frees`).

    Mutates the request's row and `kv` record. Returns the row for the round, and (source, target)
    of the copy.
    """
    steady = cache.steady_slots
    num_copied = min(shared, cache.params.budget)
    num_fresh = cache.fresh_slots(shared)
    fresh = alloc_token_slots(batch.tree_cache, num_fresh).to(torch.int64)
    source = torch.cat([fresh[:num_copied], slots[num_copied:]])
    _free_columns(batch, req, max(shared, cache.in_pages(steady)), len(slots), frees)
    row = torch.cat([fresh, slots[num_fresh:steady]])[:steady]
    batch.req_to_token_pool.write((req.kv.req_pool_idx, slice(0, steady)), row.to(torch.int32))
    frees.append(partial(batch.tree_cache.unlock, req.lock))
    req.lock = None
    req.kv.cache_protected_len = req.kv.cache_inserted_len = 0
    req.kv.kv_allocated_len = steady
    return source, (slots[:num_copied], fresh[:num_copied])


def _free_columns(
    batch: ScheduleBatch, req: Req, start: int, end: int, frees: list[Callable[[], None]]
) -> None:
    """Later, give back the slots of columns [start, end); `start` begins a page."""
    if start < end:
        free = batch.tree_cache.token_to_kv_pool_allocator.free_segment
        row = batch.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        frees.append(partial(free, row[start:end].to(torch.int64), start_pos=start))


def _grow(batch: ScheduleBatch, lengths: list[int]) -> None:
    """One more slot for every row that has none for its next token.

    The first column of a page takes a new page, the others the next slot of theirs. Rows beyond
    the requests are members of beam groups (page size 1); they always grow.
    """
    growing = [i for i, req in enumerate(batch.reqs) if lengths[i] >= req.kv.kv_allocated_len]
    rows = [*growing, *range(len(batch.reqs), len(lengths))]
    if not rows:
        return
    page_size = batch.tree_cache.page_size
    starting = [row for row in rows if lengths[row] % page_size == 0]
    within = [row for row in rows if lengths[row] % page_size != 0]
    table = batch.req_to_token_pool.req_to_token
    if starting:
        pages = alloc_token_slots(batch.tree_cache, len(starting) * page_size)
        index = to_device(torch.tensor(starting), table.device)
        batch.req_to_token_pool.write(
            (batch.req_pool_indices[index], batch.seq_lens[index]),
            pages[::page_size].to(torch.int32),
        )
    if within:
        index = to_device(torch.tensor(within), table.device)
        owners, columns = batch.req_pool_indices[index], batch.seq_lens[index]
        batch.req_to_token_pool.write((owners, columns), table[owners, columns - 1] + 1)
    for i in growing:
        batch.reqs[i].kv.kv_allocated_len += 1
