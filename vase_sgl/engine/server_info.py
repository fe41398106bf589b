"""What the worker tells about itself: `/server_info` -> `internal_states[0]["vase"]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_parallel

from vase_sgl.engine.config import engine_config
from vase_sgl.engine.fingerprint import WeightsNotRead, fingerprint, stamp
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.slots import Slots


def answers_for_worker() -> bool:
    """Whether this rank's answers are sent; the others would read all weights for nobody."""
    return bool(get_parallel().attn_tp_rank == 0)


def report_state(result: Any, controller: Any, recv_req: Any) -> Any:
    """AFTER `SchedulerInternalStateController.get_internal_state`, which every rank runs."""
    if not answers_for_worker():
        return result
    scheduler = controller.scheduler
    try:
        result.internal_state["vase"] = describe(scheduler)
    except WeightsNotRead as error:
        result.internal_state["vase"] = {"not_ready": str(error)}
    return result


def describe(scheduler: Any) -> dict[str, Any]:
    """Slots (one slot = one token in every layer), rounds so far, limits, fingerprint.

    `query_ring`: the memory of one request's ring, in slots. `refused_policies`: the reason by
    policy.
    """
    config = engine_config()
    pool = BudgetPool.of(scheduler.req_to_token_pool)
    slots = Slots.of(scheduler)
    return {
        "model_name": _model_name(scheduler.server_args),
        "fingerprint": fingerprint(scheduler),
        "fingerprint_stamp": stamp(),
        "limits": {
            "max_budget": config.limits.max_budget,
            "max_window": config.limits.max_window,
            "max_requests": pool.query_ring.requests,
        },
        "inspect": config.inspect_dir is not None,
        "refused_policies": pool.refused_policies,
        "default": dict(config.default) if config.default is not None else None,
        "context_length": scheduler.model_config.context_len,
        "vocab_size": scheduler.model_config.vocab_size,
        "slots": {
            "total": slots.total,
            "available": slots.available,
            "reserved": slots.reserved,
            "owned": slots.owned,
            "query_ring": pool.ring_row_slots,
        },
        "prefix_cache": not scheduler.tree_cache.disable,
        "page_size": scheduler.tree_cache.page_size,
        "running_requests": len(scheduler.running_batch.reqs),
        "waiting_requests": _waiting(scheduler),
        "query_requests": pool.query_ring.owned,
        "max_running_requests": scheduler.max_running_requests,
        "rounds": pool.compaction.rounds,
        "evicted_tokens": pool.compaction.evicted_tokens,
        "compaction_seconds": pool.compaction.seconds,
        "buffers_mib": {
            "query_ring": pool.query_ring.nbytes / 2**20,
            "scratch": pool.scratch_bytes / 2**20,
            "token_positions": pool.token_positions.nbytes / 2**20,
        },
    }


def _waiting(scheduler: Any) -> int:
    """How many requests do not decode yet: in the queue, between two chunks, just prefilled."""
    here = {*scheduler.waiting_queue, *scheduler.collect_inflight_reqs()}
    if scheduler.chunked_req is not None:
        here.add(scheduler.chunked_req)
    return sum(not req.finished() for req in here.difference(scheduler.running_batch.reqs))


def _model_name(args: Any) -> str:
    """What clients call the model: `--served-model-name`, or the last part of the model's path.

    Without the flag SGLang sets it to the path.
    """
    name = args.served_model_name
    return str(name) if name and name != args.model_path else Path(args.model_path).name
