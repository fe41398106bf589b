"""A main process with a fork server and a child, as the worker has them, without SGLang.

Prints what the child sees, and then a line for each SIGQUIT that reaches the main process.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time

from vase_sgl.engine import fork_server


def child() -> None:
    """As SGLang's: it dies with its parent, and sends that SIGQUIT when it fails."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    seen = {
        "late": os.environ.get("LATE"),
        "early": os.environ.get("EARLY"),
        "start_method": multiprocessing.get_start_method(),
        "quits": signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL,
        "pids": [os.getpid(), os.getppid()],
        "imported": "tests.engine.fork_server_preload" in sys.modules,
    }
    print(json.dumps(seen), flush=True)
    os.kill(os.getppid(), signal.SIGQUIT)
    time.sleep(60)


def main() -> None:
    signal.signal(signal.SIGQUIT, lambda number, frame: print("SIGQUIT", flush=True))
    os.environ["EARLY"] = "1"
    fork_server._PRELOAD = "tests.engine.fork_server_preload"
    fork_server.start("model")
    del os.environ["EARLY"]
    os.environ["LATE"] = "1"
    (*_, target), _ = fork_server.fork_schedulers(None, None, None, child)
    process = multiprocessing.Process(target=target)
    process.start()
    process.join()


if __name__ == "__main__":
    main()
