"""Rounds: planned while slots are allocated, carried out right before the forward that follows."""

from __future__ import annotations

import collections
import dataclasses
import time
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from vase_kernels.reference import evict_reference

if TYPE_CHECKING:
    from vase_sgl.engine.pool import BudgetPool
    from vase_sgl.engine.request_cache import RequestCache


@dataclasses.dataclass(frozen=True, eq=False)
class DueRequest:
    """One request whose physical length reached its trigger.

    round: number of this round, from 1.
    slots: [columns] int64, the request's row as the round works on it, without pinned columns.
        All columns below the budget are the request's own.
    logical_length: tokens with a KV entry so far; the recent window holds the last ones.
    copied: slots (source, target), int64 each, whose rows are copied first: a shared prompt.
    """

    cache: RequestCache
    round: int
    slots: torch.Tensor
    logical_length: int
    copied: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[object, ...]:
        """Requests with equal shape run in one launch."""
        params = self.cache.params
        fields = tuple(sorted(params.policy.fields().items()))
        return len(self.slots), params.budget, params.window, params.policy.name, fields


class Compaction:
    """The queue between allocation (plans) and forward (carries out). At most one plan waits."""

    def __init__(self) -> None:
        self._queued: list[DueRequest] = []
        # The overlap scheduler runs one step ahead: tensors of a plan live until its forward is
        # surely done.
        self._in_flight: collections.deque[list[DueRequest]] = collections.deque(maxlen=4)
        self.rounds = 0
        self.evicted_tokens = 0
        self.seconds = 0.0

    def queue(self, due: list[DueRequest]) -> None:
        if self._queued:
            raise RuntimeError("a compaction was planned but its decode step never ran")
        self._queued = due

    @property
    def pending(self) -> bool:
        return bool(self._queued)

    def run(self, pool: BudgetPool) -> None:
        """Carry out the queued rounds. Mutates KV rows, token positions and `unread_sums`."""
        due, self._queued = self._queued, []
        if not due:
            return
        started = time.perf_counter()
        self._in_flight.append(due)
        for request in due:
            if request.copied is not None:
                pool.copy_rows(*request.copied)
        due.sort(key=lambda request: repr(request.shape))
        for _, group in groupby(due, key=lambda request: request.shape):
            self._run_group(pool, list(group))
        self.seconds += time.perf_counter() - started

    def _run_group(self, pool: BudgetPool, group: list[DueRequest]) -> None:
        params = group[0].cache.params
        device = pool.token_positions.device
        queries = None
        if params.policy.needs_queries:
            queries = torch.stack(
                [
                    pool.query_ring.last(
                        request.cache.ring_row, request.logical_length, params.window
                    )
                    for request in group
                ]
            )
        result = evict_reference(
            params.policy.name,
            pool.k_buffers,
            pool.v_buffers,
            pool.token_positions,
            torch.stack([request.slots for request in group]),
            queries,
            budget=params.budget,
            window=params.window,
            seeds=torch.tensor([request.cache.params.seed for request in group], device=device),
            rounds=torch.tensor([request.round for request in group], device=device),
            logical_lengths=torch.tensor(
                [request.logical_length for request in group], device=device
            ),
            first_head=pool.first_head,
            **params.policy.fields(),
        )
        sums = _to_host(result.round_sums)
        for index, request in enumerate(group):
            request.cache.unread_sums.append((sums, index))
            self.rounds += 1
            self.evicted_tokens += len(request.slots) - params.budget


def _to_host(sums: torch.Tensor) -> torch.Tensor:
    """A host copy that is complete when the step's tokens are: same stream, copied before them."""
    if sums.device.type == "cpu":
        return sums
    host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
    return host.copy_(sums, non_blocking=True)
