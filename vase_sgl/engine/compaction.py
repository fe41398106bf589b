"""Rounds: planned while slots are allocated, carried out right before the forward that follows."""

from __future__ import annotations

import collections
import time
from typing import TYPE_CHECKING

from vase_sgl.engine.rounds import PlannedRound, Rounds

if TYPE_CHECKING:
    from vase_sgl.engine.pool import BudgetPool


class Compaction:
    """The queue between allocation (plans) and forward (carries out). At most one plan waits.

    seconds: host time; on CUDA the launches only.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._queued: list[PlannedRound] = []
        # The overlap scheduler runs one step ahead: tensors of a plan live until its forward is
        # surely done.
        self._in_flight: collections.deque[list[PlannedRound]] = collections.deque(maxlen=4)
        self._rounds = rounds
        self.rounds = 0
        self.evicted_tokens = 0
        self.seconds = 0.0

    def queue(self, due: list[PlannedRound]) -> None:
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
        self._rounds.run(pool, due)
        self.rounds += len(due)
        for request in due:
            budget = request.cache.params.budget
            self.evicted_tokens += len(request.slots) - budget
            if (recording := request.cache.recording) is not None:
                kept = pool.token_positions.index_select(1, request.slots[:budget])
                recording.note(request.round, request.logical_length, kept)
        self.seconds += time.perf_counter() - started
