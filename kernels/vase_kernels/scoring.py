"""Which kernels score for which policy, and the shapes they are launched in."""

# mypy: disable-error-code="import-untyped,index,arg-type"
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vase_kernels.attention import lse_kernel, weights_kernel
from vase_kernels.pool import ELEMENTS, PoolView
from vase_kernels.requests import MAX_PROJECTION
from vase_kernels.scores_attnv import draw_kernel
from vase_kernels.scores_dkv import dkv_kernel
from vase_kernels.scores_rkv import mix_kernel, similarity_kernel
from vase_kernels.scores_rows import norms_kernel, ranges_kernel
from vase_kernels.scores_simple import simple_kernel
from vase_kernels.scores_snapkv import snapkv_kernel
from vase_kernels.select import select_kernel
from vase_kernels.workspace import Workspace

#: Programs that share the columns or pairs of one head. No result depends on it.
SPLIT = 4
#: The same where a program first draws its Gaussian.
SPLIT_DKV = 2
#: Columns a block of the kernels that read no rows.
BLOCK_COLUMNS = 1024
#: Rows a block of the kernels that make one number of a row: one a thread, for what is done once
#: a row would else be done by several.
BLOCK_ROWS = 128


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What the kernels of a round are given; arguments and constants by the names of the kernels.

    requests : int64 Tensor [max_requests, TABLE_WIDTH]
    queries : Tensor [layers, rows, ring_window, q_heads, head_dim] or None
    """

    policy: str
    pool: PoolView
    requests: Tensor
    queries: Tensor | None
    workspace: Workspace

    @property
    def places(self) -> int:
        """Layers times KV heads."""
        return self.workspace.layers * self.workspace.kv_heads

    @property
    def heads(self) -> tuple[int, int]:
        """Grid of one program a head."""
        return self.places, self.workspace.maxima.requests

    @property
    def split(self) -> tuple[int, int, int]:
        """Grid of several programs a head."""
        return SPLIT, *self.heads

    @property
    def table(self) -> tuple[Any, ...]:
        """requests, req_to_token, store, context, num_slots."""
        pool = self.pool
        context, num_slots = pool.req_to_token.shape[1], pool.token_positions.shape[1]
        return self.requests, pool.req_to_token, pool.token_positions, context, num_slots

    @property
    def columns(self) -> dict[str, int]:
        """Constants of the kernels that read no rows."""
        return {"HEADS": self.workspace.kv_heads, "BLOCK": BLOCK_COLUMNS}

    @property
    def rows(self) -> dict[str, int]:
        """Constants of the kernels that read or move rows."""
        return {
            "HEADS": self.workspace.kv_heads,
            "HEAD_DIM": self.pool.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.pool.head_dim)),
        }

    def select(self, *, victims: bool) -> None:
        """Write the last victim, or the last protected, of every head to `edges`."""
        scratch = self.workspace
        select_kernel[self.heads](
            scratch.order,
            scratch.edges,
            scratch.faults,
            *self.table,
            scratch.maxima.columns,
            VICTIMS=victims,
            **self.columns,
        )


class AttentionBlocks(NamedTuple):
    """Queries and columns of a block, the warps that share one, and blocks on their way.

    queries : divides `MAX_BLOCK_Q`
    """

    queries: int
    columns: int
    warps: int
    stages: int = 2

    def constants(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {
            "BLOCK_Q": self.queries,
            "BLOCK": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def common_dtype(keys: torch.dtype, queries: torch.dtype) -> torch.dtype:
    """The type that holds keys and queries exactly."""
    return queries if keys.itemsize == 1 else torch.promote_types(keys, queries)


def part_dtype(rows: torch.dtype) -> torch.dtype:
    """The type that vase-dkv and curdkv multiply rows in: their own, float16 for float8."""
    return torch.float16 if rows.itemsize == 1 else rows


def dot_operand(dtype: torch.dtype) -> Any:
    """Triton type of the operands of products in `dtype`."""
    # The interpreter gets bfloat16 products wrong; in float32 they are the same numbers.
    return tl.float32 if triton.knobs.runtime.interpret else ELEMENTS[dtype]


def similarity_block(head_dim: int) -> int:
    """Rows a block of rkv's similarities."""
    return 64 if head_dim <= 64 else 32


def attention_blocks(head_dim: int, dtype: torch.dtype) -> tuple[AttentionBlocks, AttentionBlocks]:
    """Blocks of `lse_kernel` and of `weights_kernel`.

    The block that a program keeps is the large one: the other one passes through L2 as often as
    there are programs, which is what these kernels wait for beside exponentials. A warp has 64
    logits a thread where registers allow: with 32, what a block costs beside them would take as
    many instructions as the exponentials leave. `weights_kernel` reads whole blocks of sums, so
    its queries divide those of `lse_kernel`, which pads them.
    """
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    if dtype.itemsize == 4:
        # Three TF32 products hold both operands in parts.
        same = AttentionBlocks(64, 64, 4) if row_bytes <= 256 else AttentionBlocks(16, 32, 4)
        return same, same
    if row_bytes > 256:
        return AttentionBlocks(64, 64, 4), AttentionBlocks(64, 64, 4)
    return AttentionBlocks(128, 128, 8), AttentionBlocks(64, 256, 8)


class ProjectionBlock(NamedTuple):
    """Columns of a block beside the parts of G, and the warps that share it."""

    columns: int
    warps: int


def projection_block(head_dim: int, dtype: torch.dtype) -> ProjectionBlock:
    """Block of vase-dkv and curdkv.

    64 rows of K or V are one tensor core product of four warps. Eight would share its columns and
    each do all that is beside it; they are for rows that four have no registers for.
    """
    if triton.next_power_of_2(head_dim) * dtype.itemsize > 256:
        return ProjectionBlock(16, 8)
    return ProjectionBlock(64, 8 if dtype.itemsize == 4 else 4)


def _attention(r: Round) -> None:
    """Write each candidate's mean attention to `weights`."""
    scratch, pool, most = r.workspace, r.pool, r.workspace.maxima
    if r.queries is None:
        raise ValueError(f"policy {r.policy} reads the window's queries; got None")
    group = _group(r.queries, pool, most.group, most.window)
    common = common_dtype(pool.dtype, r.queries.dtype)
    for_lse, for_weights = attention_blocks(pool.head_dim, common)
    addresses = (pool.k_pointers, r.queries, r.requests, pool.req_to_token)
    context = pool.req_to_token.shape[1]
    ring = (r.queries.shape[1], r.queries.shape[2], pool.attention_scale)
    constants = {
        **r.rows,
        "ELEMENT": ELEMENTS[pool.dtype],
        "DOT": dot_operand(common),
        "GROUP": group,
    }
    lse_kernel[(most.queries // for_lse.queries, *r.heads)](
        scratch.lse,
        *addresses,
        context,
        most.queries,
        *ring,
        **constants,
        **for_lse.constants(),
    )
    weights_kernel[r.split](
        scratch.weights,
        scratch.lse,
        *addresses,
        context,
        most.columns,
        most.queries,
        *ring,
        **constants,
        **for_weights.constants(),
    )


def _ranges(r: Round, *, keys: bool) -> None:
    ranges_kernel[r.split](
        r.workspace.order,
        r.pool.v_pointers,
        *r.table,
        r.workspace.maxima.columns,
        ELEMENT=ELEMENTS[r.pool.dtype],
        KEYS=keys,
        BLOCK=BLOCK_ROWS,
        **r.rows,
    )


def _vase_attnv(r: Round) -> None:
    scratch = r.workspace
    _attention(r)
    _ranges(r, keys=False)
    r.select(victims=False)
    draw_kernel[r.split](
        scratch.order,
        scratch.weights,
        scratch.edges,
        *r.table,
        scratch.maxima.columns,
        r.pool.first_head,
        **r.columns,
    )


def _dkv(r: Round, *, fixed: bool) -> None:
    part = part_dtype(r.pool.dtype)
    block = projection_block(r.pool.head_dim, part)
    dkv_kernel[(SPLIT_DKV, *r.heads)](
        r.workspace.order,
        r.pool.k_pointers,
        r.pool.v_pointers,
        *r.table,
        r.workspace.maxima.columns,
        r.pool.first_head,
        ELEMENT=ELEMENTS[r.pool.dtype],
        BLOCK_J=MAX_PROJECTION,
        PART=ELEMENTS[part],
        DOT=dot_operand(part),
        FIXED=fixed,
        BLOCK=block.columns,
        num_stages=2,
        num_warps=block.warps,
        **r.rows,
    )


def _snapkv(r: Round) -> None:
    scratch = r.workspace
    _attention(r)
    snapkv_kernel[r.split](
        scratch.order, scratch.weights, *r.table, scratch.maxima.columns, **r.columns
    )


def _rkv(r: Round) -> None:
    scratch, pool = r.workspace, r.pool
    _attention(r)
    similarity_kernel[r.heads](
        scratch.order,
        pool.k_pointers,
        r.requests,
        pool.req_to_token,
        pool.req_to_token.shape[1],
        scratch.maxima.columns,
        ELEMENT=ELEMENTS[pool.dtype],
        BLOCK=similarity_block(pool.head_dim),
        **r.rows,
    )
    mix_kernel[r.heads](
        scratch.order, scratch.weights, *r.table, scratch.maxima.columns, **r.columns
    )


def _knorm(r: Round) -> None:
    norms_kernel[r.split](
        r.workspace.order,
        r.pool.k_pointers,
        *r.table,
        r.workspace.maxima.columns,
        ELEMENT=ELEMENTS[r.pool.dtype],
        BLOCK=BLOCK_ROWS,
        **r.rows,
    )


def _simple(r: Round, *, random: bool) -> None:
    simple_kernel[r.split](
        r.workspace.order,
        *r.table,
        r.workspace.maxima.columns,
        r.pool.first_head,
        RANDOM=random,
        **r.columns,
    )


#: By policy, what writes the order of the retention keys; `reference.SCORERS` specifies each.
SCORING: dict[str, Callable[[Round], None]] = {
    "vase-attnv": _vase_attnv,
    "vase-dkv": partial(_dkv, fixed=False),
    "curdkv": partial(_dkv, fixed=True),
    "snapkv": _snapkv,
    "rkv": _rkv,
    "random": partial(_simple, random=True),
    "streaming": partial(_simple, random=False),
    "knorm": _knorm,
    "evict-largest-values": partial(_ranges, keys=True),
}


def _group(queries: Tensor, pool: PoolView, max_group: int, max_window: int) -> int:
    """Query heads of a KV head; `ValueError` if the ring does not fit the pool."""
    layers, _, heads = pool.token_positions.shape
    ring_layers, _, ring_window, query_heads, head_dim = queries.shape
    if query_heads % heads:
        raise ValueError(f"{query_heads} query heads do not group over {heads} KV heads")
    if query_heads // heads > max_group:
        raise ValueError(f"workspace is for groups of {max_group}, got {query_heads // heads}")
    if (ring_layers, head_dim) != (layers, pool.head_dim):
        raise ValueError(f"query ring {tuple(queries.shape)} does not fit the pool")
    if ring_window < max_window or not queries.is_contiguous():
        raise ValueError(f"query ring of window {ring_window}, want contiguous {max_window}")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"query dtype {queries.dtype}")
    return query_heads // heads
