"""The gateway's benchmark at its smallest: a real gateway before the worker without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from vase_sgl.gateway.leases import DEFAULT_IN_FLIGHT


def test_alone(tmp_path: Path) -> None:
    idle = DEFAULT_IN_FLIGHT + 1  # more than a gateway sends to a worker that names no number
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gateway", "--json", str(tmp_path / "result.json")),
            *("--streams", "2", "--tokens", "8", "--calls", "2", "--repeats", "1"),
            *("--idle", str(idle)),
        ],
        check=True,
        timeout=120,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["idle"]["streams"] == idle
    assert result["tokens_per_second"]["ratio"] > 0
    assert result["ttft_seconds"]["gateway"] > 0
