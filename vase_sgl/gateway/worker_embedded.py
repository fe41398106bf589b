"""The embedded worker: `vase-sgl worker` as a child process of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.worker_http import HttpWorker

#: The child ends itself when the process with this id is gone, so that it cannot outlive a
#: gateway that was killed.
PARENT_PID = "VASE_PARENT_PID"

#: Seconds between looks at a worker that is starting.
_POLL_SECONDS = 0.5
#: Lines of the log quoted in an error.
_QUOTED_LINES = 15

#: Called while the model loads with the seconds since the start.
Progress = Callable[[float], None]


class WorkerStartError(Exception):
    """The embedded worker did not start. The text quotes the end of its log."""


class EmbeddedWorker(HttpWorker):
    """A worker in a child process group of its own, reached over loopback HTTP."""

    def __init__(
        self, process: asyncio.subprocess.Process, port: int, log: Path, stop_grace_seconds: float
    ) -> None:
        super().__init__(f"http://127.0.0.1:{port}")
        self._process = process
        self._log = log
        self._stop_grace = stop_grace_seconds

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        log: Path,
        start_timeout_seconds: float,
        stop_grace_seconds: float,
        progress: Progress,
    ) -> EmbeddedWorker:
        """Run `command --host 127.0.0.1 --port FREE` and wait until it answers /health.

        Its output replaces the content of `log`. Raises `WorkerStartError` as soon as the process
        exits, or after the timeout. Cancelled or failed, it leaves no process behind.
        """
        port = _free_port()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(port),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C reaches the gateway alone, which then stops the worker in order.
                    start_new_session=True,
                    env={**os.environ, PARENT_PID: str(os.getpid())},
                )
        except OSError as error:
            raise WorkerStartError(
                f"cannot start the worker: {error}; check worker.log_file ({log})"
            ) from error
        worker = cls(process, port, log, stop_grace_seconds)
        try:
            await worker._wait_until_ready(start_timeout_seconds, progress)
        except BaseException:
            await worker.close()
            raise
        return worker

    async def check_health(self) -> None:
        code = self._process.returncode
        if code is not None:
            raise WorkerUnavailable(
                f"the embedded worker ended with exit code {code}; its log is {self._log}; "
                "restart the gateway"
            )
        await super().check_health()

    async def close(self) -> None:
        """Stop the process group: SIGTERM, and SIGKILL after the grace time."""
        await super().close()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), self._stop_grace)
        # Also after a clean exit: members of the group may be left.
        self._signal(signal.SIGKILL)
        await self._process.wait()

    async def _wait_until_ready(self, timeout: float, progress: Progress) -> None:
        start = time.monotonic()
        while True:
            seconds = time.monotonic() - start
            progress(seconds)
            if self._process.returncode is not None:
                raise WorkerStartError(
                    f"the worker ended with exit code {self._process.returncode} while starting; "
                    f"{self._quote()}"
                )
            with contextlib.suppress(WorkerUnavailable):
                await self.check_health()
                return
            if seconds > timeout:
                raise WorkerStartError(
                    f"the worker was not ready after {timeout:.0f} s; raise "
                    f"worker.start_timeout_seconds if the model needs longer; {self._quote()}"
                )
            await asyncio.sleep(_POLL_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _quote(self) -> str:
        lines = self._log.read_text(errors="replace").rstrip().splitlines()[-_QUOTED_LINES:]
        return f"the end of its log {self._log}:\n" + "\n".join(f"  {line}" for line in lines)


def worker_command(model_path: str, args: Sequence[str]) -> list[str]:
    """The command of the embedded worker, without host and port."""
    return [sys.executable, "-m", "vase_sgl.cli", "worker", "--model-path", model_path, *args]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
