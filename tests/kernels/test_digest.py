from __future__ import annotations

import torch
from vase_kernels.reference.digest import chain, format_digest, mix64, round_sum

from tests.kernels import oracle

MASK64 = 2**64 - 1
# splitmix64 seeded with 0: its first outputs are the finaliser of multiples of the golden gamma.
GAMMA = 0x9E3779B97F4A7C15
SPLITMIX64_OF_ZERO = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def make_positions() -> torch.Tensor:
    return torch.randint(0, 2**31 - 1, (2, 3, 2, 5), generator=torch.Generator().manual_seed(0))


def oracle_sum(positions: torch.Tensor, rounds, layers, heads, n: int) -> int:
    return sum(
        oracle.token_hash(layer, head, rounds[n], p)
        for i, layer in enumerate(layers)
        for j, head in enumerate(heads)
        for p in positions[n, i, j].tolist()
    )


def test_mix64_known_answers():
    x = torch.tensor([signed(GAMMA * i & MASK64) for i in (1, 2, 3)])
    assert tuple(v & MASK64 for v in mix64(x).tolist()) == SPLITMIX64_OF_ZERO


def test_round_sums_and_chain_match_python_ints():
    positions, layers, heads = make_positions(), [0, 7, 39], [4, 5]
    digest, expected = torch.zeros(2, dtype=torch.int64), [0, 0]
    for rounds in ([1, 9], [2, 10], [2**31 - 1, 11]):
        s = round_sum(positions, torch.tensor(rounds), torch.tensor(layers), torch.tensor(heads))
        digest = chain(digest, s)
        for n in range(2):
            add = oracle_sum(positions, rounds, layers, heads, n)
            assert int(s[n]) & MASK64 == add & MASK64
            expected[n] = (expected[n] * GAMMA + add) & MASK64
            assert format_digest(int(digest[n])) == f"{expected[n]:016x}"


def test_order_of_victims_does_not_matter_but_place_and_round_do():
    positions = make_positions()
    rounds, layers, heads = torch.tensor([1, 1]), torch.arange(3), torch.arange(2)
    s = round_sum(positions, rounds, layers, heads)
    assert torch.equal(s, round_sum(positions.flip(-1), rounds, layers, heads))
    assert not torch.equal(s, round_sum(positions, rounds + 1, layers, heads))
    assert not torch.equal(s, round_sum(positions, rounds, layers, heads + 1))
    assert not torch.equal(s, round_sum(positions.flip(1), rounds, layers, heads))


def test_digests_of_ranks_add_up():
    positions, layers = make_positions(), torch.arange(3)
    whole, parts = torch.zeros(2, dtype=torch.int64), [torch.zeros(2, dtype=torch.int64)] * 2
    for n in (1, 2, 3):
        rounds = torch.tensor([n, n])
        whole = chain(whole, round_sum(positions, rounds, layers, torch.arange(2)))
        for rank in range(2):
            head = torch.tensor([rank])
            s = round_sum(positions[:, :, rank : rank + 1], rounds, layers, head)
            parts[rank] = chain(parts[rank], s)
    assert torch.equal(whole, parts[0] + parts[1])


def test_format_is_16_digits_of_the_unsigned_pattern():
    assert format_digest(1) == "0000000000000001"
    assert format_digest(-1) == format_digest(MASK64) == "f" * 16
