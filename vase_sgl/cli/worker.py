"""`vase-sgl worker`: SGLang's HTTP server with the plugin, in this very process."""

from __future__ import annotations

import importlib.util
import os
import sys

import typer


def worker_command(arguments: list[str]) -> int:
    """Replace this process by the worker, so that signals and the process id stay the same.

    SGLang's children import the main module first, and the worker's prepares them
    (`vase_sgl.engine.server`); this command's does not.
    """
    missing = [name for name in ("torch", "sglang") if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(
            f"vase-sgl worker needs {' and '.join(missing)}; in a checkout: pip install '.[gpu]', "
            "or on a machine without CUDA `make setup` (requirements-cpu.txt)",
            err=True,
        )
        return 1
    sys.stdout.flush()
    # -P: what lies in the current folder is not imported, a checkout of another version for one.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "vase_sgl.engine.server", *arguments])
