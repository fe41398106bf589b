"""Between host and device, without waiting."""

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


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A host copy that is complete when the step's tokens are: same stream, copied before them."""
    if values.device.type == "cpu":
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
