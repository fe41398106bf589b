"""Selection alone, compared with `flashinfer.top_k` on the same keys.

    python -m benchmarks.selection [--json results.json]

The victims must be the same columns. Times are the device's, without launches; ratios are
flashinfer's over ours, in one run. It needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vase_kernels.scoring import SCORING

from benchmarks.device_clock import device_seconds
from benchmarks.eviction_case import Case, Shape
from benchmarks.kernels import add_shape_options, shapes, write
from benchmarks.results import new_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape_options(parser)
    args = parser.parse_args()
    require_flashinfer()
    torch.manual_seed(0)
    report = new_report("flashinfer", {"threads": torch.get_num_threads()}) | {"results": []}
    for shape in shapes(args):
        row = compare_with_flashinfer(shape, args.repeats, torch.device("cuda"))
        numbers = (f"{k} {x:.3g}" for k, x in row.items() if isinstance(x, float))
        print(f"B {row['budget']:5} due {row['requests']:3}", *numbers, flush=True)
        report["results"].append(row)
        write(args.json, report)


def compare_with_flashinfer(shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """Selection of the window's victims among budget keys of every layer, head and request.

    Ours leaves the last victim of each row, flashinfer lists the columns of all: what the next
    step of each needs. `SystemExit` if the victims are not the same columns.
    """
    import flashinfer  # type: ignore[import-not-found, unused-ignore]

    r = Case(shape, "random", device).round()
    SCORING[r.policy](r)
    rows = shape.requests * shape.layers * shape.kv_heads
    order = r.workspace.order.view(rows, -1)[:, : shape.budget]
    keys = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    lowest_first = (-keys).contiguous()

    def theirs(*, deterministic: bool) -> Tensor:
        tie_break = flashinfer.TopKTieBreak.SMALL if deterministic else flashinfer.TopKTieBreak.NONE
        columns: Tensor = flashinfer.top_k(
            lowest_first, shape.window, deterministic=deterministic, tie_break=tie_break
        )[1]
        return columns

    r.select(victims=True)
    # Positions are columns here, so both break ties alike.
    position = torch.arange(shape.budget, device=device)
    packed = (order.to(torch.int64) << 32) | position
    ours = packed <= r.workspace.edges.view(rows, 1)
    listed = torch.zeros_like(ours).scatter_(1, theirs(deterministic=True).to(torch.int64), True)
    if not torch.equal(ours, listed):
        raise SystemExit(f"{shape}: flashinfer.top_k and select_kernel chose different victims")
    elapsed = device_seconds(lambda: r.select(victims=True), repeats)
    out: dict[str, Any] = {**dataclasses.asdict(shape), "select_ms": elapsed * 1e3}
    for name, deterministic in (("flashinfer_ms", True), ("flashinfer_any_tie_ms", False)):
        elapsed = device_seconds(partial(theirs, deterministic=deterministic), repeats)
        out[name] = elapsed * 1e3
        out[f"{name[:-3]}_over_select"] = out[name] / out["select_ms"]
    return out


def require_flashinfer() -> None:
    """`SystemExit` that says what is missing."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "this needs a GPU: flashinfer has no CPU kernels, and on a CPU ours are only "
            "interpreted; nothing was compared"
        )
    if importlib.util.find_spec("flashinfer") is None:
        raise SystemExit(
            "this needs flashinfer: pip install flashinfer-python==0.7.2, the version that "
            "SGLang 0.5.23 pins"
        )


if __name__ == "__main__":
    main()
