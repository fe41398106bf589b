"""Engine settings. SGLang's processes are spawned, so the environment carries them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from vase_sgl.eviction import EvictionLimits, EvictionParams
from vase_sgl.eviction.policies.base import ParameterError

MAX_BUDGET = "VASE_MAX_BUDGET"
MAX_WINDOW = "VASE_MAX_WINDOW"
MAX_REQUESTS = "VASE_MAX_REQUESTS"
DEFAULT_PARAMS = "VASE_DEFAULT"
CHECK_INTEGRITY = "VASE_CHECK_INTEGRITY"
INTEGRITY_LOG = "VASE_INTEGRITY_LOG"
KERNELS = "VASE_KERNELS"
CPU_DECODE = "VASE_CPU_DECODE"
INSPECT_DIR = "VASE_INSPECT_DIR"
#: Drawn by a worker's first process for the others.
WORKER_TOKEN = "VASE_WORKER_TOKEN"


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What the operator decides; requests move within it.

    max_requests: requests at once whose policy reads queries; each has a query ring. None: as
        many as `--max-running-requests`, or as fit the pool with the default budget (or 2048).
    default: eviction parameters of requests that bring none; None leaves them with full KV.
    kernels: `triton`, `reference` (torch), or `auto`: Triton on CUDA, the reference on a CPU.
    cpu_decode: attention on a CPU: `batched`, the same bits in any batch and however a prompt is
        cut; or upstream's loop over requests (`stock`), without that promise.
    inspect_dir: where requests with `inspect` leave their files; None refuses them.
    check_integrity: prove slot ownership and positions after every decode step (slow; for tests).
    integrity_log: file that failed checks are appended to, and the next worker counts; or None.
    """

    limits: EvictionLimits = dataclasses.field(default_factory=EvictionLimits)
    max_requests: int | None = None
    default: Mapping[str, Any] | None = None
    kernels: str = "auto"
    cpu_decode: str = "batched"
    inspect_dir: Path | None = None
    check_integrity: bool = False
    integrity_log: Path | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> EngineConfig:
        """Read the `VASE_*` variables. Raises `ParameterError` naming the wrong one."""
        env = os.environ if env is None else env
        limits = EvictionLimits(
            max_budget=_read_int(env, MAX_BUDGET, EvictionLimits.max_budget),
            max_window=_read_int(env, MAX_WINDOW, EvictionLimits.max_window),
        )
        max_requests = _read_int(env, MAX_REQUESTS, None)
        if max_requests is not None and max_requests < 1:
            raise ParameterError(f"{MAX_REQUESTS} must be at least 1, got {max_requests}")
        default = None
        if env.get(DEFAULT_PARAMS):
            try:
                default = json.loads(env[DEFAULT_PARAMS])
                if EvictionParams.parse(default, limits).inspect:
                    raise ParameterError("inspect is for single requests; leave it out")
            except ValueError as error:  # ParameterError and JSONDecodeError are both
                raise ParameterError(f"{DEFAULT_PARAMS} is wrong: {error}") from error
        return cls(
            limits,
            max_requests,
            default,
            _read_choice(env, KERNELS, "auto", "triton", "reference"),
            _read_choice(env, CPU_DECODE, "batched", "stock"),
            _read_folder(env, INSPECT_DIR),
            check_integrity=_read_choice(env, CHECK_INTEGRITY, "0", "1") == "1",
            integrity_log=_read_log(env, INTEGRITY_LOG),
        )


@functools.cache
def engine_config() -> EngineConfig:
    """The settings of this process, read once."""
    return EngineConfig.from_env()


@overload
def _read_int(env: Mapping[str, str], name: str, default: int) -> int: ...


@overload
def _read_int(env: Mapping[str, str], name: str, default: None) -> int | None: ...


def _read_int(env: Mapping[str, str], name: str, default: int | None) -> int | None:
    text = env.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ParameterError(f"{name} must be an integer, got {text!r}") from None


def _read_choice(env: Mapping[str, str], name: str, default: str, *others: str) -> str:
    text = env.get(name, default)
    if text not in (default, *others):
        raise ParameterError(f"{name} must be {', '.join((default, *others))}, got {text!r}")
    return text


def _read_folder(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name)
    if not text:
        return None
    folder = Path(text).expanduser().absolute()
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ParameterError(
            f"{name}: {folder} is no folder that this process can write to; make one with "
            f"`mkdir -m 700 {folder}`"
        )
    return folder


def _read_log(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name)
    if not text:
        return None
    path = Path(text).expanduser().absolute()
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ParameterError(f"{name}: {path} cannot be written: {error.strerror}") from error
    return path
