"""Imported by the fork server, and by nobody else: everything that its children need."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

_PR_SET_PDEATHSIG = 1
_MAIN = os.getppid()


def _pass_on(number: int, frame: FrameType | None) -> None:
    os.kill(_MAIN, number)


# Before the imports: the main process may end while they run.
ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != _MAIN:
    os._exit(1)
signal.signal(signal.SIGQUIT, _pass_on)

declare_torchvision_operators()

from sglang.srt.managers import detokenizer_manager, scheduler  # noqa: E402, F401
from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.utils.common import set_ulimit  # noqa: E402

load_plugins()
set_ulimit()
