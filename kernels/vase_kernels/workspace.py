"""Scratch of the eviction kernels, allocated once."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

#: Blocks of queries divide it, and so does a row of `Workspace.lse`: nobody masks a load of one.
MAX_BLOCK_Q = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Maxima:
    """The largest batch a workspace serves; grids and scratch have these sizes always.

    requests : due in one call
    columns : tokens of one request's row but the pinned, so prompt + window for a first round
    budget : kept tokens
    window, group : queries of a window; query heads of a KV head
    """

    requests: int
    columns: int
    budget: int
    window: int = 64
    group: int = 1

    @property
    def queries(self) -> int:
        """Length of a row of `lse`: a power of two a query head, up to a whole block."""
        queries = self.group << (self.window - 1).bit_length()
        return -(-queries // MAX_BLOCK_Q) * MAX_BLOCK_Q


class Workspace:
    """Scratch for `evict`, whose content before a call does not matter.

    Bytes: about (8 * columns + 12 * budget + 4 * window * group) per request, layer and KV head.
    One call at a time: calls that share a workspace must be on one stream. With `memory` (uint8,
    at least `bytes_for(...)`) it lies there, and nothing is allocated.

    round_sums : int64 [requests], faults : int32 [requests]
        What the last call reported.
    """

    def __init__(
        self,
        maxima: Maxima,
        *,
        layers: int,
        kv_heads: int,
        device: torch.device | str,
        memory: Tensor | None = None,
    ) -> None:
        self.maxima = maxima
        self.layers, self.kv_heads = layers, kv_heads
        places = (maxima.requests, layers * kv_heads)
        used = 0

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            nonlocal used
            if memory is None:
                return torch.empty(shape, dtype=dtype, device=device)
            start, used = used, used + _aligned(math.prod(shape) * dtype.itemsize)
            if used > len(memory):
                raise ValueError(f"{maxima} needs more than {len(memory)} bytes")
            part = memory[start : start + math.prod(shape) * dtype.itemsize]
            return part.view(dtype).view(shape)

        self.order = empty(*places, maxima.columns, dtype=torch.int32)
        self.weights = empty(*places, maxima.columns, dtype=torch.float32)
        self.lse = empty(*places, maxima.queries, dtype=torch.float32)
        self.edges = empty(*places, dtype=torch.int64)
        self.holes = empty(*places, maxima.budget, dtype=torch.int64)
        self.sources = empty(*places, maxima.budget, dtype=torch.int32)
        self.num_holes = empty(*places, dtype=torch.int32)
        self.round_sums = empty(maxima.requests, dtype=torch.int64)
        self.faults = empty(maxima.requests, dtype=torch.int32)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(_aligned(x.nbytes) for x in self.tensors.values())

    @classmethod
    def bytes_for(cls, maxima: Maxima, *, layers: int, kv_heads: int) -> int:
        """What a workspace of these maxima takes of `memory`."""
        return cls(maxima, layers=layers, kv_heads=kv_heads, device="meta").nbytes


def _aligned(size: int) -> int:
    """Up to the next multiple of 256 bytes, as the allocator starts a tensor."""
    return -(-size // 256) * 256
