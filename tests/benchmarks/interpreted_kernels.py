"""The kernels' benchmark with the kernels themselves: run by tests/kernels/test_triton_kernels.py,
under Triton's interpreter."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from vase_kernels import scoring

from benchmarks import kernels
from benchmarks.eviction_case import Case
from benchmarks.tuning import POLICIES, choices, measure
from tests.benchmarks.test_kernels import CPU, TINY


def test_every_arm_repeats_its_round() -> None:
    """`measure` itself refuses a round that did not overwrite `window` rows of every head."""
    row = kernels.measure(Case(TINY, "random", CPU), 4, 1e9)
    assert all(
        row[name] > 0 for name in ("kernels_ms", "device_ms", "reference_ms", "gather_all_ms")
    )


def test_time_bytes_bandwidth_and_share_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "shapes", lambda args: [TINY])
    monkeypatch.setattr(
        sys, "argv", ["kernels", "--check", "--policies", "random", "--repeats", "1"]
    )
    kernels.main()
    said = capsys.readouterr().out
    assert "check: kernels and reference forget the same tokens" in said
    line = said.splitlines()[-1]
    assert line.startswith("random               B    32 due   2 floor_gb 2.56e-06 ")
    for name in ("kernels_ms", "device_ms", "gb_per_s", "share_of_floor", "reference_ms"):
        assert f" {name} " in line
    assert " gather_all_ms " in line


def test_kernels_and_reference_agree_over_several_rounds() -> None:
    case = Case(TINY, "random", CPU)
    other = copy.deepcopy(case)
    step, expected = case.kernels(case.round()), other.reference()
    for _ in range(3):
        case.advance()
        other.advance()
        assert torch.equal(step(), expected())
        assert torch.equal(case.positions, other.positions)


def test_a_choice_of_block_shapes_is_a_round() -> None:
    """Choices take the place of what the kernels are launched with, and only while measured."""
    wanted = {("vase-attnv", "SPLIT 1"), ("vase-dkv", "SPLIT_DKV 1"), ("knorm", "SPLIT 8")}
    before, rows = dict(vars(scoring)), []
    for policy in POLICIES:
        case = Case(TINY, policy, CPU)
        found = list(choices(policy, TINY))
        assert len({choice.name for choice in found}) == len(found)
        for choice in found:
            if (policy, choice.name) in wanted:
                rows.append(measure(case, choice, 1, turns=1))
    assert dict(vars(scoring)) == before
    assert all(row["ratio"] > 0 for row in rows)
    assert {(row["policy"], row["choice"]) for row in rows} == wanted
