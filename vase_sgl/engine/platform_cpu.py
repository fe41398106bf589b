"""A plain CPU as an SGLang platform (entry point group `sglang.srt.platforms`).

Upstream's own CPU platform needs `sgl_kernel` built for CPU; this one runs on what PyPI installs:
torch_native attention, PyTorch sampling.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree CPU platform without compiled SGLang kernels."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False


def is_active() -> bool:
    """True if this platform serves.

    An activated out-of-tree platform would win over CUDA and every other one, so it stays away
    from machines with an accelerator, and where SGLang's own CPU engine was asked for.
    """
    # Read here: SGLang's own helper resolves the platform when it is imported.
    upstream = os.environ.get("SGLANG_USE_CPU_ENGINE", "").lower() in ("1", "true")
    return not torch.accelerator.is_available() and not upstream


def activate() -> str | None:
    """Entry point. None leaves the machine's accelerator to SGLang's own platforms."""
    return f"{__name__}:{PlainCpuPlatform.__qualname__}" if is_active() else None
