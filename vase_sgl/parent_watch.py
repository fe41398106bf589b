"""A child process that must not outlive its parent, not even a parent that was killed.

The child reads from a pipe into which nobody writes: its end is the parent's. So it also learns
of a parent that was gone before it looked, whose process id another process may have by then.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import stat
import threading
import time

#: Set by a parent for its child: descriptor and inode of the pipe.
PARENT_PIPE = "VASE_PARENT_PIPE"

_GRACE_SECONDS = 15.0


def for_child() -> tuple[int, dict[str, str]]:
    """What a child needs that calls `end_with_parent`: a descriptor to pass, and environment."""
    descriptor = _pipe(os.getpid())
    return descriptor, {PARENT_PIPE: f"{descriptor}:{os.fstat(descriptor).st_ino}"}


@functools.cache
def _pipe(pid: int) -> int:
    """The end to read from of that process's pipe. The other one closes with the process alone."""
    descriptor, other = os.pipe()
    held = os.fdopen(other, "wb", buffering=0)
    os.register_at_fork(after_in_child=held.close)
    return descriptor


def end_with_parent() -> None:
    """Get SIGTERM when the process that passed a pipe is gone, and end for good 15 s later.

    Without the pipe nothing happens, also if the variable is there: it was inherited from further
    up.
    """
    descriptor = _passed(os.environ.pop(PARENT_PIPE, ""))
    if descriptor is None:
        return
    os.set_inheritable(descriptor, False)

    def watch() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="vase-parent-watch", daemon=True).start()


def _passed(text: str) -> int | None:
    """The descriptor, if it still is of that pipe."""
    match = re.fullmatch(r"(\d{1,9}):(\d+)", text)
    if match is None:
        return None
    descriptor, inode = int(match[1]), int(match[2])
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return descriptor if stat.S_ISFIFO(found.st_mode) and found.st_ino == inode else None
