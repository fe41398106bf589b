"""The embedded worker: a process that starts, fails, dies and never outlives its owner."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.gateway.running import until
from vase_sgl.gateway import server
from vase_sgl.gateway.config import load_config
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.worker_embedded import EmbeddedWorker, WorkerStartError, worker_command
from vase_sgl.gateway.worker_http import HttpWorker
from vase_sgl.gateway.workers import WorkerRequest

SCRIPTED = (sys.executable, "-m", "tests.gateway.scripted_worker")


def embedded(
    command: Sequence[str], tmp_path: Path, start: float = 30, grace: float = 2
) -> EmbeddedWorker:
    return EmbeddedWorker(
        command,
        log=tmp_path / "logs" / "worker.log",
        start_timeout_seconds=start,
        stop_grace_seconds=grace,
        stall_seconds=60,
    )


def quiet(seconds: float) -> None:
    """Progress nobody watches."""


def process_of(worker: EmbeddedWorker) -> asyncio.subprocess.Process:
    assert worker._process is not None
    return worker._process


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_it_starts_serves_and_stops(tmp_path: Path) -> None:
    worker = embedded(SCRIPTED, tmp_path)
    with pytest.raises(WorkerUnavailable, match="the model is still loading"):
        await worker.check_health()
    seconds: list[float] = []
    await worker.start(seconds.append)
    process = process_of(worker)
    assert seconds[0] < 0.5 and os.getsid(process.pid) == process.pid
    request = WorkerRequest(
        "0" * 32, (1, 2), {"max_new_tokens": 3, "sampling_seed": 1, "stop": []}, None
    )
    chunks = [chunk async for chunk in worker.generate(request)]
    assert len(chunks[-1].token_ids) == 3
    assert worker._log.stat().st_mode & 0o077 == 0
    await worker.close()
    assert not is_alive(process.pid)


async def test_only_its_owner_may_use_it(tmp_path: Path) -> None:
    worker = embedded(SCRIPTED, tmp_path)
    await worker.start(quiet)
    stranger = HttpWorker(worker.name, stall_seconds=1)
    try:
        await worker.info()
        await stranger.check_health()
        with pytest.raises(WorkerUnavailable, match="refuses this gateway's key"):
            await stranger.info()
    finally:
        await stranger.close()
        await worker.close()


async def test_it_is_told_whom_to_die_with(tmp_path: Path) -> None:
    script = (
        "import threading; from vase_sgl.parent_watch import end_with_parent;"
        "end_with_parent(); print(threading.enumerate()[-1].name)"
    )
    worker = embedded((sys.executable, "-c", script), tmp_path)
    with pytest.raises(WorkerStartError, match="vase-parent-watch"):
        await worker.start(quiet)


async def test_a_failed_start_quotes_the_log(tmp_path: Path) -> None:
    script = "import sys; print('no model at /x'); sys.exit(3)"
    worker = embedded((sys.executable, "-c", script), tmp_path)
    with pytest.raises(WorkerStartError) as error:
        await worker.start(quiet)
    text = str(error.value)
    assert "ended with exit code 3 while starting" in text
    assert "no model at /x" in text and str(tmp_path / "logs" / "worker.log") in text


async def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    worker = embedded((sys.executable, "-c", "import time; time.sleep(60)"), tmp_path, start=0.6)
    with pytest.raises(WorkerStartError, match=r"raise worker\.start_timeout_seconds"):
        await worker.start(quiet)
    await worker.close()
    assert not is_alive(process_of(worker).pid)


async def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    worker = embedded(("/no/such/command",), tmp_path)
    with pytest.raises(WorkerStartError, match="cannot start the worker"):
        await worker.start(quiet)
    await worker.close()


async def test_the_log_of_the_run_before_is_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        worker = embedded((sys.executable, "-c", f"raise SystemExit('run {number}')"), tmp_path)
        with pytest.raises(WorkerStartError, match=f"run {number}") as error:
            await worker.start(quiet)
        assert f"run {number - 1}" not in str(error.value)
        await worker.close()
    log = worker._log
    assert sorted(file.name for file in log.parent.iterdir()) == ["worker.log", "worker.log.1"]
    assert log.read_text() == "run 3\n" and log.with_name("worker.log.1").read_text() == "run 2\n"


async def test_a_log_that_is_a_link_is_left_where_it_is(tmp_path: Path) -> None:
    """As /dev/stdout is."""
    worker = embedded((sys.executable, "-c", "raise SystemExit('run')"), tmp_path)
    worker._log.parent.mkdir()
    worker._log.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("before\n")
    with pytest.raises(WorkerStartError):
        await worker.start(quiet)
    await worker.close()
    assert (tmp_path / "elsewhere").read_text() == "before\nrun\n"


async def test_a_log_that_is_a_pipe_is_not_read(tmp_path: Path) -> None:
    """As /dev/stdout is in a container: a read would wait for what this process writes."""
    reader, writer = os.pipe()
    worker = embedded((sys.executable, "-c", "raise SystemExit('bad flag')"), tmp_path)
    worker._log = Path(f"/dev/fd/{writer}")
    too_late = threading.Timer(10, os.close, (writer,))  # what ends such a wait
    too_late.start()
    with pytest.raises(WorkerStartError, match=f"exit code 1 .* went to /dev/fd/{writer}$"):
        await worker.start(quiet)
    await worker.close()
    too_late.cancel()
    os.close(writer)
    with open(reader) as output:
        assert output.read() == "bad flag\n"


@pytest.mark.parametrize("kind", ["file", "socket"])  # `> FILE`, and systemd
async def test_the_worker_may_write_where_this_process_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    worker = embedded((sys.executable, "-c", "raise SystemExit('bad flag')"), tmp_path)
    worker._log = Path("/dev/stdout")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if kind == "socket":
            os.dup2(theirs.fileno(), 1)
        os.write(1, b"before\n")
        with pytest.raises(WorkerStartError, match=r"code 1 .* went to /dev/stdout$"):
            await worker.start(quiet)
        await worker.close()
        os.write(1, b"after\n")
        written = ours.recv(100).decode() if kind == "socket" else capfd.readouterr().out
    assert written == "before\nbad flag\nafter\n"


async def test_a_named_pipe_without_a_reader_is_refused(tmp_path: Path) -> None:
    worker = embedded((sys.executable, "-c", ""), tmp_path)
    worker._log.parent.mkdir()
    os.mkfifo(worker._log)
    with pytest.raises(WorkerStartError, match=r"cannot start the worker: .*worker\.log_file"):
        await worker.start(quiet)
    await worker.close()


async def test_a_log_that_is_gone_hides_no_failed_start(tmp_path: Path) -> None:
    script = "import os, sys; os.remove(sys.argv[1]); sys.exit(3)"
    log = tmp_path / "logs" / "worker.log"
    worker = embedded((sys.executable, "-c", script, str(log)), tmp_path)
    with pytest.raises(WorkerStartError, match=r"exit code 3 .* its output went to"):
        await worker.start(quiet)
    await worker.close()


async def test_the_log_may_be_truncated_meanwhile(tmp_path: Path) -> None:
    script = "import sys\nfor line in open(sys.argv[1]): print(line, end='', flush=True)"
    os.mkfifo(tmp_path / "lines")
    worker = embedded((sys.executable, "-c", script, str(tmp_path / "lines")), tmp_path)
    starting = asyncio.create_task(worker.start(quiet))
    with await asyncio.to_thread(open, tmp_path / "lines", "w", buffering=1) as lines:
        lines.write("one\n")
        await until(lambda: worker._log.read_text() == "one\n")
        os.truncate(worker._log, 0)
        lines.write("two\n")
        await until(lambda: worker._log.read_text() == "two\n")
    await asyncio.gather(starting, return_exceptions=True)
    await worker.close()


async def test_a_worker_that_died_is_unavailable_and_names_its_log(tmp_path: Path) -> None:
    worker = embedded(SCRIPTED, tmp_path)
    await worker.start(quiet)
    process_of(worker).kill()
    await process_of(worker).wait()
    with pytest.raises(WorkerUnavailable, match=r"exit code -9; its log is .*worker\.log"):
        await worker.check_health()
    await worker.close()


async def test_the_whole_group_is_killed_after_the_grace_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that ignores SIGTERM, and its own child."""
    script = (
        "import os, signal, subprocess, sys, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "open(os.environ['PID_FILE'], 'w').write(str(child.pid)); time.sleep(60)"
    )
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("PID_FILE", str(pid_file))
    worker = embedded((sys.executable, "-c", script), tmp_path, grace=0.3)
    starting = asyncio.create_task(worker.start(quiet))
    async with asyncio.timeout(10):
        while not pid_file.exists() or not pid_file.read_text():
            await asyncio.sleep(0.05)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await worker.close()
    child = int(pid_file.read_text())
    assert process_of(worker).returncode == -signal.SIGKILL
    await asyncio.sleep(0.1)
    assert not is_alive(child)


async def test_a_worker_that_died_leaves_nothing_to_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of its group goes with it; the number may be another's when the gateway stops."""
    script = (
        "import subprocess, sys;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "sys.exit(f'child {child.pid}')"
    )
    worker = embedded((sys.executable, "-c", script), tmp_path)
    with pytest.raises(WorkerStartError, match="child") as error:
        await worker.start(quiet)
    child = int(str(error.value).split()[-1])
    await until(lambda: not is_alive(child))
    signalled: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: signalled.append(group))
    await worker.close()
    assert signalled == []


async def test_a_gateway_interrupted_while_the_model_loads_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("PID_FILE", str(pid_file))
    script = "import os, time; open(os.environ['PID_FILE'], 'w').write(str(os.getpid()));"
    monkeypatch.setattr(
        server, "worker_command", lambda *_: (sys.executable, "-c", script + "time.sleep(60)")
    )
    config = load_config(
        overrides={
            "listen": {"port": 0},
            "worker": {"model_path": "m", "log_file": tmp_path / "worker.log"},
            "audit": {"url": f"sqlite+aiosqlite:///{tmp_path / 'audit.sqlite3'}"},
            "insecure_no_auth": True,
        }
    )
    starting = asyncio.create_task(server.Gateway.start(config, quiet))
    async with asyncio.timeout(10):
        while not pid_file.exists() or not pid_file.read_text():
            await asyncio.sleep(0.05)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert not is_alive(int(pid_file.read_text()))


def test_the_command_runs_the_worker_of_this_installation() -> None:
    command = worker_command("/models/m", ("--tp-size", "2"))
    assert command[:5] == [sys.executable, "-P", "-m", "vase_sgl.cli", "worker"]
    assert command[5:7] == ["--model-path", "/models/m"]
    assert command[-2:] == ["--tp-size", "2"]
    quiet_paths = command.index("--uvicorn-access-log-exclude-prefixes")
    assert command[quiet_paths + 1 : quiet_paths + 3] == ["/health", "/server_info"]
    assert command[quiet_paths + 3].startswith("--")
