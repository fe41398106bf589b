"""The matrix of benchmarks/loadtest_report.py; the whole of it, on the real model, on demand."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loadtest.headless import ROOT, slow
from vase_sgl.demo.model import ensure_model

SCRIPT = ROOT / "benchmarks" / "loadtest_report.py"


def test_the_table_has_a_line_for_every_cell_and_ratios_to_the_last_budget() -> None:
    def cell(users: int, budget: str, rate: float, ttft: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "completed": 3,
            "failed": 0,
            "unfinished": 1,
            "output_tokens_per_second": rate,
        }
        found["ttft_ms"] = None if ttft is None else {"p50": ttft, "p95": 2 * ttft}
        found["tpot_ms"] = {"p50": 10.0}
        gateway = {"total_slots": 4096, "fingerprint": {"device": "cpu"}}
        return {"users": users, "budget": budget, "result": {"all": found, "gateway": gateway}}

    settings = {"model": "m", "users": [1, 4], "budgets": ["128", "full"], "window": 32}
    settings |= {"prompt_tokens": 64, "max_new_tokens": 512, "seconds": 120}
    cells = [
        *(cell(1, "128", 30.0, 50.0), cell(1, "full", 20.0, 100.0)),
        *(cell(4, "full", 40.0, None), cell(4, "128", 80.0, 60.0)),
    ]
    settings |= {"neighbours": 16, "noisy_calls": 2}
    quiet = {"completed": 9, "rejected": 0, "failed": 0, "output_tokens_per_second": 50.0}
    quiet["ttft_ms"] = {"p50": 20.0, "p95": 40.0}
    noisy = quiet | {"completed": 0, "rejected": 70, "ttft_ms": None}
    report = {
        "settings": settings,
        "cells": cells,
        "neighbours": {"tenants": {"quiet": quiet, "noisy": noisy}},
        "audit": {
            "seen": {"quiet": {"completed": 22}, "noisy": {}},
            "recorded": {"quiet": {"aborted": 1, "completed": 22}, "noisy": {}},
        },
    }
    page = runpy.run_path(str(SCRIPT))["markdown"](report).splitlines()
    assert page[-2:] == ["| quiet | aborted | 0 | 1 |", "| quiet | completed | 22 | 22 |"]
    assert "| quiet | 9 | 0 | 0 | 50 | 20 | 40 |" in page
    assert "| noisy | 0 | 70 | 0 | 50 | nan | nan |" in page
    table = page.index("## A noisy neighbour") - 1
    assert page[table - 4 : table] == [
        "| 1 | 128 | 3 | 0 | 1 | 30 | 1.50 | 50 | 0.50 | 100 | 10 | 1.00 |",
        "| 1 | full | 3 | 0 | 1 | 20 | 1.00 | 100 | 1.00 | 200 | 10 | 1.00 |",
        "| 4 | 128 | 3 | 0 | 1 | 80 | 2.00 | 60 | - | 120 | 10 | 1.00 |",
        "| 4 | full | 3 | 0 | 1 | 40 | 1.00 | - | - | - | 10 | 1.00 |",
    ]


@slow  # 2 minutes
@pytest.mark.timeout(1200)
def test_a_small_matrix_on_the_real_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--model", str(ensure_model())),
            *("--users", "1,4", "--budgets", "48,full", "--window", "16", "--seconds", "5"),
            *("--prompt-tokens", "32", "--max-new-tokens", "64", "--kv-slots", "512"),
            *(
                "--max-running",
                "8",
                "--neighbours",
                "8",
                "--name",
                "small",
                "--output",
                str(tmp_path),
            ),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "small.json").read_text())
    cells = report["cells"]
    assert report["audit"]["recorded"] == report["audit"]["seen"]
    assert report["neighbours"]["tenants"]["noisy"]["rejected"] > 0
    assert [(c["users"], c["budget"]) for c in cells] == [
        *((1, "48"), (1, "full"), (4, "full"), (4, "48")),
    ]
    for cell in cells:
        found, gateway = cell["result"]["all"], cell["result"]["gateway"]
        assert (found["failed"], found["rejected"], found["unfinished"]) == (0, 0, 0)
        assert found["completed"] >= cell["users"]
        assert found["output_tokens"] == 64 * found["completed"]
        # It was really on where it was asked for, and nowhere else.
        assert (gateway["eviction_rounds"] > 0) is (cell["budget"] != "full")
    assert (tmp_path / "small.md").read_text().count("\n| ") >= 10
