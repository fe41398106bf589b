"""Namespaces, mounts and Landlock through libc. Standard library only: the launcher runs isolated.

Sources: unshare(2), mount(2), prctl(2), landlock(7), user_namespaces(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_NAMESPACES = _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 1 << 18

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
#: Rights over files by the Landlock version that brought them.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_ONLY_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_BIND_AND_CONNECT_TCP = 0b11
_SINCE_TCP, _SINCE_SCOPES = 4, 6
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

#: The user id inside a new user namespace: not 0, so that execve drops every capability.
USER_INSIDE = 1000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def die_with_parent() -> None:
    """This process is killed when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Orphaned descendants become children of this process instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def gain_no_privileges() -> None:
    """No execve of this process or its descendants grants rights."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def enter_namespaces(*, as_root: bool) -> bool:
    """Leave this process's namespaces; children are in a new PID namespace. False if refused.

    As a plain user a user namespace comes with them, in which the user is USER_INSIDE.
    """
    user, group = os.geteuid(), os.getegid()
    flags = _NAMESPACES if as_root else _NAMESPACES | _CLONE_NEWUSER
    if _libc.unshare(flags) != 0:
        return False
    if not as_root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{USER_INSIDE} {user} 1")
        _write("/proc/self/gid_map", f"{USER_INSIDE} {group} 1")
    return True


def counts_tasks_by_user_namespace() -> bool:
    """Whether RLIMIT_NPROC counts a user's tasks in its own user namespace alone (Linux 5.14)."""
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return (int(major), int(minor)) >= (5, 14)


def mount_folder(folder: str, size: int, owner: int) -> None:
    """Put a file system in memory of `size` bytes on `folder`.

    Raises:
        OSError: the kernel refuses.
    """
    options = f"size={size},nr_inodes=4096,mode=0700,uid={owner},gid={owner}"
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def mount_privately() -> None:
    """Give this process mounts of its own, and a new /proc where that is allowed.

    Called in the PID namespace's init, so that its parent keeps the /proc that shows everything.

    Raises:
        OSError: the kernel refuses.
    """
    _checked(_libc.unshare(_CLONE_NEWNS))
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, "")
    # A container masks parts of its /proc; then no new one may be mounted.
    with contextlib.suppress(PermissionError):
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "")


def open_the_way(folders: Iterable[str]) -> None:
    """Make folders reachable for every user of this namespace, as a Python below /root is not.

    An empty file system covers the first folder on the way that others may not enter; the wanted
    folder is mounted again at its place in it. Nothing else below that folder can be seen then.

    Raises:
        OSError: the kernel refuses.
    """
    behind = {
        folder: (closed, os.open(folder, os.O_PATH | os.O_CLOEXEC))
        for folder in folders
        if (closed := _closed_ancestor(folder)) is not None
    }
    for closed in sorted({closed for closed, _ in behind.values()}):
        _mount("tmpfs", closed, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755")
    for folder, (_, handle) in behind.items():
        os.makedirs(folder, exist_ok=True)
        _mount(f"/proc/self/fd/{handle}", folder, None, _MS_BIND | _MS_REC, "")
        os.close(handle)


def _closed_ancestor(folder: str) -> str | None:
    """The first folder above `folder` that other users may not enter."""
    for ancestor in reversed(Path(folder).parents):
        if not ancestor.stat().st_mode & stat.S_IXOTH:
            return str(ancestor)
    return None


def landlock_version() -> int:
    """The kernel's Landlock version; 0 if it has none."""
    version = _libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    return max(0, int(version))


def landlock_names(version: int) -> set[str]:
    """What `restrict_files` does with this version, as `Execution.isolation` names it."""
    since = {"landlock": 1, "landlock-tcp": _SINCE_TCP, "landlock-signals": _SINCE_SCOPES}
    return {name for name, first in since.items() if version >= first}


def restrict_files(
    version: int, writable: str, readable: Iterable[str], devices: Iterable[str]
) -> None:
    """Let this process and its descendants touch only what is named, and no TCP or outside process.

    Needs `gain_no_privileges` first. Paths that do not exist are skipped.

    Raises:
        OSError: the kernel refuses.
    """
    rights = sum(bits for since, bits in _FILE_RIGHTS.items() if version >= since)
    attributes = _Ruleset(
        rights,
        _BIND_AND_CONNECT_TCP if version >= _SINCE_TCP else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SINCE_SCOPES else 0,
    )
    ruleset = _checked(
        _libc.syscall(
            _LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), ctypes.sizeof(attributes), 0
        )
    )
    _allow(ruleset, writable, rights & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL))
    for path in readable:
        _allow(ruleset, path, rights & (_EXECUTE | _READ_FILE | _READ_DIR))
    for path in devices:
        _allow(ruleset, path, rights & (_READ_FILE | _WRITE_FILE | _TRUNCATE))
    _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= _ONLY_FOR_FILES
        rule = _PathBeneath(rights, handle)
        _checked(
            _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
        )
    finally:
        os.close(handle)


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _mount(source: str, target: str, kind: str | None, flags: int, options: str) -> None:
    _checked(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode(),
        )
    )


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
