"""The table of due requests, and how a kernel reads one request's fields and token positions.

Kernels count a request's columns from its first one that is not pinned: the table's LENGTH leaves
the pinned columns out, and `slots_of`, the one place where a column becomes a slot, adds them. So
no kernel can reach a pinned row.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns a block of vase-dkv's Gaussian has.
MAX_PROJECTION = 32


@dataclasses.dataclass(frozen=True, slots=True)
class DueRequest:
    """One request of a round; its fields are the columns of the table, in this order.

    row : index into `req_to_token`
    length : columns it holds, at least `pinned + budget + window`
    budget, window : tokens kept, window included; recent tokens that are never evicted
    round : counted from 1; in round 1 the token-position store need not be written before
    logical_length : tokens seen so far
    seed : eviction seed in [0, 2**63)
    num_sinks : token positions below it are never evicted; of a kept prompt they are pinned anyway
    num_protected : vase-attnv; candidates kept for their range, int(budget * protected_share)
    pool_width : vase-attnv, snapkv, rkv; odd
    projection_dim : vase-dkv, curdkv; columns of the Gaussian, at most `MAX_PROJECTION`
    pinned : leading columns that are left alone and that the budget does not count
    mix_lambda : rkv; share of attention in the key, in [0, 1]
    ring_row : index into the query ring, where the policy reads queries
    """

    row: int
    length: int
    budget: int
    window: int
    round: int
    logical_length: int
    seed: int
    num_sinks: int = 4
    num_protected: int = 0
    pool_width: int = 5
    projection_dim: int = 20
    pinned: int = 0
    mix_lambda: float = 0.1
    ring_row: int = 0

    def __post_init__(self) -> None:
        rows = self.length - self.pinned
        if self.pinned < 0:
            raise ValueError(f"pinned must not be negative, got {self.pinned}")
        if not 0 < self.window < self.budget or rows < self.budget + self.window:
            raise ValueError(
                f"need 0 < window < budget and budget + window rows, got window {self.window}, "
                f"budget {self.budget}, {rows} rows beside {self.pinned} pinned"
            )
        # Sinks rank first among the protected, so the larger number covers both. A token's
        # position is at least its column, so the pinned columns hold the first sinks.
        sinks = max(0, self.num_sinks - self.pinned)
        evictable = rows - self.window - max(sinks, self.num_protected)
        if rows - self.budget > evictable:
            raise ValueError(
                f"{rows - self.budget} victims are more than the {evictable} candidates that may go"
            )
        if self.pool_width % 2 == 0:
            raise ValueError(f"pool_width must be odd, got {self.pool_width}")
        if not 0 < self.projection_dim <= MAX_PROJECTION:
            raise ValueError(f"projection_dim {self.projection_dim} is not in [1, 32]")
        if not 0 <= self.mix_lambda <= 1:
            raise ValueError(f"mix_lambda {self.mix_lambda} is not in [0, 1]")

    def table_row(self) -> tuple[int, ...]:
        """The fields as the table holds them: LENGTH without the pinned, floats as their bits."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["length"] = self.length - self.pinned
        (values["mix_lambda"],) = struct.unpack("<i", struct.pack("<f", self.mix_lambda))
        return tuple(values.values())


def table_fields(budget: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's own fields as `DueRequest` takes them: a protected share is a number there."""
    named = dict(fields)
    if "protected_share" in named:
        named["num_protected"] = int(budget * named.pop("protected_share"))
    return named


TABLE_WIDTH = tl.constexpr(len(dataclasses.fields(DueRequest)))
ROW = tl.constexpr(0)
LENGTH = tl.constexpr(1)
BUDGET = tl.constexpr(2)
WINDOW = tl.constexpr(3)
ROUND = tl.constexpr(4)
LOGICAL_LENGTH = tl.constexpr(5)
SEED = tl.constexpr(6)
NUM_SINKS = tl.constexpr(7)
NUM_PROTECTED = tl.constexpr(8)
POOL_WIDTH = tl.constexpr(9)
PROJECTION_DIM = tl.constexpr(10)
PINNED = tl.constexpr(11)
MIX_LAMBDA = tl.constexpr(12)
RING_ROW = tl.constexpr(13)


def pack(requests: Sequence[DueRequest], max_requests: int) -> Tensor:
    """The table of a batch on the CPU: int64 [max_requests, TABLE_WIDTH].

    A row of zeros is no request: programs of rows with length 0 return at once. So the table has
    one shape for every batch, and copying it over a table on the GPU is all a captured graph
    needs to run another batch.
    """
    if len(requests) > max_requests:
        raise ValueError(f"{len(requests)} requests do not fit a table of {max_requests}")
    table = torch.zeros(max_requests, TABLE_WIDTH.value, dtype=torch.int64)
    if requests:
        table[: len(requests)] = torch.tensor([r.table_row() for r in requests])
    return table


#: Integer arguments of kernels that follow the largest request of a batch. Triton compiles a kernel
#: anew for a number that is 1 or divisible by 16; nobody's round may wait for that, or run in other
#: instructions, because of a neighbour.
OF_THE_BATCH = ("context", "max_columns", "max_pairs", "max_queries")


@triton.jit
def field(requests, n, NAME: tl.constexpr):
    """One field of request `n`: an int64 scalar."""
    return tl.load(requests + n * TABLE_WIDTH + NAME)


@triton.jit
def slots_of(columns, mask, requests, n, req_to_token, context):
    """Slots int64 of a request's columns, counted from the pinned ones on; 0 where masked out."""
    row = field(requests, n, ROW) * context + field(requests, n, PINNED)
    return tl.load(req_to_token + row + columns, mask=mask, other=0).to(tl.int64)


@triton.jit
def rows_of(
    buffer,
    columns,
    inside,
    depth,
    requests,
    n,
    head,
    req_to_token,
    context,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Rows [block, BLOCK_D] of one head's K or V at a request's columns; 0 outside."""
    slots = slots_of(columns, inside, requests, n, req_to_token, context)
    at = buffer + (slots[:, None] * HEADS + head) * HEAD_DIM + depth
    mask = inside[:, None] & (depth < HEAD_DIM)
    return tl.load(tl.multiple_of(at, [1, 16]), mask=mask, other=0.0)


@triton.jit
def positions_of(
    columns,
    mask,
    requests,
    n,
    layer,
    head,
    req_to_token,
    context,
    store,
    num_slots,
    HEADS: tl.constexpr,
):
    """Token positions int32 of a request's columns in one layer and head.

    Columns below the budget are looked up in `store` [layers, num_slots, HEADS] from the second
    round on; every other row still lies where it was appended.
    """
    unmoved = columns + (field(requests, n, LOGICAL_LENGTH) - field(requests, n, LENGTH))
    stored = mask & (columns < field(requests, n, BUDGET)) & (field(requests, n, ROUND) != 1)
    slots = slots_of(columns, stored, requests, n, req_to_token, context)
    kept = tl.load(store + (layer * num_slots + slots) * HEADS + head, mask=stored, other=0)
    return tl.where(stored, kept, unmoved.to(tl.int32))
