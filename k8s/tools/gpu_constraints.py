"""Resolve the versions of the GPU worker's image anew: `make gpu-constraints`.

Nothing of it is installed: the versions are worked out from the packages' own metadata.
"""

from __future__ import annotations

import subprocess
import sys

from own_environment import ROOT, command

UV = "uv==0.13.9"
TARGET = ROOT / "k8s" / "images" / "constraints-gpu.txt"
HEAD = """\
# Versions in the GPU worker's image, for Python 3.12 on x86-64 with glibc 2.39 (Ubuntu 24.04).
# Written by `make gpu-constraints`.
"""


def main() -> int:
    resolve = [command("uv", UV), "pip", "compile", "pyproject.toml", "--extra", "gpu", "--quiet"]
    resolve += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39"]
    resolve += ["--no-annotate", "--no-header"]
    done = subprocess.run(resolve, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return done.returncode
    TARGET.write_text(HEAD + done.stdout, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
