"""One eviction round of a ragged batch: all layers in one launch sequence, in place, no sync."""

# mypy: disable-error-code="import-untyped,index,arg-type"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from vase_kernels.overwrite import move_kernel, plan_kernel
from vase_kernels.pool import PoolView
from vase_kernels.requests import TABLE_WIDTH
from vase_kernels.scoring import SCORING, Round
from vase_kernels.workspace import Workspace

__all__ = ["POLICIES", "PoolView", "Result", "evict"]

#: Policies that `evict` knows; `reference.SCORERS` specifies each.
POLICIES = tuple(SCORING)

BITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32}
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


def evict(
    policy: str,
    pool: PoolView,
    requests: Tensor,
    queries: Tensor | None,
    workspace: Workspace,
) -> Result:
    """Evict from `length` to `pinned + budget` rows per layer and KV head of every due request.

    Mutates exactly: the K and V rows and the token positions of columns pinned..pinned+budget-1 of
    the requests, and the workspace. Afterwards these columns hold the kept older tokens and the
    `window` recent ones, as `reference.evict_reference` leaves them. Pinned columns are neither
    read nor written.

    Order and ties: victims are the smallest retention keys, ties go to the lower token position,
    NaN counts as -inf. Determinism: a request's victims, rows and digest depend on that request
    alone, not on slots, neighbours or the workspace. `random`, `streaming` and
    `evict-largest-values` equal the reference exactly, the others up to keys that differ by less
    than rounding.

    Launches are the same for every batch and nothing waits for the device or allocates, so the
    call can be captured in a CUDA graph; the first call of a shape compiles.

    Bytes a round, layer and head: the candidates' K, V, both or none, by policy (see the kernels'
    modules); 4 * window rows moved; some 4-byte words of scratch a column.

    Parameters
    ----------
    policy : str
        One of `POLICIES`, for all requests of the table.
    pool : PoolView
    requests : int64 Tensor [max_requests, TABLE_WIDTH]
        Table of `DueRequest` rows by `requests.pack`, on the pool's device. All slots in columns
        from `pinned` to `length` are distinct, across requests too; pinned slots may be shared.
    queries : Tensor [layers, ring rows, ring_window, q_heads, head_dim] or None
        Ring of post-RoPE queries, that of position p at p % ring_window of its request's ring row;
        contiguous float32, float16 or bfloat16; ring_window at least the largest window. Needed
        by `vase-attnv`, `snapkv` and `rkv`.
    workspace : Workspace
        Its maxima bound every request of the table; nothing checks that on the device.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
    most = workspace.maxima
    layers, _, heads = pool.token_positions.shape
    if requests.shape != (most.requests, TABLE_WIDTH.value) or requests.dtype != torch.int64:
        raise ValueError(f"table {requests.dtype} {tuple(requests.shape)} does not fit workspace")
    if (layers, heads) != (workspace.layers, workspace.kv_heads):
        raise ValueError(f"workspace is not for {layers} layers of {heads} KV heads")
    this = Round(policy, pool, requests, queries, workspace)
    scratch = workspace
    workspace.round_sums.zero_()
    workspace.faults.zero_()
    SCORING[policy](this)
    this.select(victims=True)
    plan_kernel[this.heads](
        scratch.order,
        scratch.edges,
        scratch.holes,
        scratch.sources,
        scratch.num_holes,
        scratch.round_sums,
        *this.table,
        most.columns,
        most.budget,
        pool.first_head,
        **this.columns,
    )
    move_kernel[this.split](
        pool.k_pointers,
        pool.v_pointers,
        scratch.holes,
        scratch.sources,
        scratch.num_holes,
        *this.table,
        most.budget,
        ELEMENT=BITS[pool.dtype.itemsize],
        BLOCK=BLOCK_PAIRS,
        **this.rows,
    )
    return Result(workspace.round_sums, workspace.faults)
