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
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from vase_kernels.evict import POLICIES, PoolView, evict
from vase_kernels.reference import SCORERS, Candidates, evict_reference, select_victims_batched
from vase_kernels.requests import (
    LOGICAL_LENGTH,
    MAX_PROJECTION,
    ROUND,
    SEED,
    DueRequest,
    pack,
    table_fields,
)
from vase_kernels.scoring import Round
from vase_kernels.workspace import Maxima, Workspace

from vase_sgl.eviction import POLICIES as POLICY_CLASSES

if not __package__:  # run as a file: what is imported lies beside its folder, not in it
    sys.path[0] = str(Path(__file__).parents[1])
from benchmarks.environment import machine_line
from benchmarks.results import Report, new_report, number, table

#: The interpreter counts as a device for the kernels, to try this file on tiny shapes.
RUNS_KERNELS = torch.cuda.is_available() or triton.knobs.runtime.interpret
#: Of a GPU's clock, so a millisecond: longer than the launches of a round take.
_SLEEP_CYCLES = 2_000_000
#: The comparison needs all of a layer's scores at once; larger cases would not say more.
MAX_COMPARED_ROWS = 40_000


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    kv_heads: int
    group: int
    head_dim: int
    window: int
    budget: int
    requests: int

    @property
    def columns(self) -> int:
        return self.budget + self.window

    @property
    def places(self) -> int:
        """Requests times layers times KV heads."""
        return self.requests * self.layers * self.kv_heads

    @property
    def pool_bytes(self) -> int:
        return 2 * self.places * self.columns * self.head_dim * 2

    def floor_bytes(self, policy: str) -> int:
        """Bytes that a round of all requests must move, as the head of this file counts them."""
        reads, row = SCORERS[policy], self.head_dim * 2
        candidates = (reads.reads_keys + reads.reads_values) * self.budget * row
        queries = reads.reads_queries * self.group * self.window * row
        moved = 4 * self.window * row
        words = 8 * self.budget
        return self.places * (candidates + queries + moved + words)

    def tensor_operations(self, policy: str) -> int:
        """Multiplications and additions of the kernels' matrix products in a round of bfloat16."""
        if SCORERS[policy].reads_queries:  # once for the sums, once for the weights
            return self.places * 4 * self.budget * self.group * self.window * self.head_dim
        if policy in ("vase-dkv", "curdkv"):  # K and V by each of the three parts of G
            return self.places * 12 * self.budget * self.head_dim * MAX_PROJECTION
        return 0

    def exponentials(self, policy: str) -> int:
        """Of the kernels' softmax in a round, both passes."""
        reads = SCORERS[policy].reads_queries
        return self.places * 2 * reads * self.budget * self.group * self.window


class Case:
    """A filled pool in its second round, and the ways to carry out a round.

    Between two rounds `advance` must be called: tokens that come have positions of their own.
    """

    def __init__(self, shape: Shape, policy: str, device: torch.device) -> None:
        self.shape, self.policy = shape, policy
        n, columns = shape.requests, shape.columns
        slots = torch.randperm(n * columns, device=device).to(torch.int32)
        self.req_to_token = slots.view(n, columns)
        rows = (n * columns, shape.kv_heads, shape.head_dim)
        self.k, self.v = (
            [torch.randn(rows, device=device, dtype=torch.bfloat16) for _ in range(shape.layers)]
            for _ in range(2)
        )
        self.positions = torch.zeros(
            shape.layers, n * columns, shape.kv_heads, dtype=torch.int32, device=device
        )
        order = torch.arange(columns, dtype=torch.int32, device=device)
        self.positions[:, self.req_to_token.long()] = order[None, None, :, None]
        self.ring = torch.randn(
            shape.layers,
            n,
            shape.window,
            shape.kv_heads * shape.group,
            shape.head_dim,
            device=device,
            dtype=torch.bfloat16,
        )
        requests = [
            DueRequest(
                row=i,
                ring_row=i,
                length=columns,
                budget=shape.budget,
                window=shape.window,
                round=2,
                logical_length=columns,
                seed=i,
                **table_fields(shape.budget, POLICY_CLASSES[policy]().fields()),
            )
            for i in range(n)
        ]
        self.table = pack(requests, n).to(device)

    def advance(self) -> None:
        """Since the last round `window` tokens have come to every request, so the next is due.

        `window` is also the length of the query ring, so its rows stay in the order of tokens.
        """
        self.table[:, ROUND.value] += 1
        self.table[:, LOGICAL_LENGTH.value] += self.shape.window
        recent = self.req_to_token[:, self.shape.budget :].long()
        for buffer in (*self.k, *self.v):
            # Copies of the rows that came before would tie with them, and ties cost time.
            buffer[recent] = torch.randn_like(buffer[recent])

    def round(self) -> Round:
        """What the kernels are launched with."""
        shape = self.shape
        view = PoolView.of(self.k, self.v, self.positions, self.req_to_token)
        maxima = Maxima(shape.requests, shape.columns, shape.budget, shape.window, shape.group)
        workspace = Workspace(
            maxima, layers=shape.layers, kv_heads=shape.kv_heads, device=self.table.device
        )
        return Round(self.policy, view, self.table, self.ring, workspace)

    def kernels(self, r: Round) -> Callable[[], Tensor]:
        return lambda: evict(r.policy, r.pool, r.requests, r.queries, r.workspace).round_sums

    def reference(self) -> Callable[[], Tensor]:
        """`evict_reference` on the same device."""
        return lambda: (
            evict_reference(
                self.policy,
                self.k,
                self.v,
                self.positions,
                self.req_to_token,
                self._queries(),
                budget=self.shape.budget,
                window=self.shape.window,
                **self._counters(),
            ).round_sums
        )

    def gather_all(self) -> Callable[[], Tensor]:
        """Score alike, then gather every kept row and copy it back, as VaSE's own code does."""

        def step() -> Tensor:
            shape, n = self.shape, self.shape.requests
            slots, queries, counters = self.req_to_token.long(), self._queries(), self._counters()
            older = slots[:, : shape.budget]
            heads = torch.arange(shape.kv_heads, device=slots.device)
            victims = slots
            for layer in range(shape.layers):
                k, v = (x[layer][older].transpose(1, 2) for x in (self.k, self.v))
                candidates = Candidates(
                    keys=(k,),
                    values=(v,),
                    queries=queries[:, layer, None],
                    positions=self.positions[layer][older].transpose(1, 2)[:, None].long(),
                    seed=counters["seeds"],
                    round=counters["rounds"],
                    layers=torch.tensor([layer], device=slots.device),
                    heads=heads,
                )
                victims = select_victims_batched(
                    self.policy, candidates, shape.window, budget=shape.budget
                )
                gone = torch.zeros(
                    n, shape.kv_heads, shape.columns, dtype=torch.bool, device=slots.device
                ).scatter_(-1, victims[:, 0], True)
                kept = gone.to(torch.uint8).argsort(dim=-1, stable=True)[..., : shape.budget]
                source = slots[:, None].expand_as(gone).gather(-1, kept)
                for buffer in (self.k[layer], self.v[layer]):
                    rows = buffer[source, heads[None, :, None]]
                    buffer[older] = rows.transpose(1, 2)
            return victims

        return step

    def _queries(self) -> Tensor:
        return self.ring.permute(1, 0, 3, 2, 4)

    def _counters(self) -> dict[str, Any]:
        """Columns of the table by the reference's names."""
        columns = {"rounds": ROUND, "logical_lengths": LOGICAL_LENGTH, "seeds": SEED}
        return {name: self.table[:, column.value] for name, column in columns.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def measure(
    case: Case, repeats: int, bandwidth: float, operations_per_second: float | None = None
) -> dict[str, Any]:
    shape, policy = case.shape, case.policy
    floor = shape.floor_bytes(policy)
    out: dict[str, Any] = {
        "policy": policy,
        **dataclasses.asdict(shape),
        "floor_bytes": floor,
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


def check(policies: Sequence[str], device: torch.device) -> None:
    """Kernels and reference forget the same tokens, on a small pool; `SystemExit` if not."""
    if not RUNS_KERNELS:
        raise SystemExit("--check-only needs a GPU, or TRITON_INTERPRET=1: nothing was compared")
    shape = Shape(2, 2, 5, 128, 16, 128, 2)
    for policy in policies:
        case = Case(shape, policy, device)
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
        "floor_ms": "floor ms",
        "tensor_floor_ms": "tensor cores alone, ms",
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
