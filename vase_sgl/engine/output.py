"""What goes to the client with an answer: statistics of a budgeted request as `meta_info["vase"]`,
and the stamp of the worker's fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from vase_sgl.engine.fingerprint import stamp
from vase_sgl.engine.prometheus import engine_metrics
from vase_sgl.engine.request_cache import cache_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

META_KEY = "vase"
#: Of a finished answer, with a budget or without: the fingerprint of the process that ends it.
STAMP_KEY = "vase_fingerprint"


class BudgetOutputStreamer(SchedulerOutputStreamer):
    """Adds the budget's statistics to every output; the final one lists each round's digest."""

    has_additional_customized_info: ClassVar[bool] = True

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list[Any]]:
        statistics = [_statistics(req) for req in reqs]
        found: dict[str, list[Any]] = {META_KEY: statistics} if any(statistics) else {}
        if any(req.finished() for req in reqs):
            mark = stamp()
            found[STAMP_KEY] = [mark if req.finished() else None for req in reqs]
        return found


def _statistics(req: Req) -> dict[str, Any] | None:
    cache = cache_of(req)
    limit = req.sampling_params.max_new_tokens
    if cache is None or limit is None:  # None: refused before upstream gave it one
        return None
    statistics = cache.statistics(len(req.output_ids_through_stop), limit)
    if req.finished():
        statistics["round_digests"] = cache.digests(statistics["rounds"])
        if (metrics := engine_metrics()) is not None:
            metrics.count_finished(cache, statistics["rounds"])
    return statistics


def budget_streamer(
    result: type[SchedulerOutputStreamer], scheduler: Any
) -> type[SchedulerOutputStreamer]:
    """AFTER `Scheduler.get_output_streamer_class` (an upstream override point)."""
    if result is not SchedulerOutputStreamer:
        raise RuntimeError(
            f"vase_sgl extends SchedulerOutputStreamer, but SGLang now uses {result.__name__}"
        )
    return BudgetOutputStreamer


def place_statistics(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    finish_reason: dict[str, Any] | None,
) -> None:
    """AROUND `TokenizerManager.update_request_meta_info`: the latest statistics, as one object.

    Upstream accumulates per-token lists; these are totals.
    """
    ours = {META_KEY, STAMP_KEY}
    others = {key: value for key, value in customized_info.items() if key not in ours}
    original(manager, meta_info, state, others, index, finish_reason)
    for key in ours & customized_info.keys():
        if (value := customized_info[key][index]) is not None:
            meta_info[key] = value
