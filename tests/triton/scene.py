"""A pool with due requests, run through the kernels and through the reference.

Kernels run on `DEVICE`, on a copy of the scene; the scene itself, the reference and every
comparison stay on the CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vase_kernels.evict import PoolView, Result, evict
from vase_kernels.reference import evict_reference
from vase_kernels.requests import DueRequest, pack
from vase_kernels.workspace import Maxima, Workspace

from tests.triton.device import DEVICE

FIELDS = {
    "vase-attnv": ("num_sinks", "pool_width"),
    "vase-dkv": ("num_sinks", "projection_dim"),
    "curdkv": ("num_sinks", "projection_dim"),
    "snapkv": ("num_sinks", "pool_width"),
    "rkv": ("num_sinks", "pool_width", "mix_lambda"),
    "random": ("num_sinks",),
    "streaming": ("num_sinks",),
    "knorm": ("num_sinks",),
    "evict-largest-values": ("num_sinks",),
}
POLICIES = tuple(FIELDS)
#: Their keys equal the reference's bit for bit, on every device.
EXACT = ("random", "streaming", "evict-largest-values")
ALLOCATION_GUARD = 3  # slots before and after the pool in its allocation


def due(row: int, length: int, budget: int, window: int, **fields: Any) -> DueRequest:
    """A request in its first round, unless told otherwise."""
    fields = {"round": 1, "seed": (977 << 33) + row, "logical_length": length} | fields
    return DueRequest(
        row=row, ring_row=row + 1, length=length, budget=budget, window=window, **fields
    )


@dataclasses.dataclass
class Scene:
    """The pool's buffers lie inside larger allocations, so that guard rows can be compared."""

    allocations: list[Tensor]  # K of every layer, then V
    positions: Tensor
    req_to_token: Tensor
    ring: Tensor
    first_head: int = 6
    attention_scale: float | None = None

    @property
    def buffers(self) -> list[Tensor]:
        return [x[ALLOCATION_GUARD:-ALLOCATION_GUARD] for x in self.allocations]

    @property
    def k(self) -> list[Tensor]:
        return self.buffers[: len(self.buffers) // 2]

    @property
    def v(self) -> list[Tensor]:
        return self.buffers[len(self.buffers) // 2 :]

    @property
    def view(self) -> PoolView:
        return PoolView.of(
            self.k,
            self.v,
            self.positions,
            self.req_to_token,
            first_head=self.first_head,
            attention_scale=self.attention_scale,
        )

    def clone(self) -> Scene:
        return dataclasses.replace(
            self,
            allocations=[x.clone() for x in self.allocations],
            positions=self.positions.clone(),
        )

    def to(self, device: str) -> Scene:
        """A copy on another device; on the same one, itself."""
        return dataclasses.replace(
            self,
            allocations=[x.to(device) for x in self.allocations],
            positions=self.positions.to(device),
            req_to_token=self.req_to_token.to(device),
            ring=self.ring.to(device),
        )

    def take_back(self, other: Scene) -> None:
        """The content of a scene that was copied to a device."""
        for mine, theirs in zip(self.allocations, other.allocations, strict=True):
            mine.copy_(theirs)
        self.positions.copy_(other.positions)


def make_scene(
    requests: list[DueRequest],
    *,
    layers: int = 2,
    heads: int = 2,
    group: int = 1,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spare: int = 7,
    attention_scale: float | None = None,
) -> Scene:
    """Rows are as each request's `row` says; later rounds get stored positions in any order.

    Pinned rows are NaN, and their stored positions impossible: reading one would show.
    """
    g = torch.Generator().manual_seed(seed)
    rows = max(r.row for r in requests) + 2
    context = max(r.length for r in requests) + 5
    num_slots = sum(r.length for r in requests) + spare
    slots = torch.randperm(num_slots, generator=g).to(torch.int32)
    req_to_token = torch.zeros(rows, context, dtype=torch.int32)
    positions = torch.full((layers, num_slots, heads), -1, dtype=torch.int32)
    allocations = [
        torch.empty(num_slots + 2 * ALLOCATION_GUARD, heads, dim).to(dtype)
        for _ in range(2 * layers)
    ]
    ring_window = max(r.window for r in requests) + 3
    ring = torch.zeros(layers, rows, ring_window, heads * group, dim, dtype=query_dtype(dtype))
    for x in allocations:
        x.copy_(torch.randn(x.shape, generator=g).to(dtype))
    used = 0
    for r in requests:
        # Content depends on the request alone, so that it can be placed elsewhere.
        own = torch.Generator().manual_seed(r.seed % 2**31 + r.length)
        mine = slots[used : used + r.length]
        used += r.length
        req_to_token[r.row, : r.length] = mine
        for x in allocations:
            rows_of = torch.randn(r.length, heads, dim, generator=own).to(dtype)
            rows_of[: r.pinned] = torch.nan
            x.view(torch.uint8)[mine.long() + ALLOCATION_GUARD] = rows_of.view(torch.uint8)
        queries = torch.randn(layers, r.window, heads * group, dim, generator=own)
        at = torch.arange(r.logical_length - r.window, r.logical_length) % ring_window
        ring[:, r.ring_row, at] = queries.to(ring.dtype)
        positions[:, mine[: r.pinned].long()] = -99
        if r.round > 1:
            older = r.logical_length - (r.length - r.pinned - r.budget)
            kept = mine[r.pinned : r.pinned + r.budget].long()
            for layer in range(layers):
                for head in range(heads):
                    choice = torch.randperm(older - r.pinned, generator=own)[: r.budget]
                    positions[layer, kept, head] = (choice + r.pinned).to(torch.int32)
    return Scene(allocations, positions, req_to_token, ring, attention_scale=attention_scale)


def query_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def make_workspace(scene: Scene, requests: list[DueRequest], extra: int = 0) -> Workspace:
    layers, _, heads = scene.positions.shape
    maxima = Maxima(
        requests=len(requests) + extra,
        columns=max(r.length - r.pinned for r in requests) + extra,
        budget=max(r.budget for r in requests) + extra,
        window=max(r.window for r in requests),
        group=scene.ring.shape[3] // heads,
    )
    return Workspace(maxima, layers=layers, kv_heads=heads, device=DEVICE)


def run_kernels(
    policy: str, scene: Scene, requests: list[DueRequest], workspace: Workspace | None = None
) -> Result:
    """One round on `DEVICE`; its result comes back to the CPU, and so does the scene."""
    workspace = workspace or make_workspace(scene, requests)
    table = pack(requests, workspace.maxima.requests).to(DEVICE)
    there = scene.to(DEVICE)
    result = evict(policy, there.view, table, there.ring, workspace)
    if DEVICE != "cpu":
        scene.take_back(there)
    return Result(*(x.cpu() for x in result))


def fields_of(policy: str, r: DueRequest) -> dict[str, Any]:
    """The policy's own fields, as the reference takes them."""
    fields = {name: getattr(r, name) for name in FIELDS[policy]}
    if policy == "vase-attnv":
        fields["protected_share"] = r.num_protected / r.budget
    return fields


def run_reference(policy: str, scene: Scene, r: DueRequest) -> Tensor:
    """The reference's `round_sums`, one request at a time: a ragged batch is no batch to it."""
    at = torch.arange(r.logical_length - r.window, r.logical_length) % scene.ring.shape[2]
    return evict_reference(
        policy,
        scene.k,
        scene.v,
        scene.positions,
        scene.req_to_token[r.row, None, : r.length],
        scene.ring[None, :, r.ring_row, at].transpose(2, 3),
        budget=r.budget,
        window=r.window,
        pinned=r.pinned,
        seeds=torch.tensor([r.seed]),
        rounds=torch.tensor([r.round]),
        logical_lengths=torch.tensor([r.logical_length]),
        first_head=scene.first_head,
        attention_scale=scene.attention_scale,
        **fields_of(policy, r),
    )


def keys_left_in(workspace: Workspace, scene: Scene, requests: list[DueRequest]) -> list[Tensor]:
    """Per request, the retention keys that a round leaves behind: [layers, heads, candidates]."""
    order = workspace.order.cpu()
    keys = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    layers, _, heads = scene.positions.shape
    keys = keys.view(len(keys), layers, heads, -1)
    return [keys[n, ..., : r.length - r.pinned - r.window] for n, r in enumerate(requests)]


def assert_same_bytes(a: Scene, b: Scene) -> None:
    """Whole allocations: kept rows, rows given up, neighbours, guard rows."""
    assert torch.equal(a.positions, b.positions)
    for x, y in zip(a.allocations, b.allocations, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
