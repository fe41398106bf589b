"""The one object that hangs on a request: its budget and what has been evicted so far."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch
from vase_kernels.reference import chain, format_digest

from vase_sgl.eviction import EvictionParams

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclasses.dataclass(slots=True, eq=False)
class RequestCache:
    """Budget bookkeeping of one request. Everything here is host arithmetic on its own lengths.

    trigger: physical length at which the next round is due.
    rounds: rounds planned so far; evicted_tokens: tokens evicted so far, per layer and KV head.
    unread_sums: per round not read yet, a tensor and this request's index in it (see
        `vase_kernels` digest); read only when somebody asks for the digest.
    """

    params: EvictionParams
    prompt_tokens: int
    trigger: int
    rounds: int = 0
    evicted_tokens: int = 0
    unread_sums: list[tuple[torch.Tensor, int]] = dataclasses.field(default_factory=list)
    _digests: list[str] = dataclasses.field(default_factory=list)
    _digest: torch.Tensor = dataclasses.field(default_factory=lambda: torch.tensor(0))

    @classmethod
    def start(cls, params: EvictionParams, prompt_tokens: int) -> RequestCache:
        return cls(params, prompt_tokens, trigger=params.max_slots(prompt_tokens))

    @property
    def evicts(self) -> bool:
        return self.params.policy.evicts

    @property
    def steady_slots(self) -> int:
        """Slots owned from the first round on."""
        return self.params.budget + self.params.window

    def max_slots(self, max_new_tokens: int) -> int:
        """Slots the request may ever own; the newest token's entry is never needed."""
        total = self.prompt_tokens + max_new_tokens
        return min(self.trigger, total) if self.evicts else total

    def record_round(self, physical_length: int) -> None:
        """A round has been planned at `physical_length`; the row shrinks to the budget."""
        self.rounds += 1
        self.evicted_tokens += physical_length - self.params.budget
        self.trigger = self.steady_slots

    def digests(self) -> list[str]:
        """Chained eviction digest after each round. Waits for the device; not to be changed."""
        for sums, index in self.unread_sums:
            self._digest = chain(self._digest, sums[index].cpu())
            self._digests.append(format_digest(int(self._digest)))
        self.unread_sums.clear()
        return self._digests

    def statistics(self, output_tokens: int, max_new_tokens: int) -> dict[str, Any]:
        """What `meta_info["vase"]` says. The newest token has no KV entry yet."""
        digests = self.digests()
        logical = self.prompt_tokens + output_tokens
        return {
            "rounds": self.rounds,
            "evicted_tokens": self.evicted_tokens,
            "physical_length": max(logical - 1, 0) - self.evicted_tokens,
            "logical_length": logical,
            "reserved_slots": self.max_slots(max_new_tokens),
            "digest": digests[-1] if digests else format_digest(0),
        }


#: Caches by request. Weak: SGLang decides when a request is gone.
_caches: weakref.WeakKeyDictionary[Req, RequestCache] = weakref.WeakKeyDictionary()


def attach(req: Req, cache: RequestCache) -> None:
    _caches[req] = cache


def cache_of(req: Req) -> RequestCache | None:
    """The request's cache, or None: full KV, as in stock SGLang."""
    return _caches.get(req)


def evicting_cache_of(req: Req) -> RequestCache | None:
    """As `cache_of`, but None as well for a policy that never evicts."""
    cache = _caches.get(req)
    return cache if cache is not None and cache.evicts else None
