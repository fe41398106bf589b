"""The worker's child processes are forked from one that has imported everything.

SGLang spawns them, so each imports torch, transformers and SGLang again. Here Python's fork server
imports them once, while the main process does the same on another core, and its children start
with everything in place. It runs one thread and no operation of torch, so forking is safe. Only on
a CPU: a CUDA context does not survive a fork.

The children must not notice. So they take over the environment the main process has by then, and
the fork server passes on what they expect of a parent: SIGQUIT from a child that fails reaches the
main process, and when that dies, so do the fork server and its children.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

#: Tells the fork server which model's tokenizer its children will need.
MODEL_PATH = "VASE_MODEL_PATH"
_PRELOAD = "vase_sgl.engine.preload"

_started = False


def start(model_path: str) -> None:
    """Start the fork server, which imports in the background. Elsewhere than on Linux: nothing."""
    global _started
    if sys.platform != "linux":
        return
    os.environ[MODEL_PATH] = model_path
    multiprocessing.set_forkserver_preload([_PRELOAD])
    multiprocessing.forkserver.ensure_running()
    _started = True


def is_started() -> bool:
    """Whether this process has a fork server."""
    return _started


def stand_for_parent() -> None:
    """In the fork server: pass its children's SIGQUIT on to the main process, and die with it."""
    main = os.getppid()
    pr_set_pdeathsig = 1
    # Were it gone already, the fork server would end before its first child.
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    signal.signal(signal.SIGQUIT, lambda number, frame: os.kill(main, number))


def fork_schedulers(
    cls: Any, server_args: Any, port_args: Any, run_scheduler_process_func: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """BEFORE `Engine._launch_scheduler_processes`, which comes first."""
    multiprocessing.set_start_method("forkserver", force=True)
    return (cls, server_args, port_args, _Forked(run_scheduler_process_func)), kwargs


def fork_detokenizers(
    cls: Any, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """BEFORE `Engine._launch_detokenizer_subprocesses`."""
    return (cls, server_args, port_args, _Forked(run_detokenizer_process_func)), {}


class _Forked:
    """A function for a child process; with it travels the environment at the child's start."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _arrive, (self._function, dict(os.environ))


def _arrive(function: Callable[..., None], environment: Mapping[str, str]) -> Callable[..., None]:
    """In the child: make it what it would be, had it been spawned; the function itself."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    # Only what differs: `setproctitle` needs the strings the process was started with.
    os.environ.update(environment.items() - os.environ.items())
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    multiprocessing.set_start_method("spawn", force=True)
    return function
