"""The fork server, seen from its children and from the main process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere SGLang spawns")


@pytest.fixture
def main_process() -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-m", "tests.engine.fork_server_process")
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        yield process
        process.kill()


def test_a_child_is_as_if_spawned_and_dies_with_the_main_process(
    main_process: subprocess.Popen[str],
) -> None:
    assert main_process.stdout is not None
    seen = json.loads(main_process.stdout.readline())
    child, server = seen.pop("pids")
    assert seen == {
        "late": "1",
        "early": None,
        "start_method": "spawn",
        "quits": True,
        "imported": True,
    }
    assert psutil.Process(server).ppid() == main_process.pid
    assert main_process.stdout.readline() == "SIGQUIT\n"  # from the child to its parent
    main_process.kill()
    until = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in (child, server)):
        assert time.monotonic() < until, "they outlived the main process"
        time.sleep(0.02)
