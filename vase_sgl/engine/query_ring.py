"""The last queries of every running request, for policies that score by attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class QueryRing:
    """Ring of post-RoPE decode queries: [layers, rows, window, q_heads, head_dim].

    A token at position p lies at index p % window of its request's row. A round is due at least
    `window` decode steps after the prefill, so a ring never shows a previous owner's entry.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        window: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.window = window
        self.data = torch.zeros(layers, rows, window, heads, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def write(
        self, layer_id: int, rows: torch.Tensor, positions: torch.Tensor, q: torch.Tensor
    ) -> None:
        """Store q [tokens, q_heads * head_dim] of one layer. Static shapes, in place."""
        ring = self.data[layer_id]
        ring[rows, positions % self.window] = q.view(-1, *ring.shape[2:])

    def last(self, row: int, logical_length: int, window: int) -> torch.Tensor:
        """The queries of positions [logical_length - window, logical_length), oldest first.

        Returns [layers, q_heads, window, head_dim].
        """
        positions = torch.arange(logical_length - window, logical_length, device=self.data.device)
        return self.data[:, row, positions % self.window].transpose(1, 2)


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
