"""What a test that is left out asks for stands in the README."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_names_what_brings_in_the_tests_that_are_left_out() -> None:
    wanted = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"set (VASE_TEST_\w+)", file.read_text(encoding="utf-8"))
    }
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Working on it")[2]
    assert (
        {"VASE_TEST_SLOW", "VASE_TEST_IMAGES"} <= wanted <= set(re.findall(r"VASE_TEST_\w+", table))
    )
