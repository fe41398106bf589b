"""What a request needs of the worker that it goes to."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from vase_sgl.eviction.params import SPARE_PAGES, reserved_slots
from vase_sgl.eviction.policies import POLICIES
from vase_sgl.gateway.workers import Model, WorkerInfo, WorkerRequest

#: Of the context, and of the slots, what SGLang wants a prompt to leave, at least.
BESIDE_PROMPT = 7


@dataclasses.dataclass(frozen=True)
class Need:
    """What a request needs of a worker.

    eviction: as in `WorkerRequest`, but None if nothing is ever evicted.
    reads_queries: its policy needs one of the worker's query rings.
    model: what it was tokenized for; None: any, as the caller looks at it.
    """

    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    eviction: Mapping[str, Any] | None
    reads_queries: bool
    model: Model | None = None

    @classmethod
    def of(cls, request: WorkerRequest, model: Model | None = None) -> Need:
        """The need of a request."""
        eviction, reads_queries = request.eviction, False
        if eviction is not None:
            # Of a policy that this version lacks (an old record's) the worker says what is wrong.
            policy = POLICIES.get(str(eviction["policy"]))
            if policy is not None:
                reads_queries = policy.needs_queries
                eviction = eviction if policy.evicts else None
        max_new_tokens = int(request.sampling["max_new_tokens"])
        return cls(request.prompt_token_ids, max_new_tokens, eviction, reads_queries, model)

    def slots(self, info: WorkerInfo) -> int:
        """KV slots it surely takes there: what the worker reserves for it.

        Without eviction the prompt's, as how far it grows nobody knows.
        """
        return len(self.prompt_token_ids) if self.eviction is None else self.slots_at_most(info)

    def slots_at_most(self, info: WorkerInfo) -> int:
        """KV slots it may come to own there."""
        prompt = len(self.prompt_token_ids)
        if self.eviction is None:
            return prompt + self.max_new_tokens
        return reserved_slots(
            prompt,
            self.max_new_tokens,
            budget=int(self.eviction["budget"]),
            window=int(self.eviction["window"]),
            prompt=str(self.eviction["prompt"]),
            prefix_cache=info.prefix_cache,
            page_size=info.page_size,
        )

    def is_for(self, info: WorkerInfo) -> bool:
        """Whether the worker serves its model."""
        return self.model in (None, info.model)

    def excess_slots(self, info: WorkerInfo) -> int:
        """Slots that the worker lacks to run it at all. Above zero it refuses it, busy or idle."""
        slots = len(self.prompt_token_ids) + _slots_beside_prompt(info)
        if self.eviction is not None:
            slots = max(slots, self.slots(info) + SPARE_PAGES * info.page_size)
        return slots - _pool_slots(info)

    def fits(self, info: WorkerInfo) -> bool:
        """Whether the worker's model is the one, and its own ceilings and slots allow it at all."""
        if not self.is_for(info) or self.excess_slots(info) > 0:
            return False
        if len(self.prompt_token_ids) + self.max_new_tokens > info.context_length:
            return False
        return self.eviction is None or (
            int(self.eviction["budget"]) <= info.max_budget
            and int(self.eviction["window"]) <= info.max_window
        )


#: All that `Need.fits` and `Need.slots` look at.
KIND = (
    *("model", "max_budget", "max_window", "context_length"),
    *("total_slots", "rank_slots", "prefix_cache", "page_size"),
)
#: Of workers with equal kinds a request gets the same: whether it fits, and how many slots.
kind_of: Callable[[WorkerInfo], tuple[object, ...]] = operator.attrgetter(*KIND)


def max_prompt_tokens(info: WorkerInfo) -> int:
    """The longest prompt that a worker runs. With a budget it may have to be shorter."""
    return min(info.context_length - BESIDE_PROMPT, _pool_slots(info) - _slots_beside_prompt(info))


def _pool_slots(info: WorkerInfo) -> int:
    return info.rank_slots or info.total_slots


def _slots_beside_prompt(info: WorkerInfo) -> int:
    """SGLang's PrefillAdder wants a page beside the prompt, and strictly less than what is free."""
    return max(BESIDE_PROMPT, info.page_size + 1)
