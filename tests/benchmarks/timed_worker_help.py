"""Run by test_timed_worker.py in a process of its own: the timers stay in the modules."""

from __future__ import annotations

import runpy
import sys

import pytest


def test_it_takes_the_workers_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["timed_worker", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.timed_worker", run_name="__main__")
    assert not ended.value.code
    assert "vase-sgl worker" in capsys.readouterr().out
