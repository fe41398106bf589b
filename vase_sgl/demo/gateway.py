"""The demo's gateway: `vase-sgl serve` as a child process, with its own tenant and records."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from vase_sgl.client import Client
from vase_sgl.parent_watch import PARENT_PID

_START_SECONDS = 300
_STOP_SECONDS = 30

#: The demo's one request needs little, and a small pool starts faster.
_WORKER_FLAGS = ("--max-total-tokens", "4096", "--max-running-requests", "8")


class GatewayFailed(Exception):
    """The gateway did not come up. The text quotes what it said."""


class DemoGateway:
    """A gateway with an embedded worker, for the length of a `with` block.

    All files lie in `folder`. The process gets a session of its own, so that Ctrl-C reaches this
    process alone, which then stops the gateway in order.
    """

    def __init__(self, model: Path, folder: Path, console: Console) -> None:
        self._folder = folder
        self._console = console
        self._tenants = folder / "tenants.yaml"
        self._key = self._cli(
            "tenants", "add", "demo", "--file", str(self._tenants), "--seed-policy", "client"
        )
        self._command = [
            *(sys.executable, "-m", "vase_sgl.cli", "serve"),
            *("--model-path", str(model), "--host", "127.0.0.1", "--grpc-port", "0"),
            *("--tenants-file", str(self._tenants)),
            *("--audit-url", f"sqlite+aiosqlite:///{folder / 'audit.sqlite3'}"),
            *("--log-level", "warning", "--", *_WORKER_FLAGS),
        ]
        self._target = ""
        self._lines: list[str] = []

    def client(self) -> Client:
        """A client of this gateway, over a real socket."""
        return Client(self._target, self._key)

    def __enter__(self) -> Self:
        started = time.monotonic()
        environment = os.environ | {
            PARENT_PID: str(os.getpid()),
            "VASE_WORKER__LOG_FILE": str(self._folder / "worker.log"),
            "PYTHONUNBUFFERED": "1",
        }
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read_output, daemon=True).start()
        try:
            self._wait_until_serving(started)
        except BaseException:
            self._stop()
            raise
        return self

    def _read_output(self) -> None:
        assert self._process.stdout is not None  # Popen was asked for a pipe
        for line in self._process.stdout:
            self._lines.append(line.rstrip())

    def _wait_until_serving(self, started: float) -> None:
        with self._console.status("loading") as status:
            while True:
                seconds = time.monotonic() - started
                status.update(f"loading SGLang and the model: {seconds:.0f} s")
                for line in self._lines:
                    if match := re.search(r"serving on (\S+)", line):
                        self._target = match[1]
                        self._console.print(f"serving gRPC on {self._target} after {seconds:.0f} s")
                        return
                ended = self._process.poll()
                if ended is not None or seconds > _START_SECONDS:
                    how = f"in {_START_SECONDS} s" if ended is None else f"(exit status {ended})"
                    said = "\n".join(self._lines[-20:])
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

    @staticmethod
    def _cli(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vase_sgl.cli", *arguments], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise GatewayFailed(done.stderr)
        return done.stdout.strip()
