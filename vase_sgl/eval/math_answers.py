"""Are two mathematical answers equal? The library `math-verify`, in a process that can be killed.

The library stops long work by an alarm signal, which works in a main thread alone and does not
interrupt arithmetic on huge integers. So it runs in a child process, which ends at a limit of its
CPU time, whatever else the machine does, and is started anew for the next answer.
"""

from __future__ import annotations

import atexit
import functools
import json
import selectors
import signal
import subprocess
import sys
import threading
from typing import Literal

#: CPU time of a comparison: long enough for every answer that is one.
SECONDS = 20.0
#: Wall clock, for a child that waits instead of computing, in multiples of the CPU time.
_WALL = 60

#: `timeout`: its CPU time was used up. `stalled`: no reply in `_WALL` times as long.
#: `failure`: math-verify raised or its process died; the error is on stderr.
Comparison = Literal["equal", "different", "timeout", "stalled", "failure"]


class MathAnswers:
    """Compares answers one at a time. Safe to call from several threads.

    Raises:
        ModuleNotFoundError: `math-verify` is not installed.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        import math_verify  # noqa: F401 - it must be there; the child imports it again

        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def compare(self, reference: str, answer: str) -> Comparison:
        """Whether `answer` means the same as `reference`; both LaTeX or plain expressions.

        Raises:
            RuntimeError: the child process does not start.
        """
        with self._lock:
            line = json.dumps([reference, answer]).encode() + b"\n"
            if self._process is None or self._process.poll() is not None:
                self._stop()
                self._process = self._start()
            process = self._process
            assert process.stdin and process.stdout
            process.stdin.write(line)
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                ready = selector.select(_WALL * self._seconds)
            if not ready:
                self._stop()
                return "stalled"
            reply = process.stdout.readline().strip()
            if reply == b"equal":
                return "equal"
            if reply == b"different":
                return "different"
            if not reply:
                self._stop()
                if process.returncode == -signal.SIGPROF:
                    return "timeout"
            return "failure"

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vase_sgl.eval.math_worker", str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run, which closes this one
        )
        assert process.stdout
        if process.stdout.readline() != b"ready\n":
            process.kill()
            process.wait()
            raise RuntimeError("the process that compares answers does not start; see its error")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.cache
def shared_answers() -> MathAnswers:
    """One comparer for every task of this process: its child takes a second to start."""
    return MathAnswers()
