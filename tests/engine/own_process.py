"""Tests of another engine, in a process of their own: SGLang builds one scheduler a process.

Each is forked from one process that has imported SGLang, as a worker's processes are.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_forking = multiprocessing.get_context("forkserver")


def run_tests(tests: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run `tests` (their ids) with VASE_TEST_... variables that the fixtures read.

    Mark the test xdist_group("own-process"), or every test process imports SGLang once more.
    """
    _forking.set_forkserver_preload(["tests.conftest", "tests.engine.conftest"])
    with tempfile.NamedTemporaryFile("r") as output:
        process = _forking.Process(target=_run, args=(tests, dict(variables), output.name))
        process.start()
        process.join()
        said = output.read()
    assert process.exitcode == 0, said[-3000:]
    summary = said.splitlines()[-1]
    assert " passed" in summary and "skipped" not in summary, summary


def _run(tests: Sequence[str], variables: Mapping[str, str], output: str) -> None:
    """In the process: its standard streams go to the file `output`."""
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    os.chdir(_ROOT)
    sys.exit(pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests]))
