"""Philox4x32-10, the counter-based generator behind every draw (Salmon et al., SC 2011).

A draw depends on its key and counter alone: no state, no order, no batch. Words are unsigned
32-bit values held in int64 tensors.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

#: Four words of 32 bits.
Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
#: Two words of 32 bits: ints, or int64 tensors for a batch of seeds.
Key: TypeAlias = tuple[Tensor | int, Tensor | int]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def seed_key(seed: Tensor | int) -> Key:
    """Philox key (low word, high word) of seeds in [0, 2**63)."""
    return seed & _MASK, seed >> 32


def philox4x32(key: Key, counter: Words) -> Words:
    """Ten rounds of Philox4x32.

    Parameters
    ----------
    key : (k0, k1)
        See `seed_key`; tensors broadcast against the counter.
    counter : (c0, c1, c2, c3)
        int64 tensors of 32-bit words that broadcast against each other.

    Returns
    -------
    Words
        Four int64 tensors of 32-bit words in the broadcast shape.
    """
    k0, k1 = key
    shape = (counter[0] | counter[1] | counter[2] | counter[3] | k0 | k1).shape
    c0, c1, c2, c3 = (word.expand(shape).clone() for word in counter)
    for _ in range(_ROUNDS):
        # int64 wraps, so the pattern is that of the unsigned 64-bit product. In place for speed.
        product0, product1 = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])
        high0, high1 = product0 >> 32, product1 >> 32
        c0 = c1.bitwise_xor_(high1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = c3.bitwise_xor_(high0).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product1.bitwise_and_(_MASK), product0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """float32 in (0, 1): the middle of one of 2**23 equal cells. Exact, never 0 or 1."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel draw in float32, from -2.8 to 16.7."""
    return -torch.log(-torch.log(uniform(word)))


def normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals in float32 by Box-Muller: (r cos, r sin)."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(radius_word)))
    angle = 2.0 * math.pi * uniform(angle_word)
    return radius * torch.cos(angle), radius * torch.sin(angle)
