"""Host values on their way to the device."""

from __future__ import annotations

import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` on `device`, without waiting for it.

    A copy from ordinary memory would hold the host until everything queued before it is done, the
    running forward included. PyTorch keeps the pinned memory alive until the copy has happened.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
