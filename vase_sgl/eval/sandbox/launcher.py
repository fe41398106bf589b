"""Runs one untrusted program: `python -I -S launcher.py REPORT_FD`, the request as JSON on stdin.

    launcher  own session; wall-clock limit; kills what is left      (the caller's user)
      init    first process of the PID namespace, where there is one (the caller's user)
        program                                                      (limited, unprivileged)

It reports JSON lines on REPORT_FD: `isolation`, then `status` (an exit status, or minus a signal),
`timeout` or `error`. When the descriptor closes, no process of the program is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vase_sgl.eval.sandbox import isolation
else:
    sys.path.insert(0, str(Path(__file__).parent))  # -I leaves the script's folder out
    import isolation

#: User ids for programs started as root: above what systems hand out; the process id is added.
_FREE_USERS = 2_000_000_000
_READABLE = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_PROGRAM = "program.py"


class _Stopped(Exception):
    """The caller asked to stop."""


def main() -> None:
    """Run the request and report."""
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    signal.signal(signal.SIGTERM, _stop)
    isolation.die_with_parent()
    isolation.adopt_orphans()
    request = json.loads(sys.stdin.buffer.read())
    try:
        _launch(request, report)
    except _Stopped:
        _kill_descendants()
    except Exception as error:
        _kill_descendants()
        _tell(report, error=f"the program cannot be started: {error}")


def _launch(request: dict[str, Any], report: int) -> None:
    limits = request["limits"]
    own_user = _user_without_rights() if os.geteuid() == 0 else None
    processes = _tasks_of(own_user or os.getuid()) + limits["processes"]
    held = {"user"} if own_user else set()
    namespaces = "namespaces" in request["layers"] and isolation.enter_namespaces(
        as_root=own_user is not None
    )
    version = isolation.landlock_version() if "landlock" in request["layers"] else 0
    if namespaces:
        held.add("namespaces")
        if own_user is None:  # its user is the program's, so the namespace's init counts too
            alone = isolation.counts_tasks_by_user_namespace()
            processes = limits["processes"] + 2 if alone else processes + 1  # 2: this process, init
    held |= isolation.landlock_names(version)
    _tell(report, isolation=sorted(held))

    def program() -> None:
        try:
            _become_program(request, own_user, processes, version)
        except OSError as error:
            raise OSError(
                f"{request['python']}: {error}. As root without namespaces, use a Python that "
                "other users can enter, or another user."
            ) from error

    def init() -> None:
        isolation.die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        owner = isolation.USER_INSIDE if own_user is None else own_user
        isolation.mount_privately()
        if own_user is not None:
            isolation.open_the_way([*request["readable"], request["folder"]])
        isolation.mount_folder(request["folder"], limits["folder_bytes"], owner)
        _write_program(request, None)
        child = _fork(program, report)
        while True:
            reaped, status = os.wait()
            if reaped == child:
                _tell(report, status=os.waitstatus_to_exitcode(status))
                return

    if not namespaces:
        _write_program(request, own_user)
    deadline = time.monotonic() + limits["wall_seconds"]
    root = _fork(init if namespaces else program, report)
    try:
        status = _wait_until(root, deadline)
    finally:
        if namespaces:
            _signal(root, signal.SIGKILL)  # and with it its whole namespace
    if status is None:
        _tell(report, timeout=True)
    elif not namespaces:
        _tell(report, status=status)
    _kill_descendants()


def _become_program(
    request: dict[str, Any], own_user: int | None, processes: int, version: int
) -> None:
    limits = request["limits"]
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(request["folder"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for kind, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_AS, limits["address_space"], limits["address_space"]),
    ):
        _, ceiling = resource.getrlimit(kind)
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))
    if own_user is not None:
        os.setgroups([])
        os.setresgid(own_user, own_user, own_user)
        os.setresuid(own_user, own_user, own_user)
    isolation.gain_no_privileges()
    if version:
        readable = (*_READABLE, *request["readable"])
        isolation.restrict_files(version, request["folder"], readable, _DEVICES)
    os.execve(request["python"], [request["python"], "-I", _PROGRAM], {})


def _write_program(request: dict[str, Any], owner: int | None) -> None:
    folder = Path(request["folder"])
    (folder / _PROGRAM).write_bytes(request["source"].encode("utf-8", "surrogatepass"))
    os.chmod(folder / _PROGRAM, 0o444)
    if owner is not None:
        os.chown(folder, owner, owner)


def _fork(run: Callable[[], None], report: int) -> int:
    """Start a process that runs `run` and ends; what goes wrong in it is reported."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except Exception as error:
            _tell(report, error=f"the program cannot be started: {error}")
        finally:
            os._exit(0)
    return child


def _wait_until(child: int, deadline: float) -> int | None:
    """The child's exit code; None at the deadline. Orphans that end meanwhile are reaped."""
    pause = 0.001
    while True:
        with contextlib.suppress(ChildProcessError):
            reaped, status = os.waitpid(-1, os.WNOHANG)
            if reaped == child:
                return os.waitstatus_to_exitcode(status)
            if reaped:
                continue
        if time.monotonic() >= deadline:
            return None
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def _kill_descendants() -> None:
    """Kill every descendant. They are stopped first, so that none forks while it is looked for.

    A fork that is under way when its parent is stopped is still carried out, and may be so after
    the last look. So it is looked again until there is no child any more; orphans become children.
    """
    while True:
        stopped: set[int] = set()
        while fresh := _descendants() - stopped:
            for process in fresh:
                _signal(process, signal.SIGSTOP)
            stopped |= fresh
        for process in stopped:
            _signal(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _descendants() -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # pid (name) state parent ...; the name may hold anything
                state, parent = (
                    Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()[:2]
                )
                if state != b"Z":
                    children.setdefault(int(parent), []).append(int(entry))
    found: set[int] = set()
    pending = [os.getpid()]
    while pending:
        for child in children.get(pending.pop(), []):
            found.add(child)
            pending.append(child)
    return found


def _user_without_rights() -> int | None:
    """A user id for one program; None where this root has no other id to give away."""
    wanted = _FREE_USERS + os.getpid()
    for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines():
        first, _, count = map(int, line.split())
        if first <= wanted < first + count:
            return wanted
        if count > 10_000:
            return first + count - 2 - os.getpid() % 4096
    return None


def _tasks_of(user: int) -> int:
    """How many threads `user` runs: RLIMIT_NPROC counts them all."""
    count = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}").st_uid == user:
                    count += len(os.listdir(f"/proc/{entry}/task"))
    return count


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _tell(report: int, **what: object) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


def _stop(_number: int, _frame: object) -> None:
    raise _Stopped


if __name__ == "__main__":
    main()
