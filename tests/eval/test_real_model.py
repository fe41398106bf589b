"""`vase-sgl eval` starts real workers with a real model. Two start-ups: on demand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.eval.running_eval import rows, run_eval
from vase_sgl.demo.model import ensure_model

pytestmark = pytest.mark.skipif("VASE_TEST_SLOW" not in os.environ, reason="set VASE_TEST_SLOW=1")


@pytest.mark.timeout(900)
async def test_arms_on_workers_that_the_command_starts(tmp_path: Path) -> None:
    grid = (
        *("--model", ensure_model(), "--tasks", "state-tracking?steps=4", "--limit", 2, "-n", 96),
        *("--budgets", 64, "--window", 16, "--worker-arg=--max-total-tokens=4096"),
    )
    out = tmp_path / "all"
    await run_eval(*grid, "--policies", "full,full-fp8,vase-attnv", "-o", out)
    assert {(r["arm"], r["worker"]) for r in rows(out)} == {
        ("full", "production"),
        ("full-fp8", "fp8"),
        ("vase-attnv", "production"),
    }
    assert {r["status"] for r in rows(out)} == {"completed"}
    evicting = [r for r in rows(out) if r["arm"] == "vase-attnv"]
    assert all(r["rounds"] > 0 and r["reserved_slots"] == 80 for r in evicting)
    workers = json.loads((out / "run.json").read_text())["workers"]
    assert "float8" in workers["fp8"]["kv_cache_dtype"]
    sessions = [json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines()]
    assert sessions[0]["counters"]["rounds"] == sum(r["rounds"] for r in evicting)
    assert sessions[0]["counters"]["retractions"] == 0
    assert all(session["prefix_cache_emptied"] for session in sessions)

    # Another worker, another company, the same tokens.
    again = tmp_path / "again"
    await run_eval(*grid, "--policies", "vase-attnv", "--concurrency", 1, "-o", again)
    kept = ("item_id", "text", "digest", "seeds")
    assert sorted(str([r[k] for k in kept]) for r in rows(again)) == sorted(
        str([r[k] for k in kept]) for r in evicting
    )
