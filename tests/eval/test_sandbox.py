"""Hostile programs in the sandbox, as this user and as a plain one, with and without its layers."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vase_sgl.eval.sandbox import LAYERS, Limits, SandboxError, check_sandbox, run_program

_ROOT = Path(__file__).parents[2]
_LIMITS = {
    "wall_seconds": 60.0,
    "cpu_seconds": 5,
    "address_space": 256 << 20,
    "file_bytes": 1 << 20,
    "folder_bytes": 4 << 20,
    "processes": 8,
    "output_bytes": 10_000,
}
_NAMED = "import ctypes, os, time; ctypes.CDLL(None).prctl(15, b'{mark}')\n"
_FORK_BOMB = """
def bomb():
    while True:
        try:
            os.fork()
        except OSError:
            pass
for started in range(10_000):
    try:
        child = os.fork()
    except OSError:
        print("refused after", started)
        break
    if child == 0:
        bomb()
"""
_SLEEPERS = """
for started in range(10_000):
    try:
        if os.fork() == 0:
            time.sleep(100)
    except OSError:
        print(started)
        break
"""
_DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        time.sleep(60)
    os._exit(0)
os.wait()
print("left")
"""
#: Each attempt is made; the program prints what came of it: "ok" or the error.
_ATTEMPTS = """
import glob, json, socket

def many_files():
    for number in range(100):
        with open(str(number), "wb") as file:
            file.write(bytes(900_000))

def environment():
    found = [repr(dict(os.environ))]
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            found.append(repr(open(path, "rb").read()))
        except OSError:
            pass
    assert not any({secret!r} in text for text in found), "the secret"

def connect():
    socket.create_connection(("127.0.0.1", {port}), 1).close()

attempts = {{
    "memory": lambda: bytearray(1 << 30),
    "large_file": lambda: open("large", "wb").write(bytes(2 << 20)),
    "many_files": many_files,
    "environment": environment,
    "write_outside": lambda: open({outside!r}, "w").write("x"),
    "read_outside": lambda: open({private!r}).read(),
    "connect": connect,
    "signal": lambda: os.kill({victim}, 9),
}}
results = {{}}
for name, attempt in attempts.items():
    try:
        attempt()
        results[name] = "ok"
    except BaseException as error:
        results[name] = type(error).__name__ + ": " + str(error)
print(json.dumps(results))
"""


def _reachable_python() -> str | None:
    """A Python that any user may start and that runs this code."""
    for python in (sys.executable, "/usr/bin/python3"):
        resolved = Path(python).resolve()
        if not resolved.exists() or not all(p.stat().st_mode & 0o001 for p in resolved.parents):
            continue
        version = subprocess.run(
            [python, "-c", "import sys; print(sys.version_info >= (3, 11))"],
            capture_output=True,
            text=True,
        )
        if version.stdout.strip() == "True":
            return python
    return None


class Scene:
    """One way to run programs: user, Python and layers."""

    def __init__(self, folder: Path, user: int | None, python: str, layers: tuple[str, ...]):
        self.folder, self.user, self.python, self.layers = folder, user, python, layers
        self.secret = secrets.token_hex(8)
        self.mark = f"sb-{secrets.token_hex(5)}"

    def run(self, **programs: str | tuple[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
        """Run programs, each given as source or as (source, limits that differ)."""
        named = _NAMED.format(mark=self.mark)
        request: dict[str, Any] = {"layers": self.layers, "programs": {}}
        for name, program in programs.items():
            source, limits = (program, {}) if isinstance(program, str) else program
            request["programs"][name] = [named + source, {**_LIMITS, **limits}]
        process = subprocess.run(
            [self.python, "-m", "tests.eval.sandbox_process"],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": str(_ROOT), "TMPDIR": str(self.folder), "SECRET": self.secret},
            cwd=_ROOT,
            check=True,
            **self.as_user(),
        )
        results: dict[str, dict[str, Any]] = json.loads(process.stdout)
        return results

    def as_user(self) -> dict[str, Any]:
        """Options of `subprocess` that start a process as the scene's user."""
        if self.user is None:
            return {}
        return {"user": self.user, "group": self.user, "extra_groups": []}

    def left_behind(self) -> list[str]:
        """Processes of this scene that are alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = path.read_text()
            except OSError:
                continue
            if f"({self.mark})" in text and text.rpartition(")")[2].split()[0] != "Z":
                found.append(text)
        return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("self", LAYERS), id="this-user"),
        pytest.param(("plain", LAYERS), id="plain-user"),
        pytest.param(("self", ()), id="this-user-without-layers"),
        pytest.param(("plain", ("landlock",)), id="plain-user-landlock-alone"),
        pytest.param(("plain", ()), id="plain-user-without-layers"),
    ],
)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    who, layers = request.param
    python = sys.executable
    if who == "plain" or not layers:
        reachable = _reachable_python()
        if reachable is None:
            pytest.skip("no Python that other users may start")
        python = reachable
    if who == "plain" and os.geteuid() != 0:
        pytest.skip("this user is a plain one")
    folder = Path(f"/tmp/vase-test-{secrets.token_hex(6)}")
    folder.mkdir()
    folder.chmod(0o777)
    # Of this scene alone: where there are no namespaces, all tasks of a user count together.
    user = 50_000 + secrets.randbelow(10_000) if who == "plain" else None
    yield Scene(folder, user, python, layers)
    shutil.rmtree(folder)


def test_hostile_programs(scene: Scene) -> None:
    outside, private = scene.folder / "outside", scene.folder / "private"
    private.write_text("key")
    victim = subprocess.Popen(["sleep", "100"], **scene.as_user())
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempts = _ATTEMPTS.format(
            secret=scene.secret,
            port=server.getsockname()[1],
            outside=str(outside),
            private=str(private),
            victim=victim.pid,
        )
        results = scene.run(
            attempts=attempts,
            asleep=("time.sleep(100)", {"wall_seconds": 0.5}),
            output="while True: print('x' * 1000)",
            daemon=_DAEMON,
        )
    killed = victim.poll() is not None
    victim.kill()
    victim.wait()
    assert scene.left_behind() == []

    assert results["attempts"]["status"] == 0, results["attempts"]
    isolation = set(results["attempts"]["isolation"])
    # A layer that this kernel lacks changes what may be expected, not whether it is reported.
    assert {name.partition("-")[0] for name in isolation - {"user"}} <= set(scene.layers)
    root = scene.user is None and os.geteuid() == 0
    assert ("user" in isolation) == root

    assert results["asleep"]["outcome"] == "timeout"
    assert results["output"]["outcome"] == "output"
    assert len(results["output"]["stdout"]) == _LIMITS["output_bytes"]
    assert results["daemon"]["stdout"] == "left\n"
    seen = json.loads(results["attempts"]["stdout"])
    assert seen["memory"].startswith("MemoryError")
    assert "File too large" in seen["large_file"]
    assert ("No space left" in seen["many_files"]) == ("namespaces" in isolation)
    # What the docstring of the sandbox promises, and what it says it cannot.
    assert (seen["environment"] == "ok") == bool(isolation)
    unsignalled = {"user", "namespaces", "landlock-signals"}
    assert (seen["signal"] == "ok") == killed == (not isolation & unsignalled)
    assert (seen["connect"] == "ok") == (not isolation & {"namespaces", "landlock-tcp"})
    assert (seen["write_outside"] == "ok") == outside.exists() == ("landlock" not in isolation)
    assert (seen["read_outside"] == "ok") == ("landlock" not in isolation)


def test_fork_bomb(scene: Scene) -> None:
    result = scene.run(bomb=_FORK_BOMB)["bomb"]
    assert result["outcome"] == "exited", result
    assert "refused after" in result["stdout"]
    assert int(result["stdout"].split()[2]) < _LIMITS["processes"]
    assert scene.left_behind() == []


def test_the_number_of_processes_is_exact(scene: Scene) -> None:
    others = "[threading.Thread(target=time.sleep, args=[100]).start() for _ in range(20)]"
    busy = subprocess.Popen(
        [scene.python, "-c", f"import threading, time; {others}; print('busy', flush=True)"],
        stdout=subprocess.PIPE,
        **scene.as_user(),
    )
    assert busy.stdout and busy.stdout.readline() == b"busy\n"
    result = scene.run(sleepers=_SLEEPERS)["sleepers"]
    busy.kill()
    busy.communicate()
    assert result["outcome"] == "exited", result
    assert int(result["stdout"]) == _LIMITS["processes"] - 1
    assert scene.left_behind() == []


def test_a_fork_that_the_first_look_missed_is_found() -> None:
    """As when a parent was stopped in the middle of its fork, which is carried out later."""
    script = """
import os, time, launcher
look, looks = launcher._descendants, []
def blind_at_first():
    looks.append(1)
    return look() if len(looks) > 1 else set()
launcher._descendants = blind_at_first
if os.fork() == 0:
    time.sleep(60)
launcher._kill_descendants()
"""
    folder = _ROOT / "vase_sgl" / "eval" / "sandbox"
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, timeout=30)


def test_an_endless_loop_ends_by_its_cpu_time() -> None:
    execution = run_program("while True: pass", Limits(wall_seconds=60, cpu_seconds=1))
    assert (execution.outcome, execution.status) == ("signal", -signal.SIGXCPU)


def test_this_machine_runs_programs() -> None:
    isolation = check_sandbox()
    assert {name.partition("-")[0] for name in isolation} <= {"user", *LAYERS}
    execution = run_program("import json, sys; print(json.dumps(sys.argv)); sys.exit(3)")
    assert (execution.outcome, execution.status) == ("exited", 3)
    assert not execution.succeeded
    assert execution.stdout == '["program.py"]\n'
    assert execution.isolation == isolation


def test_text_that_is_no_utf8() -> None:
    written = run_program("import sys; sys.stdout.buffer.write(b'a\\xffb')")
    assert written.stdout == "a\N{REPLACEMENT CHARACTER}b"
    broken = run_program("print('\udcff')")  # what a detokenizer may leave in a program
    assert broken.status == 1 and "SyntaxError" in broken.stderr


def test_a_python_that_is_missing_is_the_sandboxs_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher_python = sys.executable
    real = subprocess.Popen

    def with_real_launcher(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([launcher_python, *command[1:]], **options)

    monkeypatch.setattr(subprocess, "Popen", with_real_launcher)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SandboxError, match="/nowhere/python"):
        run_program("")


def test_unknown_layer() -> None:
    with pytest.raises(ValueError, match=r"unknown layers .*seccomp.*; known are namespaces"):
        run_program("", Limits(), layers=["seccomp"])
