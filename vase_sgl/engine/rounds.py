"""How queued rounds are carried out: by the Triton kernels, or by their torch reference."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from triton import knobs  # type: ignore[import-untyped]
from vase_kernels.copy_rows import copy_rows
from vase_kernels.evict import POLICIES, Result, evict
from vase_kernels.pool import PoolView
from vase_kernels.reference import evict_reference
from vase_kernels.requests import DueRequest, pack, table_fields
from vase_kernels.workspace import Maxima, Workspace

from vase_sgl.engine.config import EngineConfig
from vase_sgl.engine.integrity_log import integrity_error
from vase_sgl.engine.transfer import to_device, to_host

if TYPE_CHECKING:
    from vase_sgl.engine.pool import BudgetPool
    from vase_sgl.engine.request_cache import RequestCache

logger = logging.getLogger(__name__)

#: Scratch of the Triton rounds, unless one request alone needs more.
_SCRATCH_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedRound:
    """One request whose physical length reached its trigger.

    round: number of this round, from 1.
    slots: [columns] int64, the request's row as the round works on it, without pinned columns.
        All columns below the budget are the request's own.
    logical_length: tokens with a KV entry so far; the recent window holds the last ones.
    copied: slots (source, target), int64 each, whose rows are copied first: a shared prompt. No
        target is a source or a target of another request. Token positions are not copied: before
        a request's first round they follow from columns.
    """

    cache: RequestCache
    round: int
    slots: torch.Tensor
    logical_length: int
    copied: tuple[torch.Tensor, torch.Tensor] | None = None


class Rounds(Protocol):
    """Carries out the rounds of due requests on a pool."""

    @property
    def nbytes(self) -> int:
        """Scratch held for the life of the pool."""

    def run(self, pool: BudgetPool, due: Sequence[PlannedRound]) -> None:
        """Copy what is to be copied first, then run the rounds.

        Mutates KV rows and token positions, appends to each request's `unread_sums`.
        """


class ReferenceRounds:
    """The torch reference: requests of one shape in one call. Needs no scratch of its own."""

    nbytes = 0

    def run(self, pool: BudgetPool, due: Sequence[PlannedRound]) -> None:
        for source, target in _copies(due):
            for buffer in (*pool.k_buffers, *pool.v_buffers):
                rows = buffer.flatten(1).view(torch.int64)  # float8 has no index_copy_
                rows.index_copy_(0, target, rows.index_select(0, source))
        for _, group in groupby(sorted(due, key=_shape), key=_shape):
            _run_alike(pool, list(group))


def _copies(due: Sequence[PlannedRound]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [one.copied for one in due if one.copied is not None]


def _run_alike(pool: BudgetPool, due: list[PlannedRound]) -> None:
    """Rounds of requests of one shape."""
    params = due[0].cache.params
    device = pool.token_positions.device
    queries = None
    if params.policy.needs_queries:
        last = pool.query_ring.last
        queries = torch.stack(
            [last(one.cache.ring_row, one.logical_length, params.window) for one in due]
        )
    sums = evict_reference(
        params.policy.name,
        pool.k_buffers,
        pool.v_buffers,
        pool.token_positions,
        torch.stack([one.slots for one in due]),
        queries,
        budget=params.budget,
        window=params.window,
        seeds=torch.tensor([one.cache.params.seed for one in due], device=device),
        rounds=torch.tensor([one.round for one in due], device=device),
        logical_lengths=torch.tensor([one.logical_length for one in due], device=device),
        first_head=pool.first_head,
        attention_scale=pool.attention_scale,
        **params.policy.fields(),
    )
    _report(due, sums)


def _shape(due: PlannedRound) -> str:
    """Requests with equal shape run in one call of the reference."""
    params = due.cache.params
    fields = sorted(params.policy.fields().items())
    return repr((len(due.slots), params.budget, params.window, params.policy.name, fields))


def chosen_kernels(config: EngineConfig, device_type: str) -> str:
    """What carries out rounds here. Raises RuntimeError if what was asked for cannot."""
    if config.kernels == "auto":
        return "triton" if device_type == "cuda" else "reference"
    if config.kernels == "triton" and device_type != "cuda" and not knobs.runtime.interpret:
        raise RuntimeError(
            "VASE_KERNELS=triton needs a GPU, or TRITON_INTERPRET=1 for a slow test on a CPU"
        )
    return config.kernels


def scratch_bytes(
    *, layers: int, kv_heads: int, group: int, context_length: int, max_budget: int, window: int
) -> int:
    """Scratch of the Triton rounds: enough for the longest row and the largest budget alone."""
    columns = context_length + window
    largest = Maxima(1, columns, min(max_budget, columns), window, group)
    alone = Workspace.bytes_for(largest, layers=layers, kv_heads=kv_heads)
    return max(_SCRATCH_BYTES, alone)


class TritonRounds:
    """The Triton kernels: one launch sequence for all layers and as many requests as scratch holds.

    What is copied first is one launch for all layers and requests: it needs no scratch.
    Slots come from the plan, not from `req_to_token`, which the scheduler may rewrite meanwhile.
    Nothing waits for the device, unless `check` (`VASE_CHECK_INTEGRITY`) has every round's faults
    read.
    """

    def __init__(
        self, pool: BudgetPool, *, context_length: int, max_budget: int, check: bool
    ) -> None:
        self._check = check
        self._layers, _, self._heads = pool.token_positions.shape
        self._group = pool.query_ring.data.shape[3] // self._heads
        self._view = PoolView.of(
            pool.k_buffers,
            pool.v_buffers,
            pool.token_positions,
            torch.zeros(1, 1, dtype=torch.int32, device=pool.token_positions.device),
            first_head=pool.first_head,
            attention_scale=pool.attention_scale,
        )
        size = scratch_bytes(
            layers=self._layers,
            kv_heads=self._heads,
            group=self._group,
            context_length=context_length,
            max_budget=max_budget,
            window=pool.query_ring.window,
        )
        self._memory = torch.empty(size, dtype=torch.uint8, device=pool.token_positions.device)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def warm_up(self, pool: BudgetPool) -> dict[str, str]:
        """Compile every kernel: else all requests wait when a policy or a copy comes first.

        Mutates nothing: no row is copied and the table holds no request. Returns the policies
        whose kernels this device cannot run, with the reason.
        """
        device = self._memory.device
        nobody = torch.zeros(0, dtype=torch.int64, device=device)
        copy_rows(self._view, nobody, nobody)
        rows = torch.zeros(1, 4, dtype=torch.int32, device=device)
        failed = {}
        for policy in POLICIES:
            try:
                self._evict(policy, [], rows, pool.query_ring.data, self._maxima(1, 4, 2, 1))
            except Exception as error:  # the errors of the compiler and its tools share no type
                logger.exception("the kernels of policy %s do not compile here", policy)
                reason = str(error).strip().splitlines() or [type(error).__name__]
                failed[policy] = reason[-1][:200]
        return failed

    def run(self, pool: BudgetPool, due: Sequence[PlannedRound]) -> None:
        if copies := _copies(due):
            copy_rows(self._view, *(torch.cat(slots) for slots in zip(*copies, strict=True)))
        ordered = sorted(due, key=lambda one: (one.cache.params.policy.name, len(one.slots)))
        for policy, group in groupby(ordered, key=lambda one: one.cache.params.policy.name):
            waiting = list(group)
            while waiting:
                count = self._that_fit(waiting)
                self._launch(policy, pool, waiting[:count])
                waiting = waiting[count:]

    def _launch(self, policy: str, pool: BudgetPool, batch: list[PlannedRound]) -> None:
        maxima = self._maxima_of(batch)
        rows = padded_rows([due.slots for due in batch])
        entries = [_table_row(row, due) for row, due in enumerate(batch)]
        queries = pool.query_ring.data if batch[0].cache.params.policy.needs_queries else None
        result = self._evict(policy, entries, rows, queries, maxima)
        if self._check and bool(result.faults.any()):
            faults = [int(n) for n in result.faults[: len(batch)]]
            raise integrity_error(
                f"{policy}: heads whose victims include a sink or protected token, by request: "
                f"{faults}"
            )
        _report(batch, result.round_sums)

    def _evict(
        self,
        policy: str,
        entries: Sequence[DueRequest],
        rows: torch.Tensor,
        queries: torch.Tensor | None,
        maxima: Maxima,
    ) -> Result:
        """What the kernels report; the next call reuses its tensors."""
        device = self._memory.device
        table = to_device(pack(entries, maxima.requests), device)
        workspace = Workspace(
            maxima, layers=self._layers, kv_heads=self._heads, device=device, memory=self._memory
        )
        view = dataclasses.replace(self._view, req_to_token=rows)
        return evict(policy, view, table, queries, workspace)

    def _that_fit(self, waiting: list[PlannedRound]) -> int:
        """How many of the first requests the scratch holds; at least one always fits."""
        count = len(waiting)
        while count > 1 and self._bytes(self._maxima_of(waiting[:count])) > self.nbytes:
            count = (count + 1) // 2
        return count

    def _maxima_of(self, batch: list[PlannedRound]) -> Maxima:
        return self._maxima(
            len(batch),
            max(len(due.slots) for due in batch),
            max(due.cache.params.budget for due in batch),
            max(due.cache.params.window for due in batch),
        )

    def _maxima(self, requests: int, columns: int, budget: int, window: int) -> Maxima:
        return Maxima(requests, columns, budget, window, self._group)

    def _bytes(self, maxima: Maxima) -> int:
        return Workspace.bytes_for(maxima, layers=self._layers, kv_heads=self._heads)


def padded_rows(slots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of slots int64 [columns], filled up with 0: int32 [rows, longest].

    Not a launch for each row: of hundreds that are due in one step, the host would wait for those.
    """
    longest = max(len(row) for row in slots)
    padding = slots[0].new_zeros(longest)
    parts = [part for row in slots for part in (row, padding[len(row) :])]
    return torch.cat(parts).view(len(slots), longest).to(torch.int32)


def _table_row(row: int, due: PlannedRound) -> DueRequest:
    params = due.cache.params
    return DueRequest(
        row=row,
        ring_row=due.cache.ring_row,
        length=len(due.slots),
        budget=params.budget,
        window=params.window,
        round=due.round,
        logical_length=due.logical_length,
        seed=params.seed,
        **table_fields(params.budget, params.policy.fields()),
    )


def _report(batch: list[PlannedRound], round_sums: torch.Tensor) -> None:
    """Hand each request its sum, on the host."""
    sums = to_host(round_sums)
    for index, due in enumerate(batch):
        due.cache.unread_sums.append((sums, index))
