"""Rounds: planned while slots are allocated, carried out right before the forward that follows."""

from __future__ import annotations

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

    slots: [physical length] int64, the row as it was when the round was planned.
    logical_length: tokens processed so far; the recent window holds its last ones.
    """

    cache: RequestCache
    row: int
    slots: torch.Tensor
    logical_length: int

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
                    pool.query_ring.last(request.row, request.logical_length, params.window)
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
            rounds=torch.tensor([request.cache.rounds for request in group], device=device),
            logical_lengths=torch.tensor(
                [request.logical_length for request in group], device=device
            ),
            first_head=pool.first_head,
            **params.policy.fields(),
        )
        for index, request in enumerate(group):
            request.cache.unread_sums.append((result.round_sums, index))
            self.rounds += 1
            self.evicted_tokens += len(request.slots) - params.budget
