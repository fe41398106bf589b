"""Decode attention of a whole batch at once, on a CPU.

Upstream's torch_native backend decodes one request after another in Python. Here requests whose
rows are about equally long go through one call of torch's flash attention. A request's row is
padded to a length that follows from its own length alone, and flash attention computes every
(request, KV head) by itself, on any of its threads. So the bits do not depend on the batch, as long
as all threads' scratch is aligned alike; that is what queries are padded for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

#: Rows are padded to multiples of this many columns, long ones to an eighth of a power of two.
_COLUMNS = 64
#: Queries of a KV head are padded to multiples of this many. The flash kernel gives a thread
#: `queries * (columns + 2 + head_dim)` float32 of one allocation, and BLAS sums in another order
#: where a matrix is not aligned to 64 bytes: with 8 queries and an even head_dim all are.
_QUERIES = 8
#: Gathered K (and V) rows of one call; they should stay in the CPU's cache.
_SCRATCH_BYTES = 8 * 2**20

#: What `BatchedDecodeBackend` overrides without upstream having promised it: path, parameters.
OVERRIDDEN = (
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    "._run_sdpa_forward_decode",
    (
        "self",
        "query",
        "output",
        "k_cache",
        "v_cache",
        "req_to_token",
        "req_pool_indices",
        "seq_lens",
        "encoder_lens",
        "scaling",
        "enable_gqa",
        "causal",
        "is_cross_attn",
        "sliding_window_size",
    ),
)


def padded_length(length: int) -> int:
    """Columns that a row of `length` cached tokens is padded to: at most 63 or an eighth more."""
    step = max(_COLUMNS, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Requests of one padded length: one call of flash attention in every layer.

    members: int64 [n], their places in the batch. slots: int64 [n * columns]; a column past the
    end repeats the request's first slot. mask: [n, 1, 1, columns], 0 or -inf.
    """

    members: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


class BatchedDecodeBackend(TorchNativeAttnBackend):
    """torch_native with a batched decode for plain causal attention; everything else is upstream's.

    Sliding windows, cross attention, and heads of different size for K and V take upstream's loop.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._groups: list[_Group] | None = None
        self._k_rows = torch.empty(0, dtype=torch.uint8)
        self._v_rows = torch.empty(0, dtype=torch.uint8)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._groups = None  # made by the first layer of the coming forward, used by all

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        special = encoder_lens is not None or is_cross_attn or sliding_window_size is not None
        if special or k_cache.shape != v_cache.shape:
            return super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling,
                enable_gqa,
                causal,
                is_cross_attn,
                sliding_window_size,
            )
        if self._groups is None:
            bytes_a_column = k_cache[0].numel() * query.element_size()
            self._groups = _group(
                req_to_token, req_pool_indices, seq_lens, bytes_a_column, query.dtype
            )
        kv_heads, head_dim = k_cache.shape[1:]
        grouped = query.shape[1] // kv_heads
        for group in self._groups:
            n = len(group.members)
            k = self._gather(k_cache, group.slots, "_k_rows").to(query.dtype)
            v = self._gather(v_cache, group.slots, "_v_rows").to(query.dtype)
            # The query heads of a group are rows of one small matrix: K and V are read once.
            q = query[group.members].view(n, kv_heads, -1, head_dim)
            q = pad(q, (0, 0, 0, -grouped % _QUERIES))
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                attended = scaled_dot_product_attention(
                    q,
                    k.view(n, -1, kv_heads, head_dim).transpose(1, 2),
                    v.view(n, -1, kv_heads, head_dim).transpose(1, 2),
                    attn_mask=group.mask,
                    scale=scaling,
                )
            output[group.members] = attended[:, :, :grouped].reshape(n, -1, head_dim)
        return output

    def _gather(self, cache: torch.Tensor, slots: torch.Tensor, scratch: str) -> torch.Tensor:
        """Rows [slots, kv_heads * head_dim] in kept memory: fresh pages would cost more."""
        rows = cache.flatten(1).view(torch.int32)  # as words: twice as fast as bfloat16
        needed = len(slots) * rows.shape[1] * 4
        if needed > getattr(self, scratch).numel():
            setattr(self, scratch, torch.empty(needed, dtype=torch.uint8))
        out = getattr(self, scratch)[:needed].view(torch.int32).view(len(slots), -1)
        return torch.index_select(rows, 0, slots, out=out).view(cache.dtype)


def _group(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    bytes_a_column: int,
    dtype: torch.dtype,
) -> list[_Group]:
    """Group a batch by padded length, and cut groups to what the scratch is meant to hold."""
    members: dict[int, list[int]] = {}
    for index, length in enumerate(seq_lens.tolist()):
        members.setdefault(padded_length(length), []).append(index)
    groups = []
    for columns, indices in sorted(members.items()):
        count = max(1, _SCRATCH_BYTES // (columns * bytes_a_column))
        for start in range(0, len(indices), count):
            chosen = torch.tensor(indices[start : start + count])
            row = torch.arange(columns)
            inside = row < seq_lens[chosen, None]
            # Slots of other requests, or nobody's, may hold NaN, which a mask does not stop.
            at = torch.where(inside, row, 0)
            slots = req_to_token[req_pool_indices[chosen, None], at].to(torch.int64)
            mask = torch.zeros(inside.shape, dtype=dtype).masked_fill_(~inside, float("-inf"))
            groups.append(_Group(chosen, slots.flatten(), mask[:, None, None]))
    return groups
