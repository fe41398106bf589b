"""The eviction digest's hash on the device; `reference/digest.py` defines it."""

# mypy: disable-error-code="import-untyped,no-untyped-def,no-any-return,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix64(x):
    """The finaliser of splitmix64 on uint64."""
    x = (x ^ (x >> 30)) * tl.full(x.shape, 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full(x.shape, 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def victim_hashes(layer, head, round, positions):
    """int64 hash of each victim; layer and head are global indices.

    Their wrapping sum does not depend on order, so integer atomics may add it up.
    """
    zero = positions.to(tl.uint64) * 0
    place = mix64(zero + ((layer.to(tl.uint64) << 32) | head.to(tl.uint64)))
    moment = (zero + (round.to(tl.uint64) << 32)) | positions.to(tl.uint64)
    return mix64(place ^ moment).to(tl.int64)
