"""Whether the attention backend of the workers can be imported, before any of them starts."""

from __future__ import annotations

import subprocess
import sys

from vase_sgl.engine.server import value_of

#: What SGLang imports of a backend beyond torch and Triton.
_MODULES = {"fa3": "sgl_kernel.flash_ops", "flashinfer": "flashinfer"}
_HOPPER = 9


def require_backend(worker_args: list[str]) -> None:
    """`SystemExit` that says what is missing and which flag does without it.

    A worker says so too, but only after the kernels' tests. Without flags SGLang takes fa3 on
    Hopper, deterministic or not; elsewhere its choice depends on more, and the worker has the word.
    """
    import torch

    hopper = torch.cuda.get_device_capability()[0] == _HOPPER
    common = value_of(worker_args, "--attention-backend") or ("fa3" if hopper else "")
    for phase in ("prefill", "decode"):
        backend = value_of(worker_args, f"--{phase}-attention-backend") or common
        module = _MODULES.get(backend)
        if module and (reason := _import_error(module)):
            raise SystemExit(
                f"attention backend {backend} cannot be imported here ({reason}): install it, or "
                "use --worker-arg=--attention-backend=triton"
            )


def _import_error(module: str) -> str:
    """Last line of what Python says; in a process of its own, which leaves nothing loaded here."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True
    )
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1][:200] if done.returncode else ""
