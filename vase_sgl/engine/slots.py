"""What the KV slots of a scheduler are taken by, for metrics and `/server_info`."""

from __future__ import annotations

import dataclasses
from typing import Any

from vase_sgl.engine.request_cache import evicting_cache_of


@dataclasses.dataclass(frozen=True)
class Slots:
    """KV slots (one slot = one token in every layer) at one moment.

    reserved: most that the running requests with a budget may hold, shared prompts counted for
        each, and what the others have seen: for them nothing is reserved.
    owned: held by running requests, the prefix tree's locked part included.
    available: nobody's, or only the prefix tree's.
    physical, logical: cached and seen tokens of the running requests with a budget.
    """

    total: int
    available: int
    reserved: int
    owned: int
    physical: int
    logical: int

    @classmethod
    def of(cls, scheduler: Any) -> Slots:
        total = scheduler.max_total_num_tokens
        available = int(
            scheduler.token_to_kv_pool_allocator.available_size()
            + scheduler.tree_cache.evictable_size()
        )
        reserved = physical = logical = 0
        for req in scheduler.running_batch.reqs:
            seen = len(req.origin_input_ids) + len(req.output_ids)
            cache = evicting_cache_of(req)
            if cache is None:
                reserved += seen
                continue
            reserved += cache.max_slots(req.sampling_params.max_new_tokens)
            logical += seen
            physical += seen - cache.evicted_by(cache.rounds_at(seen))
        return cls(total, available, reserved, total - available, physical, logical)
