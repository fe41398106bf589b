"""Radix select against a plain sort: ties, infinities, NaN, rows longer than a block."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from vase_kernels.requests import pack
from vase_kernels.select import order_of, packed, select_kernel

from tests.triton.scene import due, make_scene

HEADS, BLOCK = 2, 64
INF, NAN = math.inf, math.nan


@triton.jit
def order_kernel(key, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, order_of(tl.load(key + at)))


@triton.jit
def selected_kernel(order, positions, edge, out, N: tl.constexpr):
    at = tl.arange(0, N)
    key = packed(tl.load(order + at), tl.load(positions + at))
    tl.store(out + at, (key <= tl.load(edge)).to(tl.int32))


def order_image(key: torch.Tensor) -> torch.Tensor:
    flat = torch.zeros(triton.next_power_of_2(key.numel()))
    flat[: key.numel()] = key.flatten()
    out = torch.empty(flat.shape, dtype=torch.int32)
    order_kernel[(1,)](flat, out, N=flat.numel())
    return out[: key.numel()].view(key.shape)


def sort_key(key: float, position: int) -> tuple[float, int]:
    return (-INF if math.isnan(key) else key, position)


def test_image_orders_like_floats():
    key = torch.tensor([NAN, -INF, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, 3.4e38, INF])
    image = order_image(key).tolist()
    assert image[0] == image[1] and image[4] == image[5]
    assert image[1:5] + image[6:] == sorted(image[1:5] + image[6:])
    assert len(set(image)) == 8


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize(
    "keys",
    [
        lambda g, n: torch.randn(n, generator=g),
        lambda g, n: torch.randint(-2, 3, (n,), generator=g).float(),  # many ties
        lambda g, n: torch.zeros(n),
        lambda g, n: torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1.0]).repeat(n // 6 + 1)[:n],
        lambda g, n: 1 + torch.randint(0, 4, (n,), generator=g) * 2.0**-23,  # lowest bits
    ],
)
def test_against_a_sort(keys, round):
    requests = [
        due(2, 24, 16, 4, round=round, logical_length=40),  # 8 of 20
        due(0, 300, 37, 13, round=round, logical_length=300),  # 263 of 287, over 4 blocks
        due(1, 71, 64, 7, round=round, logical_length=500, num_protected=9),  # 7 of 64
    ]
    scene = make_scene(requests, layers=1, heads=HEADS)
    columns = 300
    g = torch.Generator().manual_seed(round)
    key = torch.stack([keys(g, HEADS * columns).view(HEADS, columns) for _ in requests])
    order = order_image(key)
    for victims in (True, False):
        edges = torch.full((3, HEADS), 77)
        faults = torch.zeros(4, dtype=torch.int32)
        select_kernel[(HEADS, 3)](
            order,
            edges,
            faults,
            pack(requests, 3),
            scene.req_to_token,
            scene.positions,
            scene.req_to_token.shape[1],
            scene.positions.shape[1],
            columns,
            VICTIMS=victims,
            HEADS=HEADS,
            BLOCK=BLOCK,
        )
        for n, r in enumerate(requests):
            count = r.length - r.budget if victims else r.num_protected
            candidates = r.length - r.window
            forced = 0
            for head in range(HEADS):
                slots = scene.req_to_token[r.row, :candidates].long()
                place = torch.arange(candidates) + r.logical_length - r.length
                if round > 1:
                    stored = scene.positions[0, slots[: r.budget], head]
                    place[: r.budget] = stored[:candidates]
                values = key[n, head, :candidates].tolist()
                ranked = sorted(range(candidates), key=lambda c: sort_key(values[c], place[c]))
                expected = torch.zeros(512, dtype=torch.int32)
                expected[ranked[:count]] = 1
                forced += any(values[c] == INF for c in ranked[:count])

                padded = [torch.full((512,), 2**31 - 1, dtype=torch.int32) for _ in range(2)]
                padded[0][:candidates] = order[n, head, :candidates]
                padded[1][:candidates] = place.to(torch.int32)
                got = torch.empty(512, dtype=torch.int32)
                selected_kernel[(1,)](*padded, edges[n, head].clone(), got, N=512)
                assert torch.equal(got, expected)
            assert int(faults[n]) == (forced if victims else 0)
        assert int(faults[3]) == 0


def test_request_less_rows_are_left_alone():
    edges = torch.full((1, HEADS), 77)
    empty = torch.zeros(0, dtype=torch.int32)
    select_kernel[(HEADS, 1)](
        empty, edges, empty, pack([], 1), empty, empty, 0, 0, 0, VICTIMS=True, HEADS=HEADS, BLOCK=16
    )
    assert edges.tolist() == [[77, 77]]
