"""A child that ends with its parent, and nobody else who inherits the variable."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading

import pytest

from vase_sgl.parent_watch import PARENT_PIPE, end_with_parent, for_child

#: Runs the code in argv[1] as a child.
PARENT = """
import os, subprocess, sys, time
from vase_sgl.parent_watch import for_child
pipe, told = for_child()
if os.fork() == 0:  # as `multiprocessing` may: it holds whatever this process has open
    os.close(1)
    time.sleep(60)
subprocess.run(
    [sys.executable, "-c", sys.argv[1]], env={**os.environ, **told}, pass_fds=(pipe,)
)
"""
START = """
import os, signal, subprocess, sys, time
from vase_sgl.parent_watch import end_with_parent
def asked(*_):
    print("asked")
    sys.exit()
signal.signal(signal.SIGTERM, asked)
"""
READY = "print('ready', flush=True)\n"
LOOK = "end_with_parent()\n"


def said_without_parent(code: str) -> str:
    """What the child says from when its parent was killed until it ends."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, code],
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        said = b""
        while select.select([parent.stdout], [], [], 20)[0]:
            part = os.read(parent.stdout.fileno(), 1000)
            if not part:
                return said.decode()
            said += part
        pytest.fail("the child lives on")
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()
        parent.wait()


def test_a_child_ends_with_its_parent() -> None:
    assert said_without_parent(f"{START}{LOOK}{READY}time.sleep(60)") == "asked\n"


def test_a_child_ends_whose_parent_was_gone_before_it_looked() -> None:
    gone = "while os.getppid() == parent: time.sleep(0.01)\n"
    code = f"{START}parent = os.getppid()\n{READY}{gone}{LOOK}time.sleep(60)"
    assert said_without_parent(code) == "asked\n"


def test_who_inherited_the_variable_alone_lives_on() -> None:
    """A child of a child that took no notice of it."""
    gone = "while os.path.exists(f'/proc/{sys.argv[1]}/exe'): time.sleep(0.01)\n"
    nested = f"{START}{READY}{gone}{LOOK}time.sleep(1)\nprint('lives')"
    code = f"{START}subprocess.run([sys.executable, '-c', {nested!r}, str(os.getppid())])"
    assert said_without_parent(code) == "lives\n"


@pytest.mark.parametrize("text", ["", "x", "{pipe}", "{pipe}:{other}", "{file}:{inode}", "999:1"])
def test_another_file_of_that_number_is_not_the_pipe(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    pipe, told = for_child()
    inode = int(told[PARENT_PIPE].split(":")[1])
    with open(os.devnull) as file:
        values = {"pipe": pipe, "inode": inode, "other": inode + 1, "file": file.fileno()}
        monkeypatch.setenv(PARENT_PIPE, text.format(**values))
        end_with_parent()
    assert PARENT_PIPE not in os.environ
    assert "vase-parent-watch" not in {thread.name for thread in threading.enumerate()}
