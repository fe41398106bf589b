"""One eviction round to be measured: its shape, what it must move, and the ways to carry it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vase_kernels.evict import PoolView, evict
from vase_kernels.reference import (
    SCORERS,
    Candidates,
    evict_reference,
    retention_keys,
    select_victims,
)
from vase_kernels.requests import (
    LOGICAL_LENGTH,
    MAX_PROJECTION,
    ROUND,
    SEED,
    DueRequest,
    pack,
    table_fields,
)
from vase_kernels.scoring import Round
from vase_kernels.workspace import Maxima, Workspace

from benchmarks.device_clock import flush_l2
from vase_sgl.eviction import POLICIES as POLICY_CLASSES


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    kv_heads: int
    group: int
    head_dim: int
    window: int
    budget: int
    requests: int

    @property
    def columns(self) -> int:
        return self.budget + self.window

    @property
    def places(self) -> int:
        """Requests times layers times KV heads."""
        return self.requests * self.layers * self.kv_heads

    @property
    def pool_bytes(self) -> int:
        return 2 * self.places * self.columns * self.head_dim * 2

    def floor_bytes(self, policy: str) -> int:
        """Bytes that a round of all requests must move, as the head of this file counts them."""
        reads, row = SCORERS[policy], self.head_dim * 2
        candidates = (reads.reads_keys + reads.reads_values) * self.budget * row
        queries = reads.reads_queries * self.group * self.window * row
        moved = 4 * self.window * row
        words = 8 * self.budget
        return self.places * (candidates + queries + moved + words)

    def tensor_operations(self, policy: str) -> int:
        """Multiplications and additions of the kernels' matrix products in a round of bfloat16."""
        if SCORERS[policy].reads_queries:  # once for the sums, once for the weights
            return self.places * 4 * self.budget * self.group * self.window * self.head_dim
        if policy in ("vase-dkv", "curdkv"):  # K and V by each of the three parts of G
            return self.places * 12 * self.budget * self.head_dim * MAX_PROJECTION
        return 0

    def exponentials(self, policy: str) -> int:
        """Of the kernels' softmax in a round, both passes."""
        reads = SCORERS[policy].reads_queries
        return self.places * 2 * reads * self.budget * self.group * self.window


class Case:
    """A filled pool in its second round, and the ways to carry out a round.

    Between two rounds `advance` must be called: tokens that come have positions of their own.
    """

    def __init__(
        self,
        shape: Shape,
        policy: str,
        device: torch.device,
        *,
        drawn_on: torch.device | None = None,
    ) -> None:
        """`drawn_on`: whose random numbers fill it; None: the device's own."""
        self.shape, self.policy = shape, policy
        source = device if drawn_on is None else drawn_on
        n, columns = shape.requests, shape.columns
        slots = torch.randperm(n * columns, device=source).to(device, torch.int32)
        self.req_to_token = slots.view(n, columns)
        rows = (n * columns, shape.kv_heads, shape.head_dim)
        self.k, self.v = (
            [_normal(rows, source).to(device) for _ in range(shape.layers)] for _ in range(2)
        )
        self.positions = torch.zeros(
            shape.layers, n * columns, shape.kv_heads, dtype=torch.int32, device=device
        )
        order = torch.arange(columns, dtype=torch.int32, device=device)
        self.positions[:, self.req_to_token.long()] = order[None, None, :, None]
        heads = shape.kv_heads * shape.group
        queries = (shape.layers, n, shape.window, heads, shape.head_dim)
        self.ring = _normal(queries, source).to(device)
        requests = [
            DueRequest(
                row=i,
                ring_row=i,
                length=columns,
                budget=shape.budget,
                window=shape.window,
                round=2,
                logical_length=columns,
                seed=i,
                **table_fields(shape.budget, POLICY_CLASSES[policy]().fields()),
            )
            for i in range(n)
        ]
        self.table = pack(requests, n).to(device)

    def advance(self) -> None:
        """Since the last round `window` tokens have come to every request, so the next is due.

        `window` is also the length of the query ring, so its rows stay in the order of tokens.
        In the engine a forward pass lies between, so a GPU's L2 holds none of the pool after this.
        """
        self.table[:, ROUND.value] += 1
        self.table[:, LOGICAL_LENGTH.value] += self.shape.window
        recent = self.req_to_token[:, self.shape.budget :].long()
        for buffer in (*self.k, *self.v):
            # Copies of the rows that came before would tie with them, and ties cost time.
            buffer[recent] = torch.randn_like(buffer[recent])
        flush_l2(recent.device)

    def round(self) -> Round:
        """What the kernels are launched with."""
        shape = self.shape
        view = PoolView.of(self.k, self.v, self.positions, self.req_to_token)
        maxima = Maxima(shape.requests, shape.columns, shape.budget, shape.window, shape.group)
        workspace = Workspace(
            maxima, layers=shape.layers, kv_heads=shape.kv_heads, device=self.table.device
        )
        return Round(self.policy, view, self.table, self.ring, workspace)

    def kernels(self, r: Round) -> Callable[[], Tensor]:
        return lambda: evict(r.policy, r.pool, r.requests, r.queries, r.workspace).round_sums

    def reference(self) -> Callable[[], Tensor]:
        """`evict_reference` on the same device."""
        return lambda: evict_reference(
            self.policy,
            self.k,
            self.v,
            self.positions,
            self.req_to_token,
            self._queries(),
            budget=self.shape.budget,
            window=self.shape.window,
            **self._counters(),
        )

    def gather_all(self) -> Callable[[], Tensor]:
        """Score alike, then gather every kept row and copy it back, as VaSE's own code does."""

        def step() -> Tensor:
            shape, n = self.shape, self.shape.requests
            slots = self.req_to_token.long()
            older = slots[:, : shape.budget]
            heads = torch.arange(shape.kv_heads, device=slots.device)
            victims = slots
            for layer in range(shape.layers):
                candidates = self._candidates(layer)
                victims = select_victims(self.policy, candidates, shape.window, budget=shape.budget)
                gone = torch.zeros(
                    n, shape.kv_heads, shape.columns, dtype=torch.bool, device=slots.device
                ).scatter_(-1, victims[:, 0], True)
                kept = gone.to(torch.uint8).argsort(dim=-1, stable=True)[..., : shape.budget]
                source = slots[:, None].expand_as(gone).gather(-1, kept)
                for buffer in (self.k[layer], self.v[layer]):
                    rows = buffer[source, heads[None, :, None]]
                    buffer[older] = rows.transpose(1, 2)
            return victims

        return step

    def edge_gaps(self) -> Tensor:
        """How far apart, in shares of them, the last key evicted and the first one kept are.

        [layers, requests, kv_heads], as the reference computes them.
        """
        shape, gaps = self.shape, []
        for layer in range(shape.layers):
            keys = retention_keys(self.policy, self._candidates(layer), budget=shape.budget)
            ordered = keys.double().sort(-1).values[:, 0]
            last, first = ordered[..., shape.window - 1], ordered[..., shape.window]
            gaps.append((first - last) / torch.maximum(first.abs(), last.abs()))
        return torch.stack(gaps)

    def _candidates(self, layer: int) -> Candidates:
        counters = self._counters()
        older = self.req_to_token[:, : self.shape.budget].long()
        k, v = (x[layer][older].transpose(1, 2) for x in (self.k, self.v))
        return Candidates(
            keys=(k,),
            values=(v,),
            queries=self._queries()[:, layer, None],
            positions=self.positions[layer][older].transpose(1, 2)[:, None].long(),
            seed=counters["seeds"],
            round=counters["rounds"],
            layers=torch.tensor([layer], device=older.device),
            heads=torch.arange(self.shape.kv_heads, device=older.device),
        )

    def _queries(self) -> Tensor:
        return self.ring.permute(1, 0, 3, 2, 4)

    def _counters(self) -> dict[str, Any]:
        """Columns of the table by the reference's names."""
        columns = {"rounds": ROUND, "logical_lengths": LOGICAL_LENGTH, "seeds": SEED}
        return {name: self.table[:, column.value] for name, column in columns.items()}


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)
