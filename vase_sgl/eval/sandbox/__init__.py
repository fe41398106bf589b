"""Running a model's program without trusting it.

`run_program` runs Python source in a process tree of its own and reports how it ended. The defence
has layers; each is used where the platform has it, and `Execution.isolation` names those that were.

Always:

- limits of CPU time, address space, file size, open files, processes and core dumps per process;
  a wall-clock limit; output that is cut, and ends the program, at a limit
- an empty environment, no stdin, no inherited file, `python -I`, a fresh working folder
- every process the program leaves behind is killed, daemons included
- `user`: started as root, the program runs as a user id that nobody else has

Where the kernel permits:

- `namespaces`: own process ids, no network at all, own IPC, and a working folder in memory whose
  total size is bounded. Needs root with CAP_SYS_ADMIN, or unprivileged user namespaces; the default
  profile of Docker grants neither.
- `landlock` (Linux 5.13): files outside the working folder cannot be written, and only the system's
  libraries and this Python installation can be read; other processes' memory and environment are
  out of reach
- `landlock-tcp` (6.7) and `landlock-signals` (6.12): neither TCP nor signals to processes outside

NOT protected: this is no virtual machine, and a hole in the kernel goes through it. Total memory is
bounded only by processes times address space. Names and sizes of files anywhere can be seen.
Without `namespaces`, UDP and Unix sockets are open, and the total size of the files in the working
folder is not bounded; a plain user's programs then share what each may start, because the kernel
counts all that the user runs. Without `landlock`, the program can read what its user can read and
write where that user can write. Without both, and not as root, it can also read the environment of
its user's other processes; without `namespaces`, `landlock-signals` and `user` it can signal them,
the launcher included, and so outlive it. For code from an adversary use a virtual machine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal

LAYERS = ("namespaces", "landlock")

_LAUNCHER = Path(__file__).with_name("launcher.py")
#: What the launcher may take beyond the program's wall-clock limit.
_GRACE_SECONDS = 10.0

Outcome = Literal["exited", "signal", "timeout", "output"]


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the program."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. Sizes are bytes; per process except `wall_seconds`, `processes`,
    `output_bytes` and, with namespaces, `folder_bytes`."""

    #: Above `cpu_seconds`, so that a busy machine does not fail a program that would pass.
    wall_seconds: float = 30.0
    cpu_seconds: int = 10
    address_space: int = 1 << 30
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    open_files: int = 64
    processes: int = 16
    output_bytes: int = 64 << 10


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a program ended."""

    #: `exited` by itself, ended by a `signal` (limits of CPU time and file size end so), or stopped
    #: because of the wall-clock limit (`timeout`) or too much `output`.
    outcome: Outcome
    #: The exit status; minus the signal's number; None if it was stopped.
    status: int | None
    stdout: str
    stderr: str
    seconds: float
    #: Which of `user`, `namespaces`, `landlock`, `landlock-tcp`, `landlock-signals` held.
    isolation: frozenset[str]

    @property
    def succeeded(self) -> bool:
        """True if the program ended by itself with status 0."""
        return self.outcome == "exited" and self.status == 0


def run_program(
    source: str, limits: Limits | None = None, *, layers: Collection[str] = LAYERS
) -> Execution:
    """Run Python source and wait for its end. Safe to call from several threads.

    Args:
        source: a whole program.
        limits: what it may use; the defaults of `Limits` otherwise.
        layers: the layers to use where the kernel permits; all by default.

    Raises:
        SandboxError: the program could not be started.
        ValueError: an unknown layer.
    """
    unknown = set(layers) - set(LAYERS)
    if unknown:
        raise ValueError(f"unknown layers {sorted(unknown)}; known are {', '.join(LAYERS)}")
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="vase-sandbox-", ignore_cleanup_errors=True) as folder:
        request: dict[str, object] = {
            "source": source,
            "folder": folder,
            "layers": sorted(layers),
            "limits": dataclasses.asdict(limits),
            "python": sys.executable,
            "readable": sorted({sys.prefix, sys.base_prefix}),
        }
        return _run(request, limits)


@functools.cache
def check_sandbox() -> frozenset[str]:
    """Run an empty program once per process; returns the isolation that holds here.

    Raises:
        SandboxError: programs cannot be run here.
    """
    execution = run_program("")
    if not execution.succeeded:
        raise SandboxError(f"an empty program does not run in the sandbox: {execution}")
    return execution.isolation


def _run(request: dict[str, object], limits: Limits) -> Execution:
    started = time.monotonic()
    report_end, launcher_end = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(launcher_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(launcher_end,),
            env={},
            cwd="/",
            start_new_session=True,
        )
    except BaseException:
        os.close(report_end)
        raise
    finally:
        os.close(launcher_end)
    with process, open(report_end, "rb") as reports:
        assert process.stdin and process.stdout and process.stderr
        try:
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
            output = _Output(limits.output_bytes)
            streams = {
                process.stdout.fileno(): "stdout",
                process.stderr.fileno(): "stderr",
                reports.fileno(): "report",
            }
            output.collect(process, streams, started + limits.wall_seconds + _GRACE_SECONDS)
        except BrokenPipeError:
            output = _Output(limits.output_bytes)
        finally:
            process.kill()
    return _execution(output, time.monotonic() - started)


class _Output:
    """What came out of the launcher: the program's output and the launcher's reports."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.exceeded = False
        self.bytes = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}

    def collect(
        self, process: subprocess.Popen[bytes], streams: dict[int, str], deadline: float
    ) -> None:
        """Read until the launcher has closed its report, stopping it at the output's limit."""
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        self._add(streams[key.fd], data, process)
                    else:
                        selector.unregister(key.fd)
                        if streams[key.fd] == "report":
                            # The tree is dead; what it wrote lies in the pipes.
                            deadline = min(deadline, time.monotonic() + 1.0)

    def _add(self, name: str, data: bytes, process: subprocess.Popen[bytes]) -> None:
        collected = self.bytes[name]
        if name == "report":
            collected += data
            return
        room = self.limit - len(collected)
        collected += data[:room]
        if len(data) > room and not self.exceeded:
            self.exceeded = True
            process.terminate()

    def text(self, name: str) -> str:
        """One stream, with bytes that are no UTF-8 replaced."""
        return self.bytes[name].decode("utf-8", "replace")


def _execution(output: _Output, seconds: float) -> Execution:
    report: dict[str, object] = {}
    for line in output.text("report").splitlines():
        report.update(json.loads(line))
    outcome: Outcome
    status: int | None = None
    if "error" in report:
        raise SandboxError(str(report["error"]))
    if output.exceeded:
        outcome = "output"
    elif report.get("timeout"):
        outcome = "timeout"
    elif isinstance(report.get("status"), int):
        status = int(str(report["status"]))
        outcome = "exited" if status >= 0 else "signal"
    else:
        raise SandboxError(f"the launcher ended without a report: {output.text('stderr')[-500:]}")
    layers = report.get("isolation")
    assert isinstance(layers, list)
    return Execution(
        outcome, status, output.text("stdout"), output.text("stderr"), seconds, frozenset(layers)
    )
