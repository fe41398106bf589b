"""Device draws: words and uniforms are the reference's bits, the rest is close to it."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from vase_kernels import philox as device
from vase_kernels.digest import mix64
from vase_kernels.reference import philox as reference
from vase_kernels.requests import pack

from tests.kernels import oracle
from tests.triton.device import DEVICE
from tests.triton.scene import due

COUNT = 1024


@triton.jit(do_not_specialize=["layer", "head", "round"])
def draw_kernel(out, floats, requests, last, layer, head, round, N: tl.constexpr):
    at = tl.arange(0, N)
    w0, w1, w2, w3 = device.words(requests, 0, layer, head, round, tl.load(last + at))
    tl.store(out + at, w0.to(tl.int64))
    tl.store(out + N + at, w1.to(tl.int64))
    tl.store(out + 2 * N + at, w2.to(tl.int64))
    tl.store(out + 3 * N + at, w3.to(tl.int64))
    tl.store(floats + at, device.uniform(w0))
    tl.store(floats + N + at, device.gumbel(w0))
    tl.store(floats + 2 * N + at, device.normal(w0, w1, at < 0))
    tl.store(floats + 3 * N + at, device.normal(w0, w1, at >= 0))


@triton.jit
def mix_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, mix64(tl.load(x + at).to(tl.uint64, bitcast=True)).to(tl.int64))


@pytest.mark.parametrize(
    ("seed", "round", "layer", "head"),
    [(0, 1, 0, 0), (2**63 - 1, 2**31 - 1, 79, 127), (0x0123456789ABCDEF, 7, 3, 5)],
)
def test_draws(seed, round, layer, head):
    g = torch.Generator().manual_seed(seed % 97)
    last = torch.randint(0, 2**31 - 1, (COUNT,), generator=g, dtype=torch.int32)
    last[:2] = torch.tensor([0, 2**31 - 1])
    words = torch.empty(4, COUNT, dtype=torch.int64, device=DEVICE)
    floats = torch.empty(4, COUNT, device=DEVICE)
    table = pack([due(0, 12, 8, 4, seed=seed)], 1).to(DEVICE)
    draw_kernel[(1,)](words, floats, table, last.to(DEVICE), layer, head, round, N=COUNT)
    words, floats = words.cpu(), floats.cpu()

    counter = (*map(torch.tensor, (layer, head, round)), last.to(torch.int64))
    expected = reference.philox4x32(reference.seed_key(seed), counter)
    assert torch.equal(words, torch.stack(expected))
    for i in (0, 1, 500):
        assert oracle.philox(seed, (layer, head, round, int(last[i]))) == tuple(words[:, i])

    w0, w1 = expected[:2]
    uniform, gumbel, cosine, sine = floats
    assert torch.equal(uniform, reference.uniform(w0))
    torch.testing.assert_close(gumbel, reference.gumbel(w0), rtol=1e-6, atol=1e-6)
    for i, word in enumerate(w1.tolist()):
        radius = math.sqrt(-2 * math.log(oracle.uniform(int(w0[i]))))
        angle = 2 * math.pi * oracle.uniform(word)
        assert abs(float(cosine[i]) - radius * math.cos(angle)) < 4e-7 * max(1, radius)
        assert abs(float(sine[i]) - radius * math.sin(angle)) < 4e-7 * max(1, radius)


def test_mix64():
    x = torch.randint(-(2**63), 2**63 - 1, (64,), generator=torch.Generator().manual_seed(1))
    out = torch.empty_like(x, device=DEVICE)
    mix_kernel[(1,)](x.to(DEVICE), out, N=64)
    mask = oracle.MASK64
    assert [v & mask for v in out.tolist()] == [oracle.mix64(v & mask) for v in x.tolist()]
