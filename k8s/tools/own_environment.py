"""Tools whose dependencies are not the project's: each in a virtual environment under .cache/."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(name: str, requirement: str) -> Path:
    """The path of the command `name`, after installing `requirement` (pinned) on first use."""
    folder = ROOT / ".cache" / requirement.replace("==", "-")
    installed = folder / "bin" / name
    if not installed.exists():
        print(f"installing {requirement} into {folder.relative_to(ROOT)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", requirement], check=True)
    return installed
