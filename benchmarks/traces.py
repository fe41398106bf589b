"""GPU kernels in a trace of SGLang's profiler, summed by what they are for."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import defaultdict
from pathlib import Path

import aiohttp

#: Triton kernels of `vase_kernels` by name; all others are the model's and the engine's.
GROUPS = {
    **dict.fromkeys(
        (
            *("lse_kernel", "weights_kernel", "draw_kernel", "dkv_kernel", "similarity_kernel"),
            *("mix_kernel", "ranges_kernel", "norms_kernel", "simple_kernel", "snapkv_kernel"),
        ),
        "eviction: scoring",
    ),
    "select_kernel": "eviction: select",
    "plan_kernel": "eviction: plan and digest",
    "move_kernel": "eviction: overwrite",
    "copy_kernel": "eviction: copy of shared prompts",
    "store_kernel": "query ring",
}
OTHER = "model and engine"
_WRITE_SECONDS = 120


async def record(url: str, folder: Path, *, steps: int) -> Path:
    """Trace `steps` forward passes of the worker. Raises RuntimeError if no trace appears."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"output_dir": str(folder), "num_steps": steps, "activities": ["GPU"]}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/start_profile", json=body) as response,
    ):
        response.raise_for_status()
    size = -1
    for _ in range(_WRITE_SECONDS):
        await asyncio.sleep(1)
        for path in folder.rglob("*.trace.json.gz"):
            if path.stat().st_size == size:  # written to its end
                return path
            size = path.stat().st_size
    raise RuntimeError(f"the profiler wrote no trace within {_WRITE_SECONDS} s")


def kernel_seconds(path: Path) -> dict[str, float]:
    """Seconds of GPU kernels by group. Raises ValueError if the trace holds none."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "kernel":
            totals[GROUPS.get(event["name"], OTHER)] += event["dur"] / 1e6
    if not totals:
        raise ValueError(f"{path.name} holds no GPU kernel")
    return dict(totals)
