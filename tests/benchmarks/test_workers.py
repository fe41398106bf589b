"""The benchmarks of workers on real ones, with a tiny model: minutes, only with VASE_TEST_SLOW."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import determinism, overhead, paper, serving
from tests.engine.tiny_model import write_weights

pytestmark = [
    pytest.mark.skipif("VASE_TEST_SLOW" not in os.environ, reason="set VASE_TEST_SLOW=1"),
    pytest.mark.timeout(900),
]


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    return ["--model", str(write_weights(folder)), "--output", str(tmp_path)]


def _result(model: list[str], name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((Path(model[-1]) / f"{name}.json").read_text())
    assert report["cut"] is False
    return report


def test_serving(model: list[str]) -> None:
    """In the budgets' memory: stock SGLang retracts or waits, a budget does neither."""
    arguments = ["--cells", "6x150", "--budget", "24", "--window", "8", "--prompt-tokens", "8"]
    assert serving.main([*model, *arguments, "--no-resident", "--arms", "stock", "budget"]) == 0
    report = _result(model, "serving")
    lines = {line["arm"]: line for line in report["summary"]}
    assert lines["budget"]["retractions"] == 0 and lines["budget"]["peak_running"] == 6
    assert lines["budget"]["run_to_end"]
    assert report["workers"]["stock"] == {"slots": report["workers"]["budget"]["slots"]}
    for sample in report["samples"]:
        assert sample["finished"] == 6 and sum(sample["tokens_by_second"]) == 6 * 150
        if sample["arm"] == "stock":
            assert sample["retractions"] > 0 or sample["peak_running"] < 6


@pytest.mark.parametrize("prefix_cache", [[], ["--prefix-cache"]])
def test_overhead(model: list[str], prefix_cache: list[str]) -> None:
    arguments = ["--windows", "8", "--budget", "24", "--batch", "4", "--steps", "32", *prefix_cache]
    assert overhead.main([*model, *arguments, "--rounds", "1"]) == 0
    report = _result(model, "overhead")
    (line,) = report["summary"]
    (budget,) = [sample for sample in report["samples"] if sample["arm"] == "budget"]
    timers = budget["timers"]
    assert timers["round"][0] >= 4 and timers["round.score"][0] >= 4
    # Every step of every request is seen, and the parts fit into the whole.
    assert timers["decode.requests"][0] == 4 * (4 * 8 + 1)
    assert timers["step.run"][0] == 4 * 8 + 1  # none waited for another
    parts = ("eviction", "query ring", "scheduler", "attention", "linear", "sampling")
    assert all(line["shares"][part] > 0 for part in ("eviction", "query ring", "scheduler"))
    assert sum(line["shares"][part] for part in parts) < 1


def test_determinism(model: list[str]) -> None:
    arguments = ["--replays", "40", "--requests", "10", "--rounds", "0", "--batches", "1", "6"]
    assert determinism.main([*model, *arguments]) == 0
    summary = _result(model, "determinism")["summary"]
    assert (summary["replays"], summary["mismatches"]) == (40, 0)


def test_paper(model: list[str]) -> None:
    arguments = ["--outputs", "60", "--budgets", "24", "--window", "8", "--prompt-tokens", "8"]
    assert paper.main([*model, *arguments, "--batch", "2"]) == 0
    (sample,) = _result(model, "paper")["samples"]
    assert sample["whole"] and sample["tokens_each"] == [60, 60]
    assert sample["slots"] == 2 * (24 + 8) + 64 and sample["peak_memory_gb"] > 0
