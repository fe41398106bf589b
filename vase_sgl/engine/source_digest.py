"""Which code of ours computes answers, beside the kernels, which have a REVISION.

A digest and no number that is raised by hand: what is drawn, and where an answer ends, is decided
in many places here, and no test would tell that one of them changed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import vase_sgl

#: Folders of `vase_sgl`. All of their code: whether a file decides answers is known too late.
_FOLDERS = ("engine", "eviction")


@functools.cache
def source_digest(root: Path = Path(vase_sgl.__file__).parent) -> str:
    """16 hex digits of the engine's and the policies' code in the package's folder.

    Comments, docstrings and layout do not count, nor which Python reads it. The first call takes
    some tenths of a second.
    """
    return digest_of(root, _FOLDERS)


def digest_of(root: Path, folders: tuple[str, ...] = (".",)) -> str:
    """16 hex digits of what the Python files in some folders of `root` do."""
    files = sorted(file for folder in folders for file in (root / folder).rglob("*.py"))
    code = {str(file.relative_to(root)): code_of(file.read_text("utf-8")) for file in files}
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()[:16]


def code_of(source: str) -> str:
    """What a module does, as text: equal for modules that differ in how they are written down.

    Not `ast.dump`, whose text differs from one Python to the next.
    """
    return _text(ast.parse(source))


def _text(node: object) -> str:
    if isinstance(node, ast.AST):
        fields = ",".join(
            f"{name}={_text(value)}"
            for name, value in ast.iter_fields(node)
            # What a newer Python added to its nodes is empty in code for an older one.
            if value is not None and value != []
        )
        return f"{type(node).__name__}({fields})"
    if isinstance(node, list):
        return f"[{','.join(_text(item) for item in node if not _is_docstring(item))}]"
    return repr(node)


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
