"""The file of a model, from the packages that carry its parts."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks import math_model


def test_parts_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    parts = {f"part{number:02}.bin": bytes([number]) * number for number in range(1, 12)}
    for name, content in parts.items():
        number = int(name[4:6])
        with zipfile.ZipFile(tmp_path / f"model_part{number}-0.2.0-none-any.whl", "w") as wheel:
            wheel.writestr(f"model_part{number}/__init__.py", "raise SystemExit")
            wheel.writestr(f"model_part{number}/data/{name}", content)
    gguf = tmp_path / "model.gguf"
    math_model.join(sorted(tmp_path.glob("*.whl")), gguf)
    whole = b"".join(parts.values())
    assert gguf.read_bytes() == whole
    math_model.check(gguf, hashlib.sha256(whole).hexdigest())
    with pytest.raises(SystemExit, match="SHA-256"):
        math_model.check(gguf, math_model.SHA256)
