"""`vase-sgl doctor`: what is installed, what can run, what is missing and how to get it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vase_sgl.cli.connection import AsJson
from vase_sgl.cli.failures import reported
from vase_sgl.engine import SGLANG_VERSION

PACKAGE = "vase-sgl"

#: What a worker needs, with the build of torch that the machine needs.
WORKER = ("torch", "sglang", "jsonschema", "soundfile")
#: What a worker needs besides to serve on an NVIDIA GPU, and the lock for CPUs leaves out.
GPU = ("sglang-kernel", "flashinfer-python")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of vase_sgl on this machine. `cure` is empty if it can run."""

    name: str
    runs: bool
    found: tuple[str, ...]
    cure: str = ""


class NotRunnable(Exception):
    """A part that was asked for cannot run."""


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with status 1 unless client, gateway, worker or accelerator can run."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is installed, what can run, and how to get what is missing."""
    parts = {part.name: part for part in (_client(), _gateway(), _worker(), _accelerator())}
    unknown = sorted(set(require or ()) - set(parts))
    if unknown:
        raise typer.BadParameter(f"no part {unknown[0]!r}; choose from {', '.join(parts)}")
    if as_json:
        from vase_sgl.cli.jsonout import print_json

        print_json(list(parts.values()))
    else:
        typer.echo(f"python {platform.python_version()} on {platform.platform()}")
        for part in parts.values():
            typer.echo(
                f"{'ok     ' if part.runs else 'missing'} {part.name}: {', '.join(part.found)}"
            )
            if part.cure:
                typer.echo(f"          -> {part.cure}")
    with reported(NotRunnable):
        for name in require or ():
            if not parts[name].runs:
                raise NotRunnable(f"{name} cannot run: {parts[name].cure}")


def _client() -> Part:
    return _distributions("client", _extra("client"), "in a checkout: pip install '.[client]'")


def _gateway() -> Part:
    wanted = _extra("client") + _extra("gateway")
    return _distributions("gateway", wanted, "in a checkout: pip install '.[gateway]'")


def _worker() -> Part:
    part = _distributions(
        "worker",
        WORKER,
        "in a checkout, with a GPU: pip install '.[gpu]', on a CPU: `make setup`; or remote "
        "workers with worker.urls",
    )
    version = _version("sglang")
    if version is not None and version != SGLANG_VERSION:
        return dataclasses.replace(
            part, runs=False, cure=f"this release needs sglang=={SGLANG_VERSION}, found {version}"
        )
    if sys.platform != "linux":
        return dataclasses.replace(
            part, runs=False, cure="SGLang runs on Linux; point worker.urls at a machine that does"
        )
    return part


def _accelerator() -> Part:
    """What nvidia-smi reports. Asked without torch, which may not be there."""
    tool = shutil.which("nvidia-smi")
    found = "none found: there is no nvidia-smi"
    if tool is not None:
        names, found = _ask(tool)
        if names:
            reason = _why_unused()
            if reason is None:
                return Part("accelerator", True, names)
            return Part(
                "accelerator",
                False,
                (*names, reason),
                "workers run on the CPU, or not at all; for the GPU, in a checkout and a fresh "
                "environment: pip install '.[gpu]'",
            )
    return Part(
        "accelerator",
        False,
        (found,),
        "a worker runs on the CPU without one, slowly and for small models; if this machine has "
        "one, look after its driver",
    )


def _ask(nvidia_smi: str) -> tuple[tuple[str, ...], str]:
    """The GPUs that it names; if none, what is known instead."""
    command = [nvidia_smi, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:  # a driver that hangs does the second
        return (), f"none found: {error}"
    lines = tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())
    if answer.returncode == 0 and lines:
        return lines, ""
    said = (*lines, *answer.stderr.splitlines(), f"exit status {answer.returncode}")
    return (), f"none found by nvidia-smi: {said[0]}"


def _why_unused() -> str | None:
    """Why a worker that is installed here cannot use the NVIDIA GPU that is there."""
    torch = _version("torch")
    if torch is None or _version("sglang") is None:
        return None  # no worker, and that is said elsewhere
    if _cuda_of_torch() is None:
        return f"torch {torch} is not built for CUDA"
    missing = [distribution for distribution in GPU if _version(distribution) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def _cuda_of_torch() -> str | None:
    """The CUDA version of its build. Read from its file: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    cuda: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return cuda


def _extra(name: str) -> tuple[str, ...]:
    """The distributions that an extra of this package brings, as its metadata names them."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return (PACKAGE,)
    wanted = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if f'"{name}"' in line]
    return tuple(distribution for distribution in wanted if distribution != PACKAGE)


def _distributions(name: str, wanted: tuple[str, ...], cure: str) -> Part:
    versions = {distribution: _version(distribution) for distribution in wanted}
    missing = [distribution for distribution, version in versions.items() if version is None]
    found = tuple(f"{d} {v or '(not installed)'}" for d, v in versions.items())
    return Part(name, not missing, found, cure if missing else "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
