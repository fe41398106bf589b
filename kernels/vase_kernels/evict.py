"""One eviction round of a ragged batch: all layers in one launch sequence, in place, no sync."""

# mypy: disable-error-code="import-untyped,index,arg-type"
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vase_kernels.overwrite import move_kernel, plan_kernel
from vase_kernels.requests import MAX_PROJECTION, TABLE_WIDTH
from vase_kernels.scores_attnv import draw_kernel, ranges_kernel, stats_kernel, weights_kernel
from vase_kernels.scores_dkv import dkv_kernel
from vase_kernels.scores_simple import simple_kernel
from vase_kernels.select import select_kernel
from vase_kernels.workspace import Workspace

#: Policies that `evict` knows; `reference.SCORERS` specifies each.
POLICIES = ("vase-attnv", "vase-dkv", "random", "streaming")

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
BITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32}
#: Programs that share the columns or pairs of one head. No result depends on it.
_SPLIT = 4
#: The same where a program first draws its Gaussian.
_SPLIT_DKV = 2
#: Columns a block of the kernels that read no rows.
BLOCK_COLUMNS = 1024
BLOCK_PAIRS = 16


class Result(NamedTuple):
    """What a round reports; both tensors belong to the workspace and the next call reuses them.

    round_sums : int64 Tensor [max_requests]
        Sum of victim hashes over this pool's layers and heads, to be chained by
        `reference.chain`; 0 in rows without a request.
    faults : int32 Tensor [max_requests]
        Heads whose victims include a forced token, because too few others were there.
        `DueRequest` refuses such requests, so anything but 0 is a bug of the caller.
    """

    round_sums: Tensor
    faults: Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PoolView:
    """Where the rows of a KV pool lie. Build it once with `PoolView.of`.

    k_pointers, v_pointers : int64 Tensor [layers]
        Addresses of the K and V buffers.
    token_positions : int32 Tensor [layers, num_slots, kv_heads]
    req_to_token : int32 Tensor [rows, context]
        Slot of each column of each request.
    buffers : the tensors behind the addresses, kept alive
    """

    k_pointers: Tensor
    v_pointers: Tensor
    token_positions: Tensor
    req_to_token: Tensor
    dtype: torch.dtype
    head_dim: int
    first_layer: int
    first_head: int
    buffers: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        k_buffers: Sequence[Tensor],
        v_buffers: Sequence[Tensor],
        token_positions: Tensor,
        req_to_token: Tensor,
        *,
        first_layer: int = 0,
        first_head: int = 0,
    ) -> PoolView:
        """View of a pool; `ValueError` names what the kernels cannot address.

        Parameters
        ----------
        k_buffers, v_buffers : sequence of Tensor [num_slots, kv_heads, head_dim]
            One K and one V tensor a layer: contiguous, starting on 16 bytes, rows a multiple of
            16 bytes; float32, float16, bfloat16, float8_e4m3fn or float8_e5m2.
        first_layer, first_head : int
            Global index of this rank's first layer and KV head.
        """
        layers, (num_slots, kv_heads, head_dim) = len(k_buffers), k_buffers[0].shape
        dtype = k_buffers[0].dtype
        if dtype not in ELEMENTS:
            raise ValueError(f"KV dtype {dtype} is none of {', '.join(map(str, ELEMENTS))}")
        for name, buffers in (("K", k_buffers), ("V", v_buffers)):
            if len(buffers) != layers:
                raise ValueError(f"{layers} K buffers, {len(buffers)} {name} buffers")
            for layer, x in enumerate(buffers):
                if x.shape != k_buffers[0].shape or x.dtype != dtype:
                    raise ValueError(f"{name} of layer {layer}: {x.dtype} {tuple(x.shape)}")
                if not x.is_contiguous() or x.data_ptr() % 16 or head_dim * x.itemsize % 16:
                    raise ValueError(f"{name} of layer {layer}: rows are not aligned to 16 bytes")
        if token_positions.shape != (layers, num_slots, kv_heads):
            raise ValueError(f"token_positions {tuple(token_positions.shape)}, want that of K")
        for name, x in (("token_positions", token_positions), ("req_to_token", req_to_token)):
            if x.dtype != torch.int32 or not x.is_contiguous():
                raise ValueError(f"{name}: want contiguous int32, got {x.dtype}")
        device = token_positions.device
        return cls(
            k_pointers=torch.tensor([x.data_ptr() for x in k_buffers], device=device),
            v_pointers=torch.tensor([x.data_ptr() for x in v_buffers], device=device),
            token_positions=token_positions,
            req_to_token=req_to_token,
            dtype=dtype,
            head_dim=head_dim,
            first_layer=first_layer,
            first_head=first_head,
            buffers=(*k_buffers, *v_buffers),
        )


def common_dtype(keys: torch.dtype, queries: torch.dtype) -> torch.dtype:
    """The type that holds keys and queries exactly."""
    return queries if keys.itemsize == 1 else torch.promote_types(keys, queries)


def part_dtype(rows: torch.dtype) -> torch.dtype:
    """The type that vase-dkv multiplies rows in: their own, float16 for float8."""
    return torch.float16 if rows.itemsize == 1 else rows


def dot_operand(dtype: torch.dtype) -> Any:
    """Triton type of the operands of products in `dtype`."""
    # The interpreter gets bfloat16 products wrong; in float32 they are the same numbers.
    return tl.float32 if triton.knobs.runtime.interpret else ELEMENTS[dtype]


def range_block(head_dim: int) -> int:
    """Rows a block of the value range."""
    return 64 if head_dim <= 64 else 32


def attention_blocks(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and columns a block of attention: the largest that spill no register."""
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    if row_bytes <= 256:
        return 64, 64
    return (32, 32) if dtype.itemsize == 2 else (16, 32)


def projection_block(head_dim: int, dtype: torch.dtype) -> int:
    """Columns a block of vase-dkv, beside the parts of G."""
    return 64 if triton.next_power_of_2(head_dim) * dtype.itemsize <= 256 else 16


def evict(
    policy: str,
    pool: PoolView,
    requests: Tensor,
    queries: Tensor | None,
    workspace: Workspace,
) -> Result:
    """Evict from `length` to `budget` rows per layer and KV head of every due request.

    Mutates exactly: the K and V rows and the token positions of columns 0..budget-1 of the
    requests, and the workspace. Afterwards these columns hold the kept older tokens and the
    `window` recent ones, as `reference.evict_reference` leaves them.

    Order and ties: victims are the smallest retention keys, ties go to the lower token position,
    NaN counts as -inf. Determinism: a request's victims, rows and digest depend on that request
    alone, not on slots, neighbours or the workspace. `random` and `streaming` equal the
    reference exactly; `vase-attnv` and `vase-dkv` up to keys that differ by less than rounding.

    Launches are the same for every batch and nothing waits for the device or allocates, so the
    call can be captured in a CUDA graph; the first call of a shape compiles.

    Bytes a round, layer and head: 2 * candidates * head_dim * element size read by the vase
    policies (`vase-attnv` reads K twice), none by the others; 4 * window rows moved; some 4-byte
    words of scratch a column. See the kernels' modules.

    Parameters
    ----------
    policy : str
        One of `POLICIES`.
    pool : PoolView
    requests : int64 Tensor [max_requests, 11]
        Table of `DueRequest` rows by `requests.pack`, on the pool's device. All slots in columns
        below `length` are distinct, across requests too.
    queries : Tensor [layers, rows, ring_window, q_heads, head_dim] or None
        Ring of post-RoPE queries, that of position p at p % ring_window of its request's row;
        contiguous float32, float16 or bfloat16; ring_window at least the largest window. Needed
        by `vase-attnv`.
    workspace : Workspace
        Its maxima bound every request of the table; nothing checks that on the device.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
    most = workspace.maxima
    layers, num_slots, heads = pool.token_positions.shape
    if requests.shape != (most.requests, TABLE_WIDTH.value) or requests.dtype != torch.int64:
        raise ValueError(f"table {requests.dtype} {tuple(requests.shape)} does not fit workspace")
    if (layers, heads) != (workspace.layers, workspace.kv_heads):
        raise ValueError(f"workspace is not for {layers} layers of {heads} KV heads")
    places = layers * heads
    context = pool.req_to_token.shape[1]
    table = (requests, pool.req_to_token, pool.token_positions, context, num_slots)
    first = (pool.first_layer, pool.first_head)
    scratch = workspace
    workspace.round_sums.zero_()
    workspace.faults.zero_()

    def select(victims: bool) -> None:
        select_kernel[(places, most.requests)](
            scratch.order,
            scratch.edges,
            scratch.faults,
            *table,
            most.columns,
            VICTIMS=victims,
            HEADS=heads,
            BLOCK=BLOCK_COLUMNS,
        )

    element = ELEMENTS[pool.dtype]
    row = {
        "HEADS": heads,
        "HEAD_DIM": pool.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(pool.head_dim)),
    }
    split = (_SPLIT, places, most.requests)
    if policy == "vase-attnv":
        if queries is None:
            raise ValueError("policy vase-attnv reads the window's queries; got None")
        group = _group(queries, pool, most.group, most.window)
        common = common_dtype(pool.dtype, queries.dtype)
        block_q, block_k = attention_blocks(pool.head_dim, common)
        max_queries = most.window * most.group
        ring = (queries.shape[1], queries.shape[2], pool.head_dim**-0.5)
        attention = {
            **row,
            "ELEMENT": element,
            "DOT": dot_operand(common),
            "GROUP": group,
            "BLOCK_Q": block_q,
            "BLOCK": block_k,
            "num_stages": 2,
        }
        addresses = (pool.k_pointers, queries, requests, pool.req_to_token, context)
        blocks = triton.cdiv(most.window * group, block_q)
        stats_kernel[(blocks, places, most.requests)](
            scratch.stats, *addresses, max_queries, *ring, **attention
        )
        weights_kernel[split](
            scratch.weights,
            scratch.stats,
            *addresses,
            most.columns,
            max_queries,
            *ring,
            **attention,
        )
        ranges_kernel[split](
            scratch.order,
            pool.v_pointers,
            *table,
            most.columns,
            ELEMENT=element,
            BLOCK=range_block(pool.head_dim),
            **row,
        )
        select(victims=False)
        draw_kernel[split](
            scratch.order,
            scratch.weights,
            scratch.edges,
            *table,
            most.columns,
            *first,
            HEADS=heads,
            BLOCK=BLOCK_COLUMNS,
        )
    elif policy == "vase-dkv":
        part = part_dtype(pool.dtype)
        dkv_kernel[(_SPLIT_DKV, places, most.requests)](
            scratch.order,
            pool.k_pointers,
            pool.v_pointers,
            *table,
            most.columns,
            *first,
            ELEMENT=element,
            BLOCK_J=MAX_PROJECTION,
            PART=ELEMENTS[part],
            DOT=dot_operand(part),
            BLOCK=projection_block(pool.head_dim, part),
            num_stages=2,
            num_warps=8,
            **row,
        )
    else:
        simple_kernel[split](
            scratch.order,
            *table,
            most.columns,
            *first,
            RANDOM=policy == "random",
            HEADS=heads,
            BLOCK=BLOCK_COLUMNS,
        )

    select(victims=True)
    plan_kernel[(places, most.requests)](
        scratch.order,
        scratch.edges,
        scratch.holes,
        scratch.sources,
        scratch.num_holes,
        scratch.round_sums,
        *table,
        most.columns,
        most.budget,
        *first,
        HEADS=heads,
        BLOCK=BLOCK_COLUMNS,
    )
    move_kernel[split](
        pool.k_pointers,
        pool.v_pointers,
        scratch.holes,
        scratch.sources,
        scratch.num_holes,
        *table,
        most.budget,
        ELEMENT=BITS[pool.dtype.itemsize],
        BLOCK=BLOCK_PAIRS,
        **row,
    )
    return Result(workspace.round_sums, workspace.faults)


def _group(queries: Tensor, pool: PoolView, max_group: int, max_window: int) -> int:
    """Query heads of a KV head; `ValueError` if the ring does not fit the pool."""
    layers, _, heads = pool.token_positions.shape
    ring_layers, rows, ring_window, query_heads, head_dim = queries.shape
    if query_heads % heads:
        raise ValueError(f"{query_heads} query heads do not group over {heads} KV heads")
    if query_heads // heads > max_group:
        raise ValueError(f"workspace is for groups of {max_group}, got {query_heads // heads}")
    if (ring_layers, head_dim) != (layers, pool.head_dim) or rows < len(pool.req_to_token):
        raise ValueError(f"query ring {tuple(queries.shape)} does not fit the pool")
    if ring_window < max_window or not queries.is_contiguous():
        raise ValueError(f"query ring of window {ring_window}, want contiguous {max_window}")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"query dtype {queries.dtype}")
    return query_heads // heads
