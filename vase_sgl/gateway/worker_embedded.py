"""The embedded worker: `vase-sgl worker` as a child process of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from vase_sgl import parent_watch
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.worker_http import HttpWorker
from vase_sgl.worker_key import WORKER_KEY

#: Seconds between looks at a worker that is starting.
_POLL_SECONDS = 0.5
#: Lines of the log quoted in an error.
_QUOTED_LINES = 15
#: Logs that are this process's own output.
_OWN_OUTPUT = {Path("/dev/stdout"): 1, Path("/dev/stderr"): 2}

#: Called while the model loads with the seconds since the start.
Progress = Callable[[float], None]


class WorkerStartError(Exception):
    """The embedded worker did not start. The text quotes the end of its log."""


class EmbeddedWorker(HttpWorker):
    """A worker in a child process group of its own, reached over loopback HTTP."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        start_timeout_seconds: float,
        stop_grace_seconds: float,
        stall_seconds: float,
        api_key: str | None = None,
    ) -> None:
        """Will run `command --host 127.0.0.1 --port FREE` with its output in the file `log`.

        That of the last run is kept as `log`.1.
        `api_key`: what it will ask its callers for; None makes one, so that no other user of this
        machine reaches it.
        """
        port, self._key = _free_port(), api_key or secrets.token_urlsafe(32)
        super().__init__(f"http://127.0.0.1:{port}", stall_seconds=stall_seconds, api_key=self._key)
        self._command = (*command, "--host", "127.0.0.1", "--port", str(port))
        self._log = log
        self._start_timeout = start_timeout_seconds
        self._stop_grace = stop_grace_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._end: asyncio.Task[None] | None = None

    async def start(self, progress: Progress) -> None:
        """Run the process and wait until it answers /health.

        Raises `WorkerStartError` as soon as the process exits, or after the timeout. The process
        is left to `close`, whatever happens.
        """
        try:
            pipe, told = parent_watch.for_child()
            self._log.parent.mkdir(parents=True, exist_ok=True)
            if self._log.is_file() and not self._log.is_symlink():  # so not /dev/stdout
                # It may say why the last one died.
                self._log.replace(self._log.with_name(f"{self._log.name}.1"))
            with _opened(self._log) as output:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C reaches the gateway alone, which then stops the worker in order.
                    start_new_session=True,
                    pass_fds=(pipe,),
                    env={**os.environ, **told, WORKER_KEY: self._key},
                )
        except OSError as error:
            raise WorkerStartError(
                f"cannot start the worker: {error}; check worker.log_file ({self._log})"
            ) from error
        self._end = asyncio.create_task(_end_of_group(self._process))
        await self._wait_until_ready(self._process, progress)

    async def check_health(self) -> None:
        if self._process is None:
            raise WorkerUnavailable("the model is still loading")
        code = self._process.returncode
        if code is not None:
            raise WorkerUnavailable(
                f"the embedded worker ended with exit code {code}; its log is {self._log}; "
                "the gateway has to be restarted"
            )
        await super().check_health()

    async def close(self) -> None:
        """Stop the process group: SIGTERM, and SIGKILL after the grace time."""
        await super().close()
        process, end = self._process, self._end
        if process is None or end is None:
            return
        if process.returncode is None:
            _signal_group(process, signal.SIGTERM)
            await asyncio.wait({end}, timeout=self._stop_grace)
        if process.returncode is None:
            _signal_group(process, signal.SIGKILL)
        await end

    async def _wait_until_ready(
        self, process: asyncio.subprocess.Process, progress: Progress
    ) -> None:
        start = time.monotonic()
        while True:
            seconds = time.monotonic() - start
            progress(seconds)
            if process.returncode is not None:
                raise WorkerStartError(
                    f"the worker ended with exit code {process.returncode} while starting; "
                    f"{self._quote()}"
                )
            with contextlib.suppress(WorkerUnavailable):
                await self.check_health()
                return
            if seconds > self._start_timeout:
                raise WorkerStartError(
                    f"the worker was not ready after {self._start_timeout:.0f} s; raise "
                    f"worker.start_timeout_seconds if the model needs longer; {self._quote()}"
                )
            await asyncio.sleep(_POLL_SECONDS)

    def _quote(self) -> str:
        with contextlib.suppress(OSError):
            # To read a pipe or a terminal could take for ever.
            if self._log.is_file() and self._log not in _OWN_OUTPUT:
                text = self._log.read_text(errors="replace")
                lines = (f"  {line}" for line in text.rstrip().splitlines()[-_QUOTED_LINES:])
                return f"the end of its log {self._log}:\n" + "\n".join(lines)
        return f"its output went to {self._log}"


def _opened(log: Path) -> BinaryIO:
    if log in _OWN_OUTPUT:
        # Opened anew, a file would be written at two places, and a socket cannot be.
        return os.fdopen(os.dup(_OWN_OUTPUT[log]), "wb")
    # Appending, so that it may be truncated meanwhile.
    return open(log, "ab", opener=_open_private)


def _open_private(path: str, flags: int) -> int:
    """Not for other users of the machine: SGLang can be told to log prompts.

    Raises OSError for a named pipe that nobody reads, rather than wait for who does.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, mode=0o600)
    os.set_blocking(descriptor, True)
    return descriptor


async def _end_of_group(process: asyncio.subprocess.Process) -> None:
    """Wait for the process, and kill what it has left of its group.

    At once: the number of a group without members may become another's.
    """
    await process.wait()
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def worker_command(model_path: str, args: Sequence[str]) -> list[str]:
    """The command of the embedded worker, without host and port.

    Its stream carries what is new: with the whole output in every event, a long answer would cost
    the square of its length. Its log leaves out the gateway's own health checks.
    """
    return [
        *(sys.executable, "-P", "-m", "vase_sgl.cli", "worker", "--model-path", model_path),
        *("--uvicorn-access-log-exclude-prefixes", "/health", "/server_info"),
        "--incremental-streaming-output",
        *args,
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
