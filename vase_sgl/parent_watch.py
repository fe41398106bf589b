"""A child process that must not outlive its parent, not even a parent that was killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

#: Set by a parent for its child: the child ends when the process with this id is gone.
PARENT_PID = "VASE_PARENT_PID"

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 15.0


def end_with_parent() -> None:
    """Get SIGTERM when the parent named in the environment is gone, and end for good after 15 s.

    Without the variable, or if its process is not the parent (the variable was inherited from
    further up), nothing happens. On Linux the kernel sends the signal at once; elsewhere a thread
    finds out within half a second.
    """
    text = os.environ.pop(PARENT_PID, None)
    if text is None or not text.isdecimal() or int(text) != os.getppid():
        return
    parent = int(text)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="vase-parent-watch", daemon=True).start()
