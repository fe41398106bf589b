"""Which block shapes of the kernels are fastest on this device: each against those in use.

    python -m benchmarks.tuning [--json results.json] [--policies vase-attnv] [--requests 1 16]

Shapes are those of `benchmarks.kernels`. A choice and the shapes in use take turns, and its ratio
is of their whole rounds, without launches, so that what a kernel gains is seen for what it is
worth. Below 1 is faster. It changes nothing: shapes in use are constants of `vase_kernels.scoring`,
for the sums of attention follow them, and an answer must not depend on what a server found fastest
when it started.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]
from vase_kernels import scoring
from vase_kernels.reference import SCORERS
from vase_kernels.scoring import AttentionBlocks, ProjectionBlock

from benchmarks.device_clock import device_seconds
from benchmarks.eviction_case import Case, Shape
from benchmarks.kernels import add_shape_options, kernels_seconds, shapes, write
from benchmarks.results import Report, new_report, number, table

POLICIES = ("vase-attnv", "vase-dkv", "knorm", "random")
_ATTENTION = (
    AttentionBlocks(64, 64, 4),
    AttentionBlocks(64, 64, 4, stages=3),
    AttentionBlocks(128, 64, 4),
    AttentionBlocks(128, 64, 8),
    AttentionBlocks(128, 64, 8, stages=3),
    AttentionBlocks(64, 128, 4),
    AttentionBlocks(64, 128, 8),
    AttentionBlocks(64, 128, 8, stages=3),
    AttentionBlocks(128, 128, 8),
    AttentionBlocks(64, 256, 8),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """name: what is told. attributes: of `vase_kernels.scoring` while it is measured."""

    name: str
    attributes: dict[str, Any]


def choices(policy: str, shape: Shape) -> Iterator[Choice]:
    """One change at a time to what the rounds of a policy are launched with."""
    reads = SCORERS[policy]
    if reads.reads_queries:
        pair_in_use = scoring.attention_blocks(shape.head_dim, torch.bfloat16)
        for kernel, blocks in itertools.product((0, 1), _ATTENTION):
            if blocks != pair_in_use[kernel]:
                pair = tuple(blocks if i == kernel else pair_in_use[i] for i in (0, 1))
                name = f"{('lse', 'weights')[kernel]} {tuple(blocks)}"
                yield Choice(name, {"attention_blocks": lambda *_, pair=pair: pair})
    if policy in ("vase-dkv", "curdkv"):
        yield from _numbers("SPLIT_DKV", 1, 2, 4)
        in_use = scoring.projection_block(shape.head_dim, torch.bfloat16)
        for columns, warps in itertools.product((32, 64, 128), (4, 8)):
            block = ProjectionBlock(columns, warps)
            if block != in_use:
                name = f"projection {tuple(block)}"
                yield Choice(name, {"projection_block": lambda *_, block=block: block})
    elif reads.reads_values or reads.reads_keys:
        yield from _numbers("BLOCK_ROWS", 32, 64, 128)
    yield from _numbers("SPLIT", 1, 2, 4, 8)
    yield from _numbers("BLOCK_COLUMNS", 512, 1024, 2048)


def _numbers(name: str, *values: int) -> Iterator[Choice]:
    for value in values:
        if value != getattr(scoring, name):
            yield Choice(f"{name} {value}", {name: value})


def measure(case: Case, choice: Choice, repeats: int, turns: int = 3) -> dict[str, Any]:
    """Ratio of a choice's round to one of the shapes in use, median over `turns` pairs."""
    out: dict[str, Any] = {
        "policy": case.policy,
        **dataclasses.asdict(case.shape),
        "choice": choice.name,
    }
    ratios = []
    try:
        for _ in range(turns):
            before = kernels_seconds(case, repeats, device_seconds)
            with mock.patch.multiple(scoring, **choice.attributes):
                ratios.append(kernels_seconds(case, repeats, device_seconds) / before)
    except OutOfResources as error:
        return out | {"refused": str(error)}
    return out | {"in_use_ms": before * 1e3, "ratios": ratios, "ratio": statistics.median(ratios)}


def markdown(report: Report) -> str:
    """Choices that are at least 2 % faster somewhere; the file has all."""
    found = [row for row in report["results"] if row.get("ratio", 1.0) <= 0.98]
    if not found:
        return f"None of {len(report['results'])} choices is 2 % faster than the shapes in use.\n"
    return table(
        ("policy", "budget", "requests due", "choice", "round over that in use"),
        [
            (
                *(row["policy"], f"{row['budget']:,}", row["requests"]),
                *(row["choice"], number(row["ratio"])),
            )
            for row in sorted(found, key=lambda row: row["ratio"])
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    add_shape_options(parser)
    parser.set_defaults(budgets=[2048], requests=[1, 16], repeats=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU: an interpreter's times say nothing of block shapes")
    torch.manual_seed(0)
    report = new_report("tuning", {"threads": torch.get_num_threads()}) | {"results": []}
    for policy, shape in itertools.product(args.policies, list(shapes(args))):
        case = Case(shape, policy, torch.device("cuda"))
        for choice in choices(policy, shape):
            row = measure(case, choice, args.repeats)
            report["results"].append(row)
            write(args.json, report)
            said = f"{row['ratio']:.3f}" if "ratio" in row else row["refused"]
            print(f"{policy:12} due {shape.requests:3} {choice.name:40} {said}", flush=True)


if __name__ == "__main__":
    main()
