"""Processes that benchmarks start: found when they serve, and not left behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.workers import started
from vase_sgl.demo import gateway
from vase_sgl.demo.gateway import GatewayFailed, GatewayProcess

#: Healthy at once; a child of its own outlives it, unless the whole group is ended.
WORKER = """
import http.server, os, subprocess, sys, threading
from vase_sgl.parent_watch import end_with_parent
end_with_parent()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(threading.enumerate()[-1].name, os.environ["MORE"], os.getcwd(), child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
SERVE = """
import os, sys, threading, time
from vase_sgl.parent_watch import end_with_parent
end_with_parent()
print(threading.enumerate()[-1].name, os.environ["MORE"], *sys.argv[1:])
print("vase-sgl is serving on 127.0.0.1:5" if os.environ["MORE"] == "fine" else "it cannot")
time.sleep(60 if os.environ["MORE"] == "fine" else 0)
"""


def alive(pid: int) -> bool:
    """And no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_ends_with_its_whole_group(tmp_path: Path) -> None:
    command = (sys.executable, "-c", WORKER)
    with started(command, tmp_path / "log", folder=tmp_path, env={"MORE": "x"}) as worker:
        assert worker.wait_until_healthy() < 30
        *told, child = worker.last_lines().splitlines()[0].split()
        assert told == ["vase-parent-watch", "x", str(tmp_path)]
        assert alive(worker.pid) and alive(int(child))
    deadline = time.monotonic() + 10
    while alive(int(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker.pid) and not alive(int(child))


def test_a_worker_that_ends_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no memory')")
    with (
        pytest.raises(SystemExit, match="the worker did not start:\nno memory"),
        started(command, tmp_path / "log") as worker,
    ):
        worker.wait_until_healthy()


def test_a_gateway_is_told_whose_child_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it ends, and its worker with it, when the load test is killed."""
    monkeypatch.setattr(gateway, "_CLI", (sys.executable, "-c", SERVE))
    with GatewayProcess(["--more"], {"MORE": "fine"}) as running:
        assert running.target == "127.0.0.1:5"
        watch, _, *arguments = running.said[0].split()
        assert watch == "vase-parent-watch"
        assert arguments[0] == "serve" and arguments[-1] == "--more"
        assert alive(running.pid)
    assert not alive(running.pid)
    with pytest.raises(GatewayFailed, match=r"\(exit status 0\):\n.*\nit cannot"):
        GatewayProcess([], {"MORE": "broken"}).__enter__()
