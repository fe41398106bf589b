"""Admission: read a request's budget, reserve exactly its static slots, refuse what never fits."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from fastapi import HTTPException
from sglang.srt.beam_search.batch_tail import num_beam_member_rows
from sglang.srt.beam_search.fork import collect_orphan_slots
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.managers.utils import is_health_check_generate_req

from vase_sgl.engine import inspector
from vase_sgl.engine.config import engine_config
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.prometheus import engine_metrics
from vase_sgl.engine.request_cache import (
    RequestCache,
    attach,
    cache_of,
    detach,
    evicting_cache_of,
)
from vase_sgl.eviction import EvictionParams, ParameterError
from vase_sgl.eviction.params import SPARE_PAGES

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

#: The key of `SamplingParams.custom_params` that carries the eviction parameters.
PARAMS_KEY = "vase"


def create_request(
    original: Callable[..., Req], scheduler: Scheduler, recv_req: Any, *args: Any, **kwargs: Any
) -> Req:
    """AROUND `Scheduler._create_generation_req`: attach a `RequestCache`, or abort with a 400."""
    req = original(scheduler, recv_req, *args, **kwargs)
    if (problem := _prompt_problem(req, recv_req, scheduler.model_config.vocab_size)) is not None:
        req.set_finish_with_abort(problem)
        return req
    config = engine_config()
    custom = req.sampling_params.custom_params
    raw = custom.get(PARAMS_KEY) if isinstance(custom, dict) else None
    obstacle = _obstacle(recv_req)
    if raw is None and config.default is not None and not is_health_check_generate_req(recv_req):
        if obstacle is None:
            raw = config.default
        else:
            _warn_of_full_cache(obstacle)
    if raw is None:
        return req
    try:
        params = EvictionParams.parse(raw, config.limits)
        if obstacle is not None:
            if not params.policy.evicts:
                return req  # as stock SGLang serves it
            raise ParameterError(f"a budget cannot be used with {obstacle}; leave one of them out")
        _refuse_policy(params.policy.name, BudgetPool.of(scheduler.req_to_token_pool))
        folder = inspector.folder_for(req.rid, config.inspect_dir) if params.inspect else None
    except ParameterError as error:
        req.set_finish_with_abort(f"custom_params.{PARAMS_KEY}: {error}")
        return req
    cache = RequestCache(
        params,
        len(req.origin_input_ids),
        page_size=scheduler.tree_cache.page_size,
        prefix_cache=not scheduler.tree_cache.disable,
    )
    attach(req, cache)
    if folder is not None:
        inspector.start(req, cache, folder)
    if (metrics := engine_metrics()) is not None:
        metrics.count_request(params)
    return req


def _prompt_problem(req: Req, recv_req: Any, vocabulary: int) -> str | None:
    """Why the prompt cannot run; upstream does not check, and its scheduler ends on the error."""
    if recv_req.mm_inputs is not None:
        return None  # placeholders of images lie beyond the vocabulary of some models
    if not req.origin_input_ids:  # embeddings have one placeholder each
        return "the prompt is empty; send at least one token"
    # Not those of a session's earlier turns, among which may be images.
    ids = recv_req.input_ids
    for token in (min(ids), max(ids)) if ids else ():
        if not 0 <= token < vocabulary:
            return f"input_ids: {token} is no token; ids are from 0 to {vocabulary - 1}"
    return None


def _obstacle(recv_req: Any) -> str | None:
    """What of the request reads its KV row by logical length, or keeps it after the end."""
    used = {
        "beam_width": (recv_req.sampling_params.beam_width or 1) > 1,
        "session_params": recv_req.session_params is not None,
        "return_routed_experts": bool(recv_req.return_routed_experts),
        "return_indexer_topk": bool(recv_req.return_indexer_topk),
        "input_embeds": recv_req.input_embeds is not None,
        # Placeholders are expanded after a request was given its budget.
        "images, audio or video": recv_req.mm_inputs is not None,
    }
    return next((name for name, is_used in used.items() if is_used), None)


@functools.cache
def _warn_of_full_cache(obstacle: str) -> None:
    """Once for each: the default is for memory's sake."""
    logger.warning(
        "a request with %s keeps the full KV cache: it cannot have the budget of --vase-default",
        obstacle,
    )


def _refuse_policy(policy: str, pool: BudgetPool) -> None:
    if (reason := pool.refused_policies.get(policy)) is not None:
        raise ParameterError(
            f"policy {policy} cannot run on this worker: its kernels do not compile ({reason}); "
            "choose another policy, or start the worker with another --kv-cache-dtype or with "
            "VASE_KERNELS=reference"
        )


def forget_refused(result: None, req: Req, *args: Any, **kwargs: Any) -> None:
    """AFTER `Req.set_finish_with_abort`, by which upstream refuses too (grammars, lengths, ...).

    Upstream still admits the request once, as one token. So it must fit any pool, and wait neither
    for the slots that its prompt would have reserved nor for a query ring.
    """
    inspector.forget(req)
    detach(req)
    sampling = req.sampling_params
    if sampling.max_new_tokens != 0:  # 0: nothing but a prefill was asked for
        sampling.max_new_tokens, sampling.min_new_tokens = 1, 0


def bound_max_new_tokens(original: Callable[..., None], scheduler: Scheduler, req: Req) -> None:
    """AROUND `Scheduler.init_req_max_new_tokens`: a budget lifts the pool's bound on length.

    Output is bounded by the context length and the operator's limit alone. A request whose static
    slots exceed the whole pool can never run: it is aborted with a 400 that says by how much.
    """
    cache = evicting_cache_of(req)
    if cache is None:
        original(scheduler, req)
        return
    sampling = req.sampling_params
    wanted = sampling.max_new_tokens if sampling.max_new_tokens is not None else 1 << 30
    if (limit := scheduler.max_new_tokens_limit or 0) > 0:  # SGLANG_MAX_NEW_TOKENS_LIMIT
        wanted = min(wanted, limit)
    room = scheduler.model_config.context_len - 1 - len(req.origin_input_ids) - 1
    sampling.max_new_tokens = max(0, min(wanted, room))
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)
    slots = cache.max_slots(sampling.max_new_tokens) + SPARE_PAGES * cache.page_size
    if slots > scheduler.max_total_num_tokens:
        req.set_finish_with_abort(
            f"the request needs {slots} KV slots (prompt {cache.prompt_tokens}, budget "
            f"{cache.params.budget}, window {cache.params.window}) but the pool holds "
            f"{scheduler.max_total_num_tokens}; lower the budget or shorten the prompt"
        )


class ReservingPrefillAdder(PrefillAdder):
    """Charges a budgeted request the slots it may ever hold (`RequestCache.max_slots`)."""

    def _get_running_request_total_token_offset(self, req: Req) -> int:
        cache = evicting_cache_of(req)
        if cache is None:
            return super()._get_running_request_total_token_offset(req)
        limit = cache.max_slots(req.sampling_params.max_new_tokens)
        return max(0, limit - cache.in_pages(req.kv.kv_allocated_len))

    def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> Any:
        if self.new_chunked_req is not None:
            # Of its prompt only this chunk is charged. An aligned cut leaves room in the step.
            return AddReqResult.OTHER
        cache = cache_of(req)
        needs_ring = cache is not None and cache.params.policy.needs_queries
        ring = BudgetPool.of(self.tree_cache.req_to_token_pool).query_ring
        if needs_ring and not ring.has_room():
            return AddReqResult.OTHER  # waits, and with it what came later
        if any((req.input_embeds is None) != (it.input_embeds is None) for it in self.can_run_list):
            return AddReqResult.OTHER  # upstream's forward takes tokens or embeddings, not both
        admitted = len(self.can_run_list)
        with _charged_growth(req), self._estimated(req):
            result = super().add_one_req(req, *args, **kwargs)
        if needs_ring and len(self.can_run_list) > admitted:
            ring.admit(req)
        return result

    @contextlib.contextmanager
    def _estimated(self, req: Req) -> Iterator[None]:
        """Within: `ignore_eos` is no reason to simulate how all requests grow to their ends.

        Upstream does that without a prefix cache. But budgeted requests do not grow to their ends:
        with one there, nobody who came later would be let in. And the simulation wants a slot more
        than a request may be bounded to, so the largest would wait for ever, alone too.
        """
        sampling = req.sampling_params
        saved = sampling.ignore_eos
        sampling.ignore_eos = saved and self._can_simulate()
        try:
            yield
        finally:
            sampling.ignore_eos = saved

    def _can_simulate(self) -> bool:
        others = [*(self.running_batch.reqs if self.running_batch else ()), *self.can_run_list]
        return bool(others) and not any(map(evicting_cache_of, others))

    def add_chunked_req(self, req: Req) -> Any:
        with _charged_growth(req):
            return super().add_chunked_req(req)


@contextlib.contextmanager
def _charged_growth(req: Req) -> Iterator[None]:
    """Within: upstream's admission arithmetic sees the slots the request will really take.

    Upstream charges `min(max_new_tokens, CLIP_MAX_NEW_TOKENS)`, and simulates full growth under
    `ignore_eos`. Both are restored on exit; the scheduler is single-threaded.
    """
    cache = evicting_cache_of(req)
    if cache is None:
        yield
        return
    sampling = req.sampling_params
    saved = sampling.max_new_tokens, sampling.ignore_eos, schedule_policy.CLIP_MAX_NEW_TOKENS
    growth = cache.max_slots(sampling.max_new_tokens) - len(req.full_untruncated_fill_ids)
    sampling.max_new_tokens = len(req.output_ids) + max(growth, 0)
    sampling.ignore_eos = False
    schedule_policy.CLIP_MAX_NEW_TOKENS = 1 << 30
    try:
        yield
    finally:
        sampling.max_new_tokens, sampling.ignore_eos, schedule_policy.CLIP_MAX_NEW_TOKENS = saved


def reserving_adder(result: type[PrefillAdder], scheduler: Scheduler) -> type[PrefillAdder]:
    """AFTER `Scheduler.get_prefill_adder_class` (an upstream override point)."""
    if result is not PrefillAdder:
        raise RuntimeError(f"vase_sgl extends PrefillAdder, but SGLang now uses {result.__name__}")
    return ReservingPrefillAdder


def decode_slots_needed(
    original: Callable[..., int], batch: ScheduleBatch, selected_indices: list[int] | None = None
) -> int:
    """AROUND `ScheduleBatch.new_tokens_required_next_decode`: saturated requests take no slot.

    Upstream counts one slot per request; with the pool full of saturated budgets that would
    retract requests for room nobody needs. A first round takes what it copies of a shared prompt.
    """
    if not any(cache_of(req) for req in batch.reqs):
        return original(batch, selected_indices)
    indices = range(len(batch.reqs)) if selected_indices is None else selected_indices
    lengths = batch.seq_lens_cpu.tolist()
    page_size = batch.tree_cache.page_size
    needed = num_beam_member_rows([batch.reqs[index] for index in indices])
    for index in indices:
        req = batch.reqs[index]
        cache = evicting_cache_of(req)
        if cache is not None and lengths[index] >= cache.trigger:
            shared = max(0, req.kv.cache_protected_len - cache.pinned)
            needed += cache.fresh_slots(shared)
        elif lengths[index] >= req.kv.kv_allocated_len and lengths[index] % page_size == 0:
            needed += page_size
    return needed


def free_orphans_of_beams(batch: ScheduleBatch) -> None:
    """BEFORE `ScheduleBatch.retract_decode`: free the slots that no beam refers to any more.

    Upstream frees them a step later, and those of a beam group that is aborted only after it has
    looked for further requests to retract.
    """
    groups = [req.beam_group for req in batch.reqs if req.beam_group is not None]
    if not any(group.pending_orphans for group in groups):
        return
    torch.get_device_module(batch.device).synchronize()  # the forward writes who refers to what
    for group in groups:
        staged, group.pending_orphans = group.pending_orphans, []
        for entry in staged:
            orphans = collect_orphan_slots(entry.old_mapping, entry.new_mapping)
            group.slots_freed += len(orphans)
            batch.token_to_kv_pool_allocator.free(orphans)


def retraction_order(result: list[int], order: list[int], reqs: list[Req]) -> list[int]:
    """AFTER `beam_retraction_order`: requests without a budget go first, then beams.

    The list is popped from its end, and upstream puts beams, which it aborts, in front. A budgeted
    request holds a reservation, so it is never what filled the pool.
    """
    budgeted = [index for index in result if evicting_cache_of(reqs[index]) is not None]
    return budgeted + [index for index in result if evicting_cache_of(reqs[index]) is None]


def release_for_retraction(original: Callable[..., bool], *, req: Req, **kwargs: Any) -> bool:
    """AROUND `schedule_batch.release_req`: a budgeted request ends with 503 instead of restarting.

    Retraction re-prefills the whole text, which rebuilds a cache that eviction had changed: the
    answer could not be replayed. Returning False is upstream's "cannot be resumed".
    """
    resumable = original(req=req, **kwargs)
    return resumable and evicting_cache_of(req) is None


def refuse_retracting_pause(_manager: Any, obj: Any, *_: Any, **__: Any) -> None:
    """BEFORE `TokenizerManager.pause_generation`: a 400 for mode `retract`, which restarts all.

    A restart rebuilds a cache that eviction had changed; see `release_for_retraction`.
    """
    if obj.mode == "retract":
        raise HTTPException(
            400, "with KV budgets there is no pause that retracts; use mode in_place or abort"
        )
