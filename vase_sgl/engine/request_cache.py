"""The one object that hangs on a request: its budget and what has been evicted so far."""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from vase_kernels.reference import chain, format_digest

from vase_sgl.eviction import EvictionParams

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from vase_sgl.engine.inspector import Recording


@dataclasses.dataclass(slots=True, eq=False)
class RequestCache:
    """Budget bookkeeping of one request. Everything here is host arithmetic on its own lengths.

    page_size: slots are handed out by this many; column c lies at offset c % page_size of a page.
    prefix_cache: the worker shares prompts between requests, so the first round of prompt mode
        `evict` copies what is shared.
    planned_rounds: rounds planned so far. Under the overlap scheduler the plan is one step ahead
        of the answer, so what an answer reports goes by its own length (`rounds_at`).
    ring_row: the request's row of the query ring; 0 if it has none.
    pinned: leading columns that no round touches: the prompt in mode `keep`.
    kept_length: physical length right after a round.
    steady_slots: slots the request's row spans from the first round on.
    first_trigger: physical (and logical) length at which the first round is due.
    unread_sums: per round not read yet, a host tensor that the device fills before the step's
        tokens, and this request's index in it (see `vase_kernels` digest).
    recording: what it kept, if it asked for `inspect`.
    """

    params: EvictionParams
    prompt_tokens: int
    page_size: int
    prefix_cache: bool
    planned_rounds: int = 0
    ring_row: int = 0
    unread_sums: deque[tuple[torch.Tensor, int]] = dataclasses.field(default_factory=deque)
    recording: Recording | None = None
    _digests: list[str] = dataclasses.field(default_factory=list)
    _digest: torch.Tensor = dataclasses.field(default_factory=lambda: torch.tensor(0))
    evicts: bool = dataclasses.field(init=False)
    pinned: int = dataclasses.field(init=False)
    kept_length: int = dataclasses.field(init=False)
    steady_slots: int = dataclasses.field(init=False)
    first_trigger: int = dataclasses.field(init=False)
    #: By max_new_tokens, of which a request has one.
    _first_reservation: dict[int, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # What stays the same is asked for in every step.
        self.evicts = self.params.policy.evicts
        self.pinned = self.params.pinned(self.prompt_tokens)
        self.kept_length = self.params.kept_length(self.prompt_tokens)
        self.steady_slots = self.params.steady_slots(self.prompt_tokens)
        self.first_trigger = self.params.first_round_length(self.prompt_tokens)

    @property
    def trigger(self) -> int:
        """Physical length at which the next round is due."""
        return self.steady_slots if self.planned_rounds else self.first_trigger

    def fresh_slots(self, shared: int) -> int:
        """Slots the first round takes if `shared` unpinned columns (whole pages) are the tree's."""
        return min(shared, self.in_pages(self.steady_slots))

    def in_pages(self, slots: int) -> int:
        """`slots`, up to whole pages."""
        return -(-slots // self.page_size) * self.page_size

    def max_slots(self, max_new_tokens: int) -> int:
        """Slots the request may still hold at once, the shared prompt included; whole pages."""
        return self._max_slots_after(self.planned_rounds, max_new_tokens)

    def _max_slots_after(self, rounds: int, max_new_tokens: int) -> int:
        """The peak is the first round (see `EvictionParams.reserved_slots`); from then on the
        request holds `steady_slots`.
        """
        if rounds:
            return self.in_pages(self.steady_slots)
        if max_new_tokens not in self._first_reservation:
            self._first_reservation[max_new_tokens] = self.params.reserved_slots(
                self.prompt_tokens,
                max_new_tokens,
                prefix_cache=self.prefix_cache,
                page_size=self.page_size,
            )
        return self._first_reservation[max_new_tokens]

    def plan_round(self) -> int:
        """Count one more planned round; returns its logical length (tokens with a KV entry)."""
        logical_length = self.trigger + self.evicted_by(self.planned_rounds)
        self.planned_rounds += 1
        return logical_length

    def rounds_at(self, logical_length: int) -> int:
        """Rounds that an answer of `logical_length` tokens (prompt and output) has behind it.

        A round due at E entries runs before the forward of token E, whose answer has E + 2 tokens.
        """
        beyond = logical_length - 2 - self.first_trigger
        return 0 if beyond < 0 or not self.evicts else 1 + beyond // self.params.window

    def evicted_by(self, rounds: int) -> int:
        """Tokens evicted in the first `rounds` rounds, per layer and KV head."""
        if rounds == 0:
            return 0
        return self.first_trigger - self.kept_length + (rounds - 1) * self.params.window

    def digests(self, rounds: int) -> list[str]:
        """Chained eviction digest after each of the first `rounds` rounds."""
        self._read_sums(rounds)
        return self._digests[:rounds]

    def digest(self, rounds: int) -> str:
        """The last of `digests(rounds)`, without a copy of them all."""
        self._read_sums(rounds)
        return self._digests[rounds - 1] if rounds else format_digest(0)

    def _read_sums(self, rounds: int) -> None:
        while len(self._digests) < rounds:
            sums, index = self.unread_sums.popleft()
            self._digest = chain(self._digest, sums[index])
            self._digests.append(format_digest(int(self._digest)))

    def statistics(self, output_tokens: int, max_new_tokens: int) -> dict[str, Any]:
        """What `meta_info["vase"]` says. The newest token has no KV entry yet."""
        logical = self.prompt_tokens + output_tokens
        rounds = self.rounds_at(logical)
        evicted = self.evicted_by(rounds)
        return {
            "rounds": rounds,
            "evicted_tokens": evicted,
            "physical_length": max(logical - 1, 0) - evicted,
            "logical_length": logical,
            "reserved_slots": self._max_slots_after(rounds, max_new_tokens),
            "digest": self.digest(rounds),
        }


#: Caches by request. Weak: SGLang decides when a request is gone.
_caches: weakref.WeakKeyDictionary[Req, RequestCache] = weakref.WeakKeyDictionary()


def attach(req: Req, cache: RequestCache) -> None:
    _caches[req] = cache


def detach(req: Req) -> None:
    """The request runs on as in stock SGLang."""
    _caches.pop(req, None)


def cache_of(req: Req) -> RequestCache | None:
    """The request's cache, or None: full KV, as in stock SGLang."""
    return _caches.get(req)


def evicting_cache_of(req: Req) -> RequestCache | None:
    """As `cache_of`, but None as well for a policy that never evicts."""
    cache = _caches.get(req)
    return cache if cache is not None and cache.evicts else None
