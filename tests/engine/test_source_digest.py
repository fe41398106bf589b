"""The digest of the code that computes answers: of what it does, not of how it is written down."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vase_sgl
from vase_sgl.engine.source_digest import code_of, source_digest

MODULE = '''"""What it is for."""

import os

#: The most.
MOST = 3


def cut(text: str, *, most: int = MOST) -> str:
    """The beginning."""
    return text[:most] + f"{os.sep}{most:g}"  # a comment
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""What it is for."""\n', "", True),
        ("The beginning.", "Its beginning.", True),
        ("  # a comment", "", True),
        (
            "cut(text: str, *, most: int = MOST)",
            "cut(\n    text: str, *, most: int = MOST\n)",
            True,
        ),
        ("MOST = 3", "MOST = 0x3", True),
        ("MOST = 3", "MOST = 4", False),
        ("[:most]", "[: most - 1]", False),
        ("import os\n", "", False),
        (":g}", ":d}", False),
        ("return ", "", False),
    ],
)
def test_what_a_module_does_counts(old: str, new: str, same: bool) -> None:
    changed = MODULE.replace(old, new)
    assert changed != MODULE
    assert (code_of(changed) == code_of(MODULE)) == same


def test_every_python_reads_the_same() -> None:
    """Node types get fields from one Python to the next, as functions did with 3.12."""
    assert code_of("def f(x):\n    'y'\n    return x or None") == (
        "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='x')]),"
        "body=[Return(value=BoolOp(op=Or(),values=[Name(id='x',ctx=Load()),Constant()]))])])"
    )


def test_every_file_of_engine_and_eviction_counts(tmp_path: Path) -> None:
    package = Path(vase_sgl.__file__).parent
    for folder in ("engine", "eviction"):
        shutil.copytree(
            package / folder, tmp_path / "0" / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    assert source_digest(tmp_path / "0") == source_digest()
    digests = {source_digest()}
    for number, changed in enumerate(
        ("engine/stop_strings.py", "engine/served_model/__init__.py", "eviction/policies/base.py"),
        start=1,
    ):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "0", root)
        with (root / changed).open("a") as file:
            file.write("\nMORE = 1\n")
        digests.add(source_digest(root))
    shutil.copytree(tmp_path / "0", tmp_path / "more")
    (tmp_path / "more" / "engine" / "more.py").touch()
    digests.add(source_digest(tmp_path / "more"))
    assert len(digests) == 5
