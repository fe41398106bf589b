"""Eviction digest: 64 bits that name which tokens a request has forgotten so far.

    h(layer, head, round, position) = mix(mix(layer << 32 | head) ^ (round << 32 | position))
    S_n = sum of h over the victims of round n                                   mod 2**64
    D_0 = 0,  D_n = D_{n-1} * 0x9E3779B97F4A7C15 + S_n                           mod 2**64

S does not depend on order, and D is linear in S: ranks that own different heads or layers add
their digests. int64 tensors hold the 64-bit patterns; torch's int64 arithmetic wraps.
"""

from __future__ import annotations

from torch import Tensor


def _signed(bits: int) -> int:
    """The int64 with the same 64-bit pattern."""
    return bits - (1 << 64) if bits >> 63 else bits


_CHAIN = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection on 64-bit patterns."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def round_sum(positions: Tensor, rounds: Tensor, layers: Tensor, heads: Tensor) -> Tensor:
    """S of one round, over the layers and heads given.

    Parameters
    ----------
    positions : int Tensor [N, L, H, V]
        Token positions of the victims, in any order.
    rounds : int64 Tensor [N]
    layers : int64 Tensor [L]
    heads : int64 Tensor [H]
        Global indices.

    Returns
    -------
    int64 Tensor [N]
    """
    place = mix64((layers[:, None] << 32) | heads)[None, :, :, None]
    moment = (rounds[:, None, None, None] << 32) | positions
    return mix64(place ^ moment).sum((1, 2, 3))


def chain(digest: Tensor, round_sum: Tensor) -> Tensor:
    """The digest after a round, from the digest before it and the round's sum."""
    return digest * _CHAIN + round_sum


def format_digest(digest: int) -> str:
    """16 hex digits of a digest held as signed or unsigned 64 bits."""
    return f"{digest & 0xFFFFFFFFFFFFFFFF:016x}"
