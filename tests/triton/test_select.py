"""Radix select against a plain sort: ties, infinities, NaN, rows longer than a block."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from vase_kernels.reference.order import smallest
from vase_kernels.requests import pack
from vase_kernels.scoring import BLOCK_COLUMNS
from vase_kernels.select import order_of, packed, select_kernel

from tests.triton.device import DEVICE
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
    out = torch.empty(flat.shape, dtype=torch.int32, device=DEVICE)
    order_kernel[(1,)](flat.to(DEVICE), out, N=flat.numel())
    return out[: key.numel()].view(key.shape).cpu()


def run_select(scene, order, requests, *, rows, columns, victims=True, block=BLOCK):
    """Edges [rows, heads] and faults [rows + 1] of a table, on the CPU."""
    heads = scene.positions.shape[2]
    edges = torch.full((rows, heads), 77, device=DEVICE)
    faults = torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE)
    there = scene.to(DEVICE)
    select_kernel[(heads, rows)](
        order.to(DEVICE),
        edges,
        faults,
        pack(requests, rows).to(DEVICE),
        there.req_to_token,
        there.positions,
        scene.req_to_token.shape[1],
        scene.positions.shape[1],
        columns,
        VICTIMS=victims,
        HEADS=heads,
        BLOCK=block,
    )
    return edges.cpu(), faults.cpu()


def selected(order, place, edge):
    """Which of a row's columns the kernels take as selected, given its edge: bool [columns]."""
    count = len(order)
    size = triton.next_power_of_2(count)
    padded = [torch.full((size,), 2**31 - 1, dtype=torch.int32) for _ in range(2)]
    padded[0][:count], padded[1][:count] = order, place.to(torch.int32)
    got = torch.empty(size, dtype=torch.int32, device=DEVICE)
    selected_kernel[(1,)](*(x.to(DEVICE) for x in padded), edge.clone().to(DEVICE), got, N=size)
    return got[:count].bool().cpu()


def sort_key(key: float, position: int) -> tuple[float, int]:
    return (-INF if math.isnan(key) else key, position)


def test_image_orders_like_floats():
    key = torch.tensor([NAN, -INF, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, 3.4e38, INF])
    image = order_image(key).tolist()
    assert image[0] == image[1] and image[4] == image[5]
    assert image[1:5] + image[6:] == sorted(image[1:5] + image[6:])
    assert len(set(image)) == 8


KEYS = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "many ties": lambda g, n: torch.randint(-2, 3, (n,), generator=g).float(),
    "one tie": lambda g, n: torch.zeros(n),
    "special": lambda g, n: torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1.0]).repeat(n // 6 + 1)[:n],
    "lowest bits": lambda g, n: 1 + torch.randint(0, 4, (n,), generator=g) * 2.0**-23,
}


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("kind", KEYS)
def test_against_a_sort(kind, round):
    requests = [
        due(2, 24, 16, 4, round=round, logical_length=40),  # 8 of 20
        due(0, 300, 37, 13, round=round, logical_length=300),  # 263 of 287, over 4 blocks
        # 7 of 64, behind 5 that are pinned
        due(1, 76, 64, 7, round=round, logical_length=500, num_protected=9, pinned=5),
    ]
    scene = make_scene(requests, layers=1, heads=HEADS)
    columns = 300
    g = torch.Generator().manual_seed(round)
    key = torch.stack([KEYS[kind](g, HEADS * columns).view(HEADS, columns) for _ in requests])
    order = order_image(key)
    for victims in (True, False):
        edges, faults = run_select(scene, order, requests, rows=3, columns=columns, victims=victims)
        for n, r in enumerate(requests):
            length = r.length - r.pinned
            count = length - r.budget if victims else r.num_protected
            candidates = length - r.window
            forced = 0
            for head in range(HEADS):
                slots = scene.req_to_token[r.row, r.pinned : r.pinned + candidates].long()
                place = torch.arange(candidates) + r.logical_length - length
                if round > 1:
                    stored = scene.positions[0, slots[: r.budget], head]
                    place[: r.budget] = stored[:candidates]
                values = key[n, head, :candidates].tolist()
                ranked = sorted(range(candidates), key=lambda c: sort_key(values[c], place[c]))
                expected = torch.zeros(candidates, dtype=torch.bool)
                expected[ranked[:count]] = True
                forced += any(values[c] == INF for c in ranked[:count])
                got = selected(order[n, head, :candidates], place, edges[n, head])
                assert torch.equal(got, expected)
            assert int(faults[n]) == (forced if victims else 0)
        assert int(faults[3]) == 0


def test_request_less_rows_are_left_alone():
    scene = make_scene([due(0, 12, 8, 4)], layers=1, heads=HEADS)
    edges, faults = run_select(scene, torch.zeros(0, dtype=torch.int32), [], rows=1, columns=0)
    assert edges.tolist() == [[77, 77]] and faults.tolist() == [0, 0]


@pytest.mark.parametrize("round", [1, 2])
def test_the_largest_budget_served(round):
    """16384 rows stay of 16384 + 256, in blocks as long as the package's."""
    r = due(0, 16384 + 256, 16384, 256, round=round, logical_length=16640 * round)
    scene = make_scene([r], layers=1, heads=1, dim=16)
    g = torch.Generator().manual_seed(round)
    key = torch.randint(-4000, 4000, (r.budget,), generator=g) / 512  # ties at every edge
    order = order_image(key)
    edges, _ = run_select(
        scene, order.view(1, 1, -1), [r], rows=1, columns=r.budget, block=BLOCK_COLUMNS
    )
    slots = scene.req_to_token[0, : r.budget].long()
    place = torch.arange(r.budget) if round == 1 else scene.positions[0, slots, 0].long()
    expected = torch.zeros(r.budget, dtype=torch.bool)
    expected[smallest(key, place, r.window)] = True
    assert torch.equal(selected(order, place, edges[0, 0]), expected)
