"""How long a worker takes from the start of its process to its first token, and where that goes.

    python -m benchmarks.startup --model-path MODEL [--against CHECKOUT] [--json results.json]

Each start is `vase-sgl worker` with the model in the page cache, and then a request for one token.
With --against, another checkout's worker is started in turn with this one's: the ratio of the two
is what says something, for wall time is this machine's at this moment. CPU seconds are less so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks import environment
from benchmarks.workers import started

#: The end of each phase, as SGLang's log tells it.
PHASES = {
    "imports and flags": r"server_args=",
    "children begin": r"Init parallel begin",
    "weights": r"Load weight end",
    "memory pools": r"Memory pool end",
    "engine": r"Engine startup timings",
    "warm-up begins": r"Prefill batch",
    "ready": r"The server is fired up",
}


@dataclasses.dataclass
class Start:
    """One start. Seconds since the process was started; memory in MiB, shared pages shared out.

    phases: none if the clock was set meanwhile.
    """

    health_seconds: float
    first_token_seconds: float
    cpu_seconds: float
    memory_mib: float
    phases: dict[str, float]


def start(checkout: Path, model: Path, log: Path) -> Start:
    """Start a worker, ask it for a token, stop it. Raises `SystemExit` if it does not start."""
    path = os.pathsep.join((str(checkout), str(checkout / "kernels")))
    command = (sys.executable, "-m", "vase_sgl.cli", "worker", "--model-path", str(model))
    began, began_wall = time.monotonic(), time.time()
    with started(command, log, folder=checkout, env={"PYTHONPATH": path}) as worker:
        worker.wait_until_healthy()
        ready = time.monotonic() - began
        body = {"text": "The sea", "sampling_params": {"max_new_tokens": 1}}
        request = urllib.request.Request(
            f"{worker.url}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert len(json.load(answer)["output_ids"]) == 1
        first = time.monotonic() - began
        main = psutil.Process(worker.pid)
        family = (main, *main.children(recursive=True))
        # The log's times are of the wall clock: no durations, if that was set meanwhile.
        set_by = time.time() - began_wall - (time.monotonic() - began)
        return Start(
            ready,
            first,
            sum(sum(process.cpu_times()[:2]) for process in family),
            sum(process.memory_full_info().pss for process in family) / 2**20,
            phases(log.read_text(), began_wall) if abs(set_by) < 1 else {},
        )


def phases(log: str, began: float) -> dict[str, float]:
    """When each phase ended, to the second, as far as the log tells."""
    found = {}
    for name, pattern in PHASES.items():
        line = re.search(rf"^\[([\d-]+ [\d:]+)\].*{pattern}", log, re.MULTILINE)
        if line is not None:
            found[name] = datetime.fromisoformat(line[1]).timestamp() - began
    return found


def summary(starts: list[Start]) -> dict[str, Any]:
    """Medians of every measure, and every start."""

    def median(value: Callable[[Start], float]) -> float:
        return statistics.median(value(one) for one in starts)

    return {
        "first_token_seconds": median(lambda one: one.first_token_seconds),
        "health_seconds": median(lambda one: one.health_seconds),
        "cpu_seconds": median(lambda one: one.cpu_seconds),
        "memory_mib": median(lambda one: one.memory_mib),
        "phases": {
            name: statistics.median(one.phases[name] for one in starts)
            for name in PHASES
            if all(name in one.phases for one in starts)
        },
        "starts": [dataclasses.asdict(one) for one in starts],
    }


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table."""
    names = {
        "first_token_seconds": "first token, s",
        "health_seconds": "healthy, s",
        "cpu_seconds": "CPU, s",
        "memory_mib": "memory, MiB",
    }
    lines = [f"{'':20}" + "".join(f"{arm:>12}" for arm in results)]
    lines += [
        f"{text:20}" + "".join(f"{result[name]:12.1f}" for result in results.values())
        for name, text in names.items()
    ]
    for name in PHASES:
        ends = (result["phases"].get(name, math.nan) for result in results.values())
        lines.append(f"{'  ' + name:20}" + "".join(f"{end:12.1f}" for end in ends))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="another checkout, started in turn with this")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    model = options.model_path.resolve()
    arms = {"this": Path(__file__).resolve().parents[1]}
    if options.against is not None:
        arms["other"] = options.against.resolve()
    starts: dict[str, list[Start]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        # Once unmeasured: compiled bytecode, and the model in the page cache.
        for checkout in arms.values():
            start(checkout, model, Path(folder) / "worker.log")
        for _ in range(options.repeats):
            for name, checkout in arms.items():
                starts[name].append(start(checkout, model, Path(folder) / "log"))
    results = {name: summary(found) for name, found in starts.items()}
    print(report(results))
    if len(results) == 2:
        ratio = results["this"]["first_token_seconds"] / results["other"]["first_token_seconds"]
        print(f"this takes {ratio:.2f} of the other's time to the first token")
    if options.json is not None:
        told = {
            "environment": environment.describe(),
            "options": environment.options(options),
            "results": results,
        }
        options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
