"""Copied rows: torch's own copy of every buffer, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vase_kernels import copy_rows as module
from vase_kernels.copy_rows import copy_rows

from tests.triton.device import DEVICE
from tests.triton.scene import Scene, assert_same_bytes, due, make_scene

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def a_scene(**shape: Any) -> Scene:
    """24 slots of any bytes: NaN, infinities and numbers no product would leave."""
    scene = make_scene([due(0, 20, 9, 4)], spare=4, **shape)
    g = torch.Generator().manual_seed(3)
    for x in scene.allocations:
        x.view(torch.uint8).random_(0, 256, generator=g)
    return scene


def copied(scene: Scene, source: list[int], target: list[int]) -> None:
    there = scene.to(DEVICE)
    slots = (torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in (source, target))
    copy_rows(there.view, *slots)
    if DEVICE != "cpu":
        scene.take_back(there)


def copied_by_torch(scene: Scene, source: list[int], target: list[int]) -> None:
    for buffer in scene.buffers:
        rows = buffer.flatten(1).view(torch.uint8)
        rows[target] = rows[source]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 64), (2, 96), (8, 128), (5, 256)])
def test_rows_of_any_type_and_width(dtype: torch.dtype, heads: int, dim: int) -> None:
    """Those of five heads of 256 take more than one block. A source may be that of several."""
    scene = a_scene(layers=2, heads=heads, dim=dim, dtype=dtype)
    expected = scene.clone()
    source, target = [5, 0, 23, 5, 11, 0], [7, 22, 1, 12, 2, 19]
    copied(scene, source, target)
    copied_by_torch(expected, source, target)
    assert_same_bytes(scene, expected)


def test_nothing_to_copy_changes_nothing() -> None:
    scene = a_scene()
    before = scene.clone()
    copied(scene, [], [])
    assert_same_bytes(scene, before)


@pytest.mark.parametrize("rows", [1, 9])
def test_it_is_one_launch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(module, "copy_kernel", Kernel())
    copied(a_scene(layers=3), list(range(rows)), list(range(rows, 2 * rows)))
    assert grids == [(rows, 3)]


def test_wrong_slots_are_refused() -> None:
    view = a_scene().to(DEVICE).view
    two, three = (torch.arange(n, device=DEVICE) for n in (2, 3))
    with pytest.raises(ValueError, match=r"\(2,\) sources, \(3,\) targets"):
        copy_rows(view, two, three)
    with pytest.raises(ValueError, match=r"target: want contiguous int64, got torch\.int32"):
        copy_rows(view, two, two.int())
    with pytest.raises(ValueError, match="source: want contiguous int64"):
        copy_rows(view, three[::2], two)
