"""Time of one eviction round: the kernels, the torch reference, and a gather of the whole cache.

    python -m benchmarks.kernels --check [--policies rkv knorm] [--json results.json]
    python -m benchmarks.kernels --check-only [--policies rkv knorm]

(`python benchmarks/kernels.py` is the same.)

Shapes are Qwen3-14B's: 40 layers, 8 KV heads, groups of 5, head_dim 128, bfloat16, window 64. A
round is in steady state: budget + window rows become budget rows. `floor` is the time in which
the bytes that must move could be copied at the copy bandwidth measured on this device. Without a
GPU only the torch reference runs, on one layer and one request.

Every time is from the call to the end of its last kernel, on a device that was idle: small rounds
wait for their launches, as they do in the engine unless the device is busy. `device` is the time
of the kernels alone, all launched before the first may begin; the share is floor / device.

With --check kernels and reference must forget the same tokens before anything is timed; with
--check-only nothing is.

Bytes that must move, per request, layer and head (`Shape.floor_bytes`), for rows of head_dim
elements:

    candidates' rows read once   K and V: vase-attnv, vase-dkv, curdkv; K: snapkv, rkv, knorm;
                                 V: evict-largest-values; none: random, streaming
    query rows read once         group * window: vase-attnv, snapkv, rkv
    rows moved                   window of K and V, read and written: all
    words                        a key written and read, 4 bytes each, per candidate: all

Bytes are not all: what the kernels ask of the tensor cores is counted too
(`Shape.tensor_operations`), and set against a large matrix product on this device.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from vase_kernels.evict import POLICIES

if not __package__:  # run as a file: what is imported lies beside its folder, not in it
    sys.path[0] = str(Path(__file__).parents[1])
from benchmarks.device_clock import copy_bandwidth, device_seconds, seconds, tensor_rate
from benchmarks.environment import machine_line
from benchmarks.eviction_case import Case, Shape
from benchmarks.results import Report, new_report, number, table

#: The interpreter counts as a device for the kernels, to try this file on tiny shapes.
RUNS_KERNELS = torch.cuda.is_available() or triton.knobs.runtime.interpret
#: The comparison needs all of a layer's scores at once; larger cases would not say more.
MAX_COMPARED_ROWS = 40_000


def kernels_seconds(case: Case, repeats: int, clock: Callable[..., float] = seconds) -> float:
    """Time of a round by the kernels. `SystemExit` if the last did not overwrite `window` rows."""
    r, window = case.round(), case.shape.window
    found = clock(case.kernels(r), repeats, before=case.advance)
    holes = r.workspace.num_holes
    if not torch.equal(holes, torch.full_like(holes, window)):
        raise SystemExit(
            f"{case.policy}: a head forgot {int(holes.min())} to {int(holes.max())} tokens instead "
            f"of {window}; such a round says nothing about time"
        )
    return found


def measure(
    case: Case, repeats: int, bandwidth: float, operations_per_second: float | None = None
) -> dict[str, Any]:
    shape, policy = case.shape, case.policy
    floor = shape.floor_bytes(policy)
    out: dict[str, Any] = {
        "policy": policy,
        **dataclasses.asdict(shape),
        "floor_gb": floor / 1e9,
        "floor_ms": floor / bandwidth * 1e3,
    }
    if operations_per_second and (operations := shape.tensor_operations(policy)):
        out["tensor_floor_ms"] = operations / operations_per_second * 1e3
    if RUNS_KERNELS:
        out["kernels_ms"] = kernels_seconds(case, repeats) * 1e3
        elapsed = kernels_seconds(case, repeats, device_seconds)
        out["device_ms"] = elapsed * 1e3
        out["gb_per_s"] = floor / elapsed / 1e9
        out["share_of_floor"] = floor / bandwidth / elapsed
    if shape.requests * shape.columns <= MAX_COMPARED_ROWS:
        fewer = max(1, repeats // 10)
        out["reference_ms"] = seconds(case.reference(), fewer, before=case.advance) * 1e3
        if RUNS_KERNELS:
            out["gather_all_ms"] = seconds(case.gather_all(), fewer, before=case.advance) * 1e3
    return out


def checked(policy: str, device: torch.device) -> Case:
    """What is compared: the same numbers on every device, of which none are nearly a tie.

    Sums in another order would decide one otherwise, and be wrong for no reason.
    """
    torch.manual_seed(3)
    cpu = torch.device("cpu")
    return Case(Shape(2, 2, 5, 128, 16, 128, 2), policy, device, drawn_on=cpu)


def check(policies: Sequence[str], device: torch.device) -> None:
    """Kernels and reference forget the same tokens, on a small pool; `SystemExit` if not."""
    if not RUNS_KERNELS:
        raise SystemExit("--check-only needs a GPU, or TRITON_INTERPRET=1: nothing was compared")
    for policy in policies:
        case = checked(policy, device)
        k, v = ([x.clone() for x in side] for side in (case.k, case.v))
        positions = case.positions.clone()
        expected = case.reference()()
        case.k, case.v, case.positions = k, v, positions
        if not torch.equal(case.kernels(case.round())(), expected):
            raise SystemExit(f"{policy}: digests of kernels and reference differ")
    print("check: kernels and reference forget the same tokens")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Which cases are measured, how often, and where the results go."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--layers", type=int, default=40 if gpu else 1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64] if gpu else [1])
    parser.add_argument("--repeats", type=int, default=30 if gpu else 3)


def shapes(args: argparse.Namespace) -> Iterator[Shape]:
    """Cases that fit the device."""
    base = Shape(args.layers, 8, 5, 128, 64, 0, 0)
    for budget, requests in itertools.product(args.budgets, args.requests):
        shape = dataclasses.replace(base, budget=budget, requests=requests)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what torch keeps of the case before would count as taken
            free, _ = torch.cuda.mem_get_info()
            if shape.pool_bytes * 1.3 > free:
                print(f"B {budget}, {requests} requests: pool does not fit", file=sys.stderr)
                continue
        yield shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare results before timing")
    mode.add_argument("--check-only", action="store_true", help="compare results, time nothing")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    add_shape_options(parser)
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    if args.check_only:
        check(args.policies, device)
        return
    if not gpu:
        print("no GPU: times below are the torch reference's on this CPU, not the kernels'")
    if args.check and RUNS_KERNELS:
        check(args.policies, device)
    bandwidth = copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    operations = tensor_rate(device) if gpu else None
    report = new_report("kernels", {"threads": torch.get_num_threads()})
    report |= {
        "copy_bytes_per_s": bandwidth,
        "tensor_operations_per_s": operations,
        "results": [],
    }
    for policy, shape in itertools.product(args.policies, list(shapes(args))):
        row = measure(Case(shape, policy, device), args.repeats, bandwidth, operations)
        report["results"].append(row)
        write(args.json, report)
        numbers = (f"{k} {x:.3g}" for k, x in row.items() if isinstance(x, float))
        print(f"{policy:20} B {shape.budget:5} due {shape.requests:3}", *numbers, flush=True)


def markdown(report: Report) -> str:
    """The table of a report of this or of `benchmarks.selection`, with the columns that it has."""
    columns = {
        "kernels_ms": "kernels ms",
        "device_ms": "without launches, ms",
        "reference_ms": "torch reference ms",
        "gather_all_ms": "gather all ms",
        "floor_gb": "GB",
        "floor_ms": "floor ms",
        "tensor_floor_ms": "tensor cores alone, ms",
        "gb_per_s": "GB/s",
        "share_of_floor": "share of copy bandwidth",
        "select_ms": "select ms",
        "flashinfer_over_select": "flashinfer over select",
        "flashinfer_any_tie_over_select": "flashinfer, any tie, over select",
    }
    rows = report["results"]
    found = {key: head for key, head in columns.items() if any(key in row for row in rows)}
    bandwidth = report.get("copy_bytes_per_s")
    said = f"Copy bandwidth {bandwidth / 1e9:.0f} GB/s. " if bandwidth else ""
    return f"{said}{machine_line(report['environment'])}.\n\n" + table(
        ("policy", "layers", "budget", "requests due", *found.values()),
        [
            (
                *(row.get("policy", "select alone"), row["layers"]),
                *(f"{row['budget']:,}", row["requests"]),
                *(number(row.get(key)) for key in found),
            )
            for row in rows
        ],
    )


def write(path: Path | None, report: Report) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
