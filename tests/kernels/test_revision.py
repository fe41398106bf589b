"""What `vase_kernels.REVISION` stands for: three rounds of every policy on inputs made of integers.

A change that makes one of these differ needs another REVISION, and the digests it prints.
"""

from __future__ import annotations

import pytest
import torch
from vase_kernels import REVISION
from vase_kernels.reference import SCORERS, chain, evict_reference, format_digest

LAYERS, SLOTS, HEADS, GROUP, DIM = 2, 40, 2, 3, 16
BUDGET, WINDOW, ROUNDS = 24, 8, 3

#: By revision. Keys of candidates are far enough apart that a CPU's own rounding changes none.
DIGESTS = {
    7: {
        "vase-attnv": "d511141765342c3b",
        "vase-dkv": "44d043f5ab8fb025",
        "curdkv": "61a0cb2ff7edfd72",
        "snapkv": "208cffe3f0cd0abf",
        "rkv": "f1d13dca7779881a",
        "random": "e15392af55066b87",
        "streaming": "b0916721e9773d9a",
        "knorm": "2a051313c9ae42af",
        "evict-largest-values": "ced6f940cf3919d7",
    }
}


def spread(*shape: int, start: int) -> torch.Tensor:
    """Numbers between -2 and 2 that look irregular, the same everywhere."""
    count = torch.Size(shape).numel()
    mixed = (torch.arange(start, start + count) * 2654435761) % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    return (mixed % 4001 - 2000).div(1000).reshape(shape)


def digest(policy: str) -> str:
    keys = [spread(SLOTS, HEADS, DIM, start=layer * 10_007) for layer in range(LAYERS)]
    values = [spread(SLOTS, HEADS, DIM, start=500_009 + layer * 10_007) for layer in range(LAYERS)]
    positions = torch.zeros(LAYERS, SLOTS, HEADS, dtype=torch.int32)
    slots = torch.arange(SLOTS).flip(0)[None, : BUDGET + WINDOW]
    total = torch.tensor(0)
    for number in range(1, ROUNDS + 1):
        recent = slots[0, BUDGET:]
        for rows, start in ((keys, 1_000_003), (values, 2_000_003)):
            for layer in range(LAYERS):
                new = spread(WINDOW, HEADS, DIM, start=start + 100_003 * number + 997 * layer)
                rows[layer][recent] = new
        queries = spread(1, LAYERS, HEADS * GROUP, WINDOW, DIM, start=3_000_017 * number)
        sums = evict_reference(
            policy,
            keys,
            values,
            positions,
            slots,
            queries,
            budget=BUDGET,
            window=WINDOW,
            seeds=torch.tensor([7]),
            rounds=torch.tensor([number]),
            logical_lengths=torch.tensor([BUDGET + WINDOW * number]),
        )
        total = chain(total, sums[0])
    return format_digest(int(total))


@pytest.mark.parametrize("policy", SCORERS)
def test_same_choices_as_ever(policy: str) -> None:
    assert digest(policy) == DIGESTS[REVISION][policy]
