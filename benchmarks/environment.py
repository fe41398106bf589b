"""Where and on what a benchmark ran: the same record in every result.

python -m benchmarks.environment      # the commit, as VASE_COMMIT tells it where there is no git
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Id of the commit where there is no git and nobody told it.
NO_COMMIT = "no git"
#: Tells the commit of a copy without git: its id, with "-dirty" behind it if there were changes.
COMMIT = "VASE_COMMIT"
_PACKAGES = (
    *("sglang", "torch", "triton", "transformers", "sglang-kernel", "flashinfer-python"),
    *("vase-sgl", "grpcio", "numpy"),
)
_VARIABLES = ("VASE_", "SGLANG_", "TRITON_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
#: Of variables with these in their names only that they are set: results are published.
_SECRET = ("KEY", "SECRET", "TOKEN", "PASSWORD", "URL")
#: What a benchmark itself writes; changes there do not make the measured code another one.
_WRITTEN = (":!benchmarks/results", ":!docs/performance.md", ":!docs/images")


def describe() -> dict[str, Any]:
    """Hardware, versions, command, commit. Imports torch. Paths are reduced to their last part."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | _versions(),
        "variables": {
            name: "(set)" if any(part in name for part in _SECRET) else _last_part(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES)
        },
    }


def options(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options of a benchmark. Paths are reduced to their last part."""
    return {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(parsed).items()
    }


def command(argv: list[str]) -> str:
    """`python -m benchmarks.NAME ...` as a person would type it."""
    module = f"benchmarks.{Path(argv[0]).stem}"
    return " ".join(["python", "-m", module, *map(_last_part, argv[1:])])


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, load before the run, and the GPU if torch sees one."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "gpu": gpu,
    }


def on_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def machine_line(environment: dict[str, Any]) -> str:
    """One line for a table's head."""
    found, versions = environment["hardware"], environment["versions"]
    device = (
        found["gpu"]["name"] if found["gpu"] else f"{found['cores']} cores {found['processor']}"
    )
    commit = environment["commit"]
    dirty = " with local changes" if commit["dirty"] else ""
    return (
        f"{device}; SGLang {versions.get('sglang', '-')}, torch {versions.get('torch', '-')}; "
        f"commit {commit['id'][:12]}{dirty}; load before the run {found['load_before'][0]}; "
        f"{environment['date'][:10]}"
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN)
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        told = os.environ.get(COMMIT)
        return _read_commit(told) if told else {"id": NO_COMMIT, "dirty": False}


def _read_commit(told: str) -> dict[str, Any]:
    found = re.fullmatch("([0-9a-f]{40})(-dirty)?", told)
    if not found:
        raise SystemExit(f"{COMMIT}: {told!r} is not what python -m benchmarks.environment prints")
    return {"id": found[1], "dirty": bool(found[2])}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _last_part(text: str) -> str:
    flag, equals, value = text.partition("=")
    if equals and value.startswith(("/", "~")):
        return f"{flag}={Path(value).name}"
    return Path(text).name if text.startswith(("/", "~")) else text


if __name__ == "__main__":
    found = _commit()
    print(found["id"] + ("-dirty" if found["dirty"] else ""))
