"""What this machine computes on, told without importing torch where its build alone decides."""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import sys
from pathlib import Path


@functools.cache
def has_accelerator() -> bool:
    """Whether torch has a device other than the CPU."""
    spec = importlib.util.find_spec("torch")  # torch itself takes seconds to import
    if sys.platform == "linux" and spec is not None and spec.origin is not None:
        build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
        if all(name in build and build[name] is None for name in ("cuda", "hip", "xpu")):
            return False
    import torch

    return torch.accelerator.is_available()


def is_plain_cpu() -> bool:
    """Whether our own CPU platform serves (`platform_cpu`).

    An activated out-of-tree platform would win over CUDA and every other one, so it stays away
    from machines with an accelerator, and where SGLang's own CPU engine was asked for.
    """
    # Read here: SGLang's own helper resolves the platform when it is imported.
    upstream = os.environ.get("SGLANG_USE_CPU_ENGINE", "").lower() in ("1", "true")
    return not has_accelerator() and not upstream
