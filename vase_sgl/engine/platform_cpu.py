"""A plain CPU as an SGLang platform (entry point group `sglang.srt.platforms`).

Upstream's own CPU platform needs `sgl_kernel` built for CPU; this one runs on what PyPI installs:
torch_native attention, PyTorch sampling.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from vase_sgl.engine.device import is_plain_cpu


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
    """True if this platform serves."""
    return is_plain_cpu()


def activate() -> str | None:
    """Entry point. None leaves the machine's accelerator to SGLang's own platforms."""
    return f"{__name__}:{PlainCpuPlatform.__qualname__}" if is_active() else None
