"""The kernels' benchmark repeats rounds as the engine does, with new tokens before each.

What needs the kernels themselves is in interpreted_kernels.py."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources
from vase_kernels.scoring import Round

from benchmarks import (
    device_clock,
    eviction_case,
    instructions,
    kernels,
    overhead,
    results,
    tuning,
)
from benchmarks.environment import ROOT
from benchmarks.eviction_case import Case, Shape
from tests.triton.device import INTERPRETED

CPU = torch.device("cpu")
BF16 = torch.bfloat16
TINY = Shape(layers=1, kv_heads=1, group=2, head_dim=16, window=8, budget=32, requests=2)


@pytest.mark.parametrize("policy", kernels.POLICIES)
def test_nothing_that_is_compared_is_nearly_a_tie(policy: str) -> None:
    """Keys that are equal are no matter: ties go by position. Errors are about a millionth."""
    case = kernels.checked(policy, CPU)
    gaps = case.edge_gaps()
    assert gaps.shape == (2, 2, 2)
    assert ((gaps == 0) | (gaps > 5e-5)).all(), gaps


def test_a_choice_reaches_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    case, launched = Case(TINY, "vase-dkv", CPU), []

    def seconds(case: Case, repeats: int, clock: object) -> float:
        scoring = tuning.scoring
        launched.append((scoring.SPLIT_DKV, *scoring.projection_block(16, BF16)))
        return float(len(launched))

    monkeypatch.setattr(tuning, "kernels_seconds", seconds)
    for choice in tuning.choices("vase-dkv", TINY):
        if choice.name in ("SPLIT_DKV 4", "projection (32, 8)"):
            tuning.measure(case, choice, 1, turns=1)
    assert sorted(launched) == [(2, 32, 8), (2, 64, 4), (2, 64, 4), (4, 64, 4)]


def test_a_choice_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(case: Case, repeats: int, clock: object) -> float:
        raise OutOfResources(262144, 232448, "shared memory")

    monkeypatch.setattr(tuning, "kernels_seconds", too_large)
    row = tuning.measure(Case(TINY, "knorm", CPU), tuning.Choice("SPLIT 8", {"SPLIT": 8}), 1)
    assert "shared memory" in row["refused"] and "ratio" not in row


def test_what_a_round_asks_of_the_tensor_cores() -> None:
    queries = TINY.group * TINY.window
    assert TINY.tensor_operations("snapkv") == 2 * 2 * (2 * TINY.budget * queries * TINY.head_dim)
    assert TINY.exponentials("snapkv") == 2 * 2 * TINY.budget * queries
    assert TINY.tensor_operations("vase-dkv") == 2 * 2 * 3 * (2 * TINY.budget * TINY.head_dim * 32)
    assert TINY.tensor_operations("random") == TINY.exponentials("vase-dkv") == 0


def test_it_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernels.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "--check-only" in run.stdout


def test_no_token_is_there_twice() -> None:
    case = Case(TINY, "random", CPU)
    step = case.reference()
    for turn in range(1, 6):
        case.advance()
        step()
        for slots in case.req_to_token[:, : TINY.budget].long():
            positions = case.positions[0, slots, 0]
            assert len(positions.unique()) == len(case.k[0][slots].unique(dim=0)) == TINY.budget
            # The recent tokens are there, under the positions that they came with.
            assert positions.max() == TINY.columns + turn * TINY.window - 1


def test_a_round_finds_its_rows_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """L2 is flushed behind the new tokens, which are the rows that the round moves."""
    case, seen = Case(TINY, "random", CPU), []

    def flush(device: torch.device) -> None:
        seen.append((device, [x.clone() for x in (*case.k, *case.v)]))

    monkeypatch.setattr(eviction_case, "flush_l2", flush)
    case.advance()
    ((device, rows),) = seen
    assert device == CPU
    assert all(torch.equal(x, y) for x, y in zip(rows, (*case.k, *case.v), strict=True))

    flushed: list[dict[str, Any]] = []
    monkeypatch.setattr(
        torch, "zeros", lambda size, **where: flushed.append({"size": size} | where)
    )
    device_clock.flush_l2(CPU)
    device_clock.flush_l2(torch.device("cuda"))
    (one,) = flushed
    assert one["device"].type == "cuda" and one["size"] * one["dtype"].itemsize >= 256 * 2**20


def test_launches_are_no_time_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device sleeps before the first event, so the second follows the kernels at once."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    found = device_clock.device_seconds(
        lambda: done.append("call"), 2, before=lambda: done.append("before")
    )
    assert found == 3e-3
    assert done == 3 * ["before", "sleep", "event", "call", "event", "wait"]


def test_a_round_that_forgot_another_number_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, r: Round) -> object:
        return lambda: r.workspace.num_holes.fill_(TINY.window + 1)

    monkeypatch.setattr(Case, "kernels", wrong)
    with pytest.raises(SystemExit, match="random: a head forgot 9 to 9 tokens instead of 8"):
        kernels.kernels_seconds(Case(TINY, "random", CPU), 1)


def test_a_check_that_would_compare_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RUNS_KERNELS", False)
    with pytest.raises(SystemExit, match="nothing was compared"):
        kernels.check(["random"], CPU)


def test_memory_that_torch_keeps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are made one after the other, and torch keeps the memory of the last."""
    kept = 0
    needed = 2 * Shape(1, 8, 5, 128, 64, 32, 1).pool_bytes

    def release() -> None:
        nonlocal kept
        kept = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", release)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed - kept, needed))
    args = argparse.Namespace(layers=1, budgets=[32, 32], requests=[1])
    seen = []
    for shape in kernels.shapes(args):
        kept = needed
        seen.append(shape.budget)
    assert seen == [32, 32]


def test_memory_of_the_copies_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker of `overhead` sizes its pool by what is free then."""
    seen = []

    def copy(device: torch.device) -> float:
        seen.append("copy")
        return 5.0

    monkeypatch.setattr(device_clock, "copy_bandwidth", copy)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("give back"))
    assert overhead.bandwidth() == 5.0
    assert seen == ["copy", "give back"]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_the_counted_instructions_are_those_of_the_kernels() -> None:
    """`python -m benchmarks.instructions` after a change of a kernel, then `benchmarks.tables`."""
    report = results.read(results.FOLDER / "instructions.json")
    assert report["kernels"] == instructions.kernels_digest()
    assert report["environment"]["versions"]["triton"] == triton.__version__
    issued = {row["policy"]: row["issued"] for row in report["samples"]}
    assert issued["knorm"] == instructions.count("knorm", Shape(**report["settings"]))
