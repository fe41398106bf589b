"""How many instructions a round of each policy is, counted where they are executed: no GPU.

    python -m benchmarks.instructions [--policies vase-attnv knorm] [--budget 2048]

Bytes and products are the least that a round could take; what a kernel does beside them is only
seen in what it was compiled to. Here the PTX for sm_90 of one round of one request, layer and KV
head (Qwen3-14B's shape) is executed by the emulator of `tests.ptx` and every instruction of a warp
is counted. The numbers follow from the kernels and the compiler alone, not from the machine. What
the assembler makes of the PTX differs by some tenths either way.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
import vase_kernels
from vase_kernels.evict import POLICIES

from benchmarks.eviction_case import Case, Shape
from benchmarks.results import FOLDER, Report, finish, new_report, number, table
from tests.ptx.launcher import executed_ptx
from vase_sgl.engine.source_digest import digest_of

#: One place of Qwen3-14B: counts of others are multiples.
PLACE = Shape(layers=1, kv_heads=1, group=5, head_dim=128, window=64, budget=2048, requests=1)


def kernels_digest() -> str:
    """Of the code that is counted."""
    return digest_of(Path(vase_kernels.__file__).parent)


def count(policy: str, shape: Shape) -> dict[str, int]:
    """Instructions of warps by kernel, of one round after the first."""
    torch.manual_seed(0)
    with executed_ptx() as launcher:
        case = Case(shape, policy, torch.device("cpu"))
        case.advance()
        case.kernels(case.round())()
    if launcher.races:
        raise SystemExit(f"{policy}: {launcher.races[0]}")
    return dict(launcher.issued)


def markdown(report: Report) -> str:
    rows = report["samples"]
    kernels = list(dict.fromkeys(name for row in rows for name in row["issued"]))
    return table(
        ("thousands of warp instructions", "all", *(x.removesuffix("_kernel") for x in kernels)),
        [
            (
                row["policy"],
                number(sum(row["issued"].values()) / 1e3),
                *(number(row["issued"][x] / 1e3) if x in row["issued"] else "" for x in kernels),
            )
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--budget", type=int, default=PLACE.budget)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    chosen = parser.parse_args()
    shape = dataclasses.replace(PLACE, budget=chosen.budget)
    report = new_report("instructions", dataclasses.asdict(shape))
    report |= {"kernels": kernels_digest(), "samples": []}
    for policy in chosen.policies:
        began = time.monotonic()
        issued = count(policy, shape)
        report["samples"].append({"policy": policy, "issued": issued})
        print(f"{policy}: {sum(issued.values()):,}, {time.monotonic() - began:.0f} s", flush=True)
    return finish(report, chosen.folder, "instructions", markdown=markdown)


if __name__ == "__main__":
    raise SystemExit(main())
