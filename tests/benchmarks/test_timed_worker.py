"""The worker with timers starts where the worker does: its imports must come in the right order."""

from __future__ import annotations

import ast

import pytest

from benchmarks.environment import ROOT
from tests.engine.own_process import run_tests


@pytest.mark.xdist_group("own-process")
def test_it_takes_the_workers_command_line() -> None:
    run_tests(["tests/benchmarks/timed_worker_help.py"], {})


def test_the_workaround_comes_before_everything_that_imports_sglang() -> None:
    """The process above has SGLang from the start."""
    source = (ROOT / "benchmarks" / "timed_worker.py").read_text(encoding="utf-8")
    _doc, annotations, workaround, call, *_rest = map(ast.unparse, ast.parse(source).body)
    assert annotations == "from __future__ import annotations"
    name = "declare_torchvision_operators"
    assert workaround == f"from vase_sgl.engine.torchvision_cpu import {name}"
    assert call == f"{name}()"
