"""Pages of 16 slots, as fa3 and other backends want them: the same answers, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_DECODER = "tests/engine/test_independent_decode.py::test_tokens_equal_the_independent_decoder"
_TESTS = (
    f"{_DECODER}[vase-attnv-evict-45-True]",
    f"{_DECODER}[vase-dkv-keep-45-True]",
    f"{_DECODER}[random-evict-12-False]",
    "tests/engine/test_loops_and_prefixes.py::test_same_tokens_and_digests_in_every_mode",
    "tests/engine/test_schedules.py::test_random_schedules[True-True-120]",
    "tests/engine/test_schedules.py::test_random_schedules[True-False-60]",
    "tests/engine/test_failures_others_met.py::test_01_the_token_in_flight_has_a_slot_of_its_own",
)


def test_pages_of_sixteen_slots() -> None:
    """In a process of its own: SGLang builds one scheduler a process."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *_TESTS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "VASE_TEST_PAGE_SIZE": "16"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{len(_TESTS)} passed" in result.stdout
