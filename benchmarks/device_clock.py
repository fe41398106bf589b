"""How long work takes on a device, and how fast the device copies and multiplies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

#: Of a GPU's clock, so a millisecond: longer than the launches of a round take.
_SLEEP_CYCLES = 2_000_000
#: Twice the L2 of any GPU so far, and more.
_FLUSH_BYTES = 256 * 2**20


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flush_l2(device: torch.device) -> None:
    """Fill a GPU's L2 with other bytes, so that what runs next finds its own in memory."""
    if device.type == "cuda":
        torch.zeros(_FLUSH_BYTES, dtype=torch.uint8, device=device)


def seconds(
    step: Callable[[], Any], repeats: int, *, before: Callable[[], None] = lambda: None
) -> float:
    """Median time of a call, after one to warm up; `before` comes before each and is not timed."""

    def timed() -> float:
        before()
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        return time.perf_counter() - started

    timed()
    return statistics.median(timed() for _ in range(repeats))


def device_seconds(
    step: Callable[[], Any], repeats: int, *, before: Callable[[], None] = lambda: None
) -> float:
    """`seconds` of a GPU alone: it sleeps until the call's kernels wait behind one another.

    `step` must not wait for the device. Without a GPU, `seconds`.
    """
    if not torch.cuda.is_available():
        return seconds(step, repeats, before=before)

    def timed() -> float:
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    timed()
    return statistics.median(timed() for _ in range(repeats))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(lambda: target.copy_(source), 10)


def tensor_rate(device: torch.device) -> float:
    """Multiplications and additions per second of a large bfloat16 product."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / device_seconds(lambda: a @ b, 10)
