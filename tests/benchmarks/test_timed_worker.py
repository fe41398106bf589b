"""The worker with timers starts where the worker does: its imports must come in the right order."""

from __future__ import annotations

import subprocess
import sys


def test_it_takes_the_workers_command_line() -> None:
    command = [sys.executable, "-m", "benchmarks.timed_worker", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "vase-sgl worker" in shown.stdout
