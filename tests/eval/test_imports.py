"""What the evaluation needs to be installed, and what it says when it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vase_sgl.cli.failures import missing_package

_MATH500 = Path(__file__).parent / "data" / "math500.jsonl"


@pytest.mark.parametrize(
    "statement",
    [
        "from vase_sgl.eval.tasks import open_task; open_task('passkey').items(1, 0)",
        "import vase_sgl.eval.statistics, vase_sgl.eval.loops, vase_sgl.eval.malformed",
        "import vase_sgl.eval.sandbox",
    ],
)
def test_measuring_loads_neither_torch_nor_sglang(statement: str) -> None:
    script = f"{statement}\nimport sys; print(*{{m.partition('.')[0] for m in sys.modules}})"
    loaded = set(subprocess.check_output([sys.executable, "-c", script], text=True).split())
    assert loaded.isdisjoint(("torch", "sglang", "triton", "transformers", "math_verify"))


@pytest.mark.parametrize("package", ["math_verify", "scipy", "latex2sympy2_extended"])
def test_a_missing_package_names_the_extra(package: str) -> None:
    text = missing_package(ModuleNotFoundError(f"No module named {package!r}", name=package))
    assert text is not None and "pip install '.[eval]'" in text


def test_mathematics_without_its_library_fails_when_the_task_is_opened() -> None:
    script = """
import sys
sys.modules["math_verify"] = None
from vase_sgl.eval.tasks import open_task
open_task("passkey")
try:
    open_task("math500:" + sys.argv[1])
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(_MATH500)], capture_output=True, text=True
    )
    assert done.stdout == "math_verify\n", done.stderr
