"""Copy whole rows to other slots: all layers, K and V, in one launch.

Bytes: each row read once and written once, 2 * kv_heads * head_dim * element size a layer and way.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vase_kernels.pool import PoolView

#: Words of 4 bytes that a program moves at once: two loads of 16 bytes a thread.
BLOCK_WORDS = 1024


@triton.jit
def copy_kernel(k_pointers, v_pointers, source, target, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, layer): row source[i] over row target[i].

    k_pointers, v_pointers : int64 [layers], addresses of buffers with rows of WORDS * 4 bytes
    """
    i, layer = tl.program_id(0), tl.program_id(1)
    come, to = tl.load(source + i) * WORDS, tl.load(target + i) * WORDS
    k = tl.load(k_pointers + layer).to(tl.pointer_type(tl.int32))
    v = tl.load(v_pointers + layer).to(tl.pointer_type(tl.int32))
    for start in range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        mask = word < WORDS
        # Rows start on 16 bytes, see `PoolView.of`: wide loads.
        of_k = tl.load(tl.multiple_of(k + come + word, 16), mask)
        of_v = tl.load(tl.multiple_of(v + come + word, 16), mask)
        tl.store(tl.multiple_of(k + to + word, 16), of_k, mask)
        tl.store(tl.multiple_of(v + to + word, 16), of_v, mask)


def copy_rows(pool: PoolView, source: Tensor, target: Tensor) -> None:
    """Copy the K and V rows of slots `source` over those of slots `target`, bit for bit.

    Mutates exactly the rows of `target` in every layer; token positions are not copied. Nothing
    waits for the device or allocates.

    Parameters
    ----------
    source, target : int64 Tensor [rows], contiguous
        Targets are distinct and no source is one; a source may come several times.
    """
    for name, slots in (("source", source), ("target", target)):
        if slots.dtype != torch.int64 or not slots.is_contiguous():
            raise ValueError(f"{name}: want contiguous int64, got {slots.dtype}")
    if source.ndim != 1 or target.shape != source.shape:
        raise ValueError(f"{tuple(source.shape)} sources, {tuple(target.shape)} targets")
    _, _, heads = pool.token_positions.shape
    words = heads * pool.head_dim * pool.dtype.itemsize // 4
    copy_kernel[(len(source), len(pool.k_pointers))](
        pool.k_pointers,
        pool.v_pointers,
        source,
        target,
        WORDS=words,
        BLOCK=min(BLOCK_WORDS, triton.next_power_of_2(words)),
    )
