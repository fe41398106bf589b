from __future__ import annotations

import random

import pytest
import torch
from vase_kernels.reference.philox import gumbel, normal_pair, philox4x32, seed_key, uniform

from tests.kernels import oracle

# Random123 kat_vectors, philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    words = philox4x32(key, (c0, c1, c2, c3))
    assert tuple(int(word) for word in words) == expected


def test_random_counters_match_python_ints():
    rng = random.Random(1)
    seeds = [rng.getrandbits(63) for _ in range(200)]
    counters = [tuple(rng.getrandbits(32) for _ in range(4)) for _ in range(200)]
    c0, c1, c2, c3 = torch.tensor(counters).unbind(1)
    words = torch.stack(philox4x32(seed_key(torch.tensor(seeds)), (c0, c1, c2, c3)), dim=1)
    expected = [oracle.philox(s, c) for s, c in zip(seeds, counters, strict=True)]
    assert words.tolist() == [list(w) for w in expected]


def test_counters_and_seeds_broadcast_and_inputs_survive():
    layers, positions = torch.arange(3)[:, None], torch.arange(5)
    zero = torch.tensor(7)
    seeds = torch.tensor([1, 2**62 + 5])[:, None, None]
    words = philox4x32(seed_key(seeds), (layers, zero, zero, positions))
    assert all(word.shape == (2, 3, 5) for word in words)
    assert words[2][1, 2, 4] == oracle.philox(2**62 + 5, (2, 7, 7, 4))[2]
    assert layers.flatten().tolist() == [0, 1, 2] and positions.tolist() == [0, 1, 2, 3, 4]
    scalar = philox4x32(seed_key(2**62 + 5), (layers, zero, zero, positions))
    assert torch.equal(scalar[0], words[0][1])


def test_uniform_is_exact_and_open():
    word = torch.tensor([0, 511, 512, 0xFFFFFFFF])
    u = uniform(word)
    assert u.dtype == torch.float32
    assert u.tolist() == [2.0**-24, 2.0**-24, 1.5 * 2.0**-23, 1 - 2.0**-24]


def test_gumbel_and_normals_are_finite_at_the_edges_and_close_to_float64():
    words = torch.tensor([0, 0xFFFFFFFF, 1 << 31, 123456789, 0xDEADBEEF])
    expected = torch.tensor([oracle.gumbel(int(w)) for w in words], dtype=torch.float64)
    torch.testing.assert_close(gumbel(words).double(), expected, rtol=1e-6, atol=1e-6)
    assert all(bool(x.isfinite().all()) for x in normal_pair(words, words.flip(0)))


def test_normal_pairs_have_the_moments_of_independent_normals():
    w0, w1, _, _ = philox4x32(seed_key(3), (torch.arange(200_000),) * 4)
    x, y = normal_pair(w0, w1)
    for sample in (x, y):
        assert abs(float(sample.mean())) < 0.01
        assert abs(float(sample.var()) - 1) < 0.02
        assert abs(float((sample**4).mean()) - 3) < 0.1
    assert abs(float((x * y).mean())) < 0.01
