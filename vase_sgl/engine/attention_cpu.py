"""Attention on a CPU whose bits follow from a request's own tokens.

Decode: upstream's torch_native backend decodes one request after another in Python. Here requests
whose rows are about equally long go through one call of torch's flash attention. A request's row is
padded to a length that follows from its own length alone, and flash attention computes every
(request, KV head) by itself, on any of its threads. So the bits do not depend on the batch, as long
as all threads' scratch is aligned alike (`padded_shape`) and there are two of them at least: a
single one is left to BLAS, which cuts its sums among the threads.

Prefill: upstream's shape is the whole row's, so a token's bits depend on where its prompt was cut:
into chunks, by neighbours, at a cached prefix. Here queries go in blocks of fixed height at fixed
positions, each with the columns up to its end. So a token's shape follows from its position.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

#: Rows are padded to multiples of this many columns, long ones to an eighth of a power of two.
_COLUMNS = 64
#: Columns that the flash kernel works on at a time, and float32 in 64 bytes.
_BLOCK, _ALIGN = 512, 16
#: Gathered K (and V) rows of one decode call; they should stay in the CPU's cache.
_SCRATCH_BYTES = 8 * 2**20
#: Queries of a prefill's block. Divides _BLOCK, so a query's own column is in its last _BLOCK.
_QUERIES = 64

_UPSTREAM = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_PLACE = ("self", "query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices")
_KIND = (
    "encoder_lens",
    "scaling",
    "enable_gqa",
    "causal",
    "is_cross_attn",
    "sliding_window_size",
)
#: What `BatchInvariantBackend` overrides: path, parameters.
OVERRIDDEN = (
    (f"{_UPSTREAM}.init_forward_metadata", ("self", "forward_batch")),
    (f"{_UPSTREAM}._run_sdpa_forward_decode", (*_PLACE, "seq_lens", *_KIND)),
    (
        f"{_UPSTREAM}._run_sdpa_forward_extend",
        (*_PLACE, "seq_lens", "extend_prefix_lens", "extend_seq_lens", *_KIND),
    ),
)


def padded_shape(length: int, queries: int, head_dim: int) -> tuple[int, int]:
    """Columns, and queries of a KV head, that a row of `length` cached tokens is padded to.

    The columns are at most 63 or an eighth more. The flash kernel gives each thread
    `queries * (min(columns, 512) + 2 + head_dim)` float32 of one allocation, and BLAS sums in
    another order where a matrix is not aligned to 64 bytes. So that all threads' are, a short row
    has a few columns less than a multiple of 64. Beyond 512, or with a head_dim whose own rows are
    not aligned, queries are added, which costs more.
    """
    less = (2 + head_dim) % (_ALIGN // math.gcd(queries, _ALIGN))
    columns = -(-(length + less) // _COLUMNS) * _COLUMNS - less
    if columns <= _BLOCK and head_dim % 32 == 0:
        return columns, queries
    step = max(_COLUMNS, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step, queries + -queries % 8


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Requests of one padded shape: one call of flash attention in every layer.

    members: int64 [n], their places in the batch. slots: int64 [n * columns]; a column past the
    end repeats the request's first slot. mask: [n, 1, 1, columns], 0 or -inf. queries: of a KV
    head, padded.
    """

    members: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor
    queries: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Extend:
    """The new tokens of one request in a prefill: positions [start, end), batch rows from `row`.

    slots: int64 [columns], up to the end of the last block; a column past `end` repeats the first.
    """

    row: int
    start: int
    end: int
    slots: torch.Tensor


class BatchInvariantBackend(TorchNativeAttnBackend):
    """torch_native with own shapes for plain causal attention; everything else is upstream's.

    Sliding windows, cross attention, and heads of different size for K and V take upstream's loop.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._groups: list[_Group] | None = None
        self._extends: list[_Extend] | None = None
        self._mask = torch.empty(0)
        self._k_rows = torch.empty(0, dtype=torch.uint8)
        self._v_rows = torch.empty(0, dtype=torch.uint8)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        # Made by the first layer of the coming forward, used by all.
        self._groups = self._extends = None

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
        kv_heads, head_dim = k_cache.shape[1:]
        grouped = query.shape[1] // kv_heads
        if self._groups is None:
            bytes_a_column = k_cache[0].numel() * query.element_size()
            shapes = [padded_shape(n, grouped, head_dim) for n in seq_lens.tolist()]
            self._groups = _group(
                req_to_token,
                req_pool_indices,
                seq_lens,
                shapes,
                bytes_a_column,
                query.dtype,
                least=-(-2 // kv_heads),
            )
        for group in self._groups:
            n = len(group.members)
            k = self._gather(k_cache, group.slots, "_k_rows").to(query.dtype)
            v = self._gather(v_cache, group.slots, "_v_rows").to(query.dtype)
            # The query heads of a group are rows of one small matrix: K and V are read once.
            q = query[group.members].view(n, kv_heads, -1, head_dim)
            q = pad(q, (0, 0, 0, group.queries - grouped))
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

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        special = encoder_lens is not None or is_cross_attn or sliding_window_size is not None
        if special or not causal or k_cache.shape != v_cache.shape:
            return super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling,
                enable_gqa,
                causal,
                is_cross_attn,
                sliding_window_size,
            )
        if self._extends is None:
            starts, ends = extend_prefix_lens.tolist(), seq_lens.tolist()
            self._extends = _extends(req_to_token, req_pool_indices, starts, ends)
            longest = max((len(extend.slots) for extend in self._extends), default=0)
            self._mask = _causal_mask(longest, query.dtype)
        for extend in self._extends:
            k = self._gather(k_cache, extend.slots, "_k_rows").to(query.dtype)
            v = self._gather(v_cache, extend.slots, "_v_rows").to(query.dtype)
            k, v = k.view(-1, *k_cache.shape[1:]), v.view(-1, *v_cache.shape[1:])
            new = slice(extend.row, extend.row + extend.end - extend.start)
            self._attend_blocks(query[new], output[new], k, v, extend.start, scaling)
        return output

    def _attend_blocks(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start: int,
        scaling: float | None,
    ) -> None:
        """Attention of queries [tokens, heads, head_dim] at positions from `start` on.

        k, v: [columns, kv_heads, head_dim], whole blocks. Writes `output`.
        """
        tokens, heads, head_dim = query.shape
        columns, kv_heads = k.shape[:2]
        before = start % _QUERIES  # rows of the first block that are not asked for
        # Also copies: whatever the batch, blocks are aligned alike.
        blocks = pad(query, (0, 0, 0, 0, before, columns - start - tokens)).split(_QUERIES)
        # Query heads of a KV head share its rows, uncopied.
        k, v = (x.transpose(0, 1)[:, None].expand(-1, heads // kv_heads, -1, -1) for x in (k, v))
        first = -before  # the block's first row in `output`
        for block in blocks:
            end = start + first + _QUERIES
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                attended = scaled_dot_product_attention(
                    block.view(_QUERIES, kv_heads, -1, head_dim).permute(1, 2, 0, 3),
                    k[:, :, :end],
                    v[:, :, :end],
                    attn_mask=self._mask[:, self._mask.shape[1] - end :][None, None],
                    scale=scaling,
                )
            rows = attended.permute(2, 0, 1, 3).reshape(_QUERIES, heads, head_dim)
            last = min(first + _QUERIES, tokens)
            output[max(first, 0) : last] = rows[max(-first, 0) : last - first]
            first += _QUERIES

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
    shapes: list[tuple[int, int]],
    bytes_a_column: int,
    dtype: torch.dtype,
    least: int,
) -> list[_Group]:
    """Group a batch by padded shape, and cut groups to what the scratch is meant to hold.

    A group of fewer than `least` has its one request twice.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        members.setdefault(shape, []).append(index)
    groups = []
    for (columns, queries), indices in sorted(members.items()):
        count = max(1, _SCRATCH_BYTES // (columns * bytes_a_column))
        for start in range(0, len(indices), count):
            part = indices[start : start + count]
            chosen = torch.tensor(part * least if len(part) < least else part)
            row = torch.arange(columns)
            inside = row < seq_lens[chosen, None]
            # Slots of other requests, or nobody's, may hold NaN, which a mask does not stop.
            at = torch.where(inside, row, 0)
            slots = req_to_token[req_pool_indices[chosen, None], at].to(torch.int64)
            mask = torch.zeros(inside.shape, dtype=dtype).masked_fill_(~inside, float("-inf"))
            groups.append(_Group(chosen, slots.flatten(), mask[:, None, None], queries))
    return groups


def _extends(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, starts: list[int], ends: list[int]
) -> list[_Extend]:
    """Where the new tokens of a prefill's requests are, in the batch and in the pool."""
    extends, row = [], 0
    for index, start, end in zip(req_pool_indices.tolist(), starts, ends, strict=True):
        missing = -end % _QUERIES
        slots = req_to_token[index, :end].to(torch.int64)
        # As in decode: a mask does not stop NaN.
        slots = torch.cat([slots, slots[:1].expand(missing)])
        extends.append(_Extend(row, start, end, slots))
        row += end - start
    return extends


def _causal_mask(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[_QUERIES, columns], 0 or -inf, for the block that ends there; earlier ones take its end."""
    mask = torch.zeros(_QUERIES, columns, dtype=dtype)
    hidden = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool).triu(1)
    mask[:, columns - _QUERIES :].masked_fill_(hidden, float("-inf"))
    return mask
