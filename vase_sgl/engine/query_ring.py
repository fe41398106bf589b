"""The last queries of running requests, for policies that score by attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vase_kernels.query_ring import store_queries

from vase_sgl.engine.request_cache import cache_of
from vase_sgl.engine.transfer import to_device

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class QueryRing:
    """Rings of post-RoPE decode queries: [layers, 1 + requests, window, q_heads, head_dim].

    A request whose policy reads queries owns one row from admission on; its token at position p
    lies at index p % window. Row 0 takes what nobody reads. A round is due at least `window`
    decode steps after the prefill, so an owner never reads an entry it has not written.

    row_of_request: int32 [request rows], the ring row of each row of `req_to_token`. Read by
        captured graphs, so it is only ever written in place.
    """

    def __init__(
        self,
        *,
        layers: int,
        requests: int,
        request_rows: int,
        window: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.window = window
        self.requests = requests
        self.data = torch.zeros(
            layers, 1 + requests, window, heads, head_dim, dtype=dtype, device=device
        )
        self.row_of_request = torch.zeros(request_rows, dtype=torch.int32, device=device)
        self._owners: list[weakref.ref[Req] | None] = [None] * requests
        self._mapped: list[int] = [0] * request_rows  # host copy of row_of_request
        # On a CPU, see `write`: entries of each layer, and where the step's tokens go.
        self._entries = self.data.flatten(3).flatten(1, 2).unbind()
        self._places = torch.empty(0, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def has_room(self) -> bool:
        """Whether one more request can own a row."""
        return any(map(_is_gone, self._owners))

    @property
    def owned(self) -> int:
        """Requests that own a row."""
        return sum(not _is_gone(owner) for owner in self._owners)

    def admit(self, req: Req) -> None:
        """Give an admitted request its row. Raises RuntimeError without room."""
        cache = cache_of(req)
        assert cache is not None
        for index, owner in enumerate(self._owners):
            if _is_gone(owner):
                self._owners[index] = weakref.ref(req)
                cache.ring_row = index + 1
                return
        raise RuntimeError(f"all {self.requests} rows of the query ring are in use")

    def map_new(self, reqs: list[Req]) -> None:
        """Before a batch decodes: point the request rows of its newcomers to their ring rows."""
        changes: dict[int, int] = {}
        newcomers = {
            req.kv.req_pool_idx: cache.ring_row if (cache := cache_of(req)) is not None else 0
            for req in reqs
            if req.decode_batch_idx == 0
        }
        for ring_row in filter(None, newcomers.values()):
            if ring_row in self._mapped:  # its former owner's request row
                changes[self._mapped.index(ring_row)] = 0
        changes |= newcomers
        changes = {row: ring for row, ring in changes.items() if self._mapped[row] != ring}
        if not changes:
            return
        for row, ring_row in changes.items():
            self._mapped[row] = ring_row
        device = self.row_of_request.device
        rows = to_device(torch.tensor(list(changes)), device)
        values = to_device(torch.tensor(list(changes.values()), dtype=torch.int32), device)
        self.row_of_request[rows] = values

    def write(
        self, layer_id: int, rows: torch.Tensor, positions: torch.Tensor, q: torch.Tensor
    ) -> None:
        """Store q [tokens, q_heads * head_dim] of one layer. Static shapes, in place.

        A step writes its layers from 0 on: on a CPU, layer 0 works out the places for all.
        """
        if self.data.device.type == "cuda":
            queries = q.view(len(rows), -1)
            store_queries(self.data[layer_id], queries, rows, positions, self.row_of_request)
            return
        if layer_id == 0:
            self._places = self.row_of_request[rows] * self.window + positions % self.window
        self._entries[layer_id].index_copy_(0, self._places, q.view(len(rows), -1))

    def last(self, ring_row: int, logical_length: int, window: int) -> torch.Tensor:
        """The queries of positions [logical_length - window, logical_length), oldest first.

        Returns [layers, q_heads, window, head_dim].
        """
        positions = torch.arange(logical_length - window, logical_length, device=self.data.device)
        return self.data[:, ring_row, positions % self.window].transpose(1, 2)


def _is_gone(owner: weakref.ref[Req] | None) -> bool:
    """Whether an owner has ended and given its slots back (an admitted one has none at first)."""
    req = None if owner is None else owner()
    return req is None or (bool(req.finished() or req.to_finish) and not req.kv.holds_kv)


def recording_backend(
    create: Callable[[Any], AttentionBackend], ring_of: Callable[[Any], QueryRing]
) -> Callable[[Any], AttentionBackend]:
    """Wrap an attention backend's factory so that its decode writes the query ring.

    The stock instance keeps its class; only its `forward_decode` is replaced.
    """

    def factory(runner: Any) -> AttentionBackend:
        backend = create(runner)
        ring = ring_of(runner)
        forward_decode = backend.forward_decode

        def recording_forward_decode(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            layer: RadixAttention,
            forward_batch: ForwardBatch,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> torch.Tensor:
            rows, positions = forward_batch.req_pool_indices, forward_batch.positions
            ring.write(layer.layer_id, rows, positions, q)
            return forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

        backend.forward_decode = recording_forward_decode
        return backend

    return factory
