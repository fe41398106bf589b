"""`vase-sgl serve` as a child process, of the demo and of benchmarks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vase_sgl import parent_watch

_CLI = (sys.executable, "-P", "-m", "vase_sgl.cli")
_START_SECONDS = 900
_STOP_SECONDS = 60


class GatewayFailed(Exception):
    """The gateway did not come up. The text quotes what it said."""


def add_tenant(name: str, file: Path, *options: str) -> str:
    """API key of a new tenant. Raises `GatewayFailed`."""
    done = subprocess.run(
        [*_CLI, "tenants", "add", name, "--file", str(file), *options],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise GatewayFailed(done.stderr)
    return done.stdout.strip()


class GatewayProcess:
    """`vase-sgl serve` on a free port, for the length of a `with` block.

    It gets a session of its own, so that Ctrl-C reaches this process alone, which then stops it in
    order; a killed process takes it along. target: host:port, once it serves. said: its lines.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        progress: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`env`: beside this process's. `progress` is told the seconds since the start."""
        self._command = (
            *(*_CLI, "serve", "--host", "127.0.0.1", "--grpc-port", "0"),
            *("--log-level", "warning", *arguments),
        )
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._progress = progress
        self.said: list[str] = []
        self.target = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        """Raises `GatewayFailed` if it ends or does not serve within 15 minutes."""
        pipe, told = parent_watch.for_child()
        self._process = subprocess.Popen(
            self._command,
            env={**self._env, **told},
            pass_fds=(pipe,),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read_output, daemon=True).start()
        try:
            self._wait_until_serving()
        except BaseException:
            self._stop()
            raise
        return self

    def _read_output(self) -> None:
        assert self._process.stdout is not None  # Popen was asked for a pipe
        for line in self._process.stdout:
            self.said.append(line.rstrip())

    def _wait_until_serving(self) -> None:
        started = time.monotonic()
        while True:
            seconds = time.monotonic() - started
            self._progress(seconds)
            for line in self.said:
                if match := re.search(r"serving on (\S+)", line):
                    self.target = match[1]
                    return
            ended = self._process.poll()
            if ended is not None or seconds > _START_SECONDS:
                how = f"in {_START_SECONDS} s" if ended is None else f"(exit status {ended})"
                said = "\n".join(self.said[-20:])
                raise GatewayFailed(f"the gateway did not start {how}:\n{said}")
            time.sleep(0.1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
