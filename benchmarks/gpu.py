"""Everything that needs a GPU, as one command: tests first, then every benchmark.

    python -m benchmarks.gpu                     # about an hour on an H100
    python -m benchmarks.gpu --only kernels paper_16384
    python -m benchmarks.gpu --dry-run           # anywhere: commands, configurations, result files
    python -m benchmarks.gpu --worker-arg=--attention-backend=flashinfer      # for every worker
    python -m benchmarks.gpu --within 9 --archive gpu.tar.gz    # as much as ends in nine minutes

Needs an environment with SGLang for CUDA, `pip install -e '.[gpu,bench]'` or those packages beside
a checkout, and no weights: models are shapes with random weights. Every stage is a command of its
own with a time limit (`--minutes`); what it wrote stays if it is cut. A stage that succeeded with
the same command, and a check also at the same commit without local changes, is not run again
(`--again` does), so that an interrupted run goes on where it was. Results: benchmarks/results/gpu/,
its state in state.json.

If a test fails, nothing is measured: fast wrong answers say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.attention_backend import require_backend
from benchmarks.environment import NO_COMMIT, ROOT, describe, on_gpu
from benchmarks.results import FOLDER

_MINUTES = 7.5
#: For a stage that is cut to stop its workers and write what it has.
_STOP_SECONDS = 90


@dataclasses.dataclass(frozen=True)
class Stage:
    """arguments: of `python -m`. minutes: what it takes on an H100, estimated. must_pass: later
    stages need it. takes_dry_run: a benchmark of a worker, which can be tried without a GPU."""

    name: str
    arguments: tuple[str, ...]
    minutes: float = 0.0
    env: tuple[tuple[str, str], ...] = ()
    must_pass: bool = False
    takes_dry_run: bool = False


def _benchmark(
    name: str, module: str, *arguments: str, minutes: float, must_pass: bool = False
) -> Stage:
    given = (f"benchmarks.{module}", "--gpu", "--name", name, *arguments)
    return Stage(name, given, minutes, must_pass=must_pass, takes_dry_run=True)


def _on_several_cores() -> tuple[str, ...]:
    """Options of pytest: most of the kernels' tests is compiling and the reference on a CPU."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(min(8, len(os.sched_getaffinity(0)))))


def stages(model_config: str) -> tuple[Stage, ...]:
    """In order: correctness, kernels, engine."""
    model = ("--model-config", model_config)
    return (
        # Philox, selection, scores, ring, dirty buffers, CUDA graph replay, every policy and dtype.
        Stage(
            "kernel_tests",
            ("pytest", "-q", *_on_several_cores(), "tests/triton"),
            minutes=4,
            env=(("VASE_TEST_GPU", "1"),),
            must_pass=True,
        ),
        Stage("kernels_check", ("benchmarks.kernels", "--check-only"), minutes=2, must_pass=True),
        Stage("kernels", ("benchmarks.kernels", "--json", "{output}/kernels.json"), minutes=4),
        Stage(
            "flashinfer",
            ("benchmarks.selection", "--json", "{output}/flashinfer.json"),
            minutes=3,
        ),
        # On the engine: 200 replays in batches of every size, before anything is timed.
        _benchmark(
            "replays",
            *("determinism", "--model-config", "qwen3-0.6b", "--rounds", "0", "--replays", "200"),
            minutes=3,
            must_pass=True,
        ),
        # One turn of the cost: a worker starts for each arm of each turn.
        _benchmark(
            "determinism",
            *("determinism", *model, "--cost-cell", "32x512", "--replays", "1000"),
            *("--rounds", "1"),
            minutes=7,
        ),
        _benchmark("overhead", "overhead", *model, minutes=5),
        # The others have no prefix cache; in this one first rounds leave its tree.
        _benchmark(
            "overhead_prefix_cache",
            *("overhead", *model, "--windows", "64", "--prefix-cache"),
            minutes=3,
        ),
        # Whole answers of this length do not fit the time of a stage.
        _benchmark("serving", "serving", *model, "--seconds", "90", "--cut", minutes=7),
        _benchmark("saturation", "saturation", *model, "--seconds", "120", minutes=7),
        _benchmark(
            "paper_16384", "paper", *model, "--outputs", "16384", "--seconds", "45", minutes=7
        ),
        _benchmark(
            "paper_32768", "paper", *model, "--outputs", "32768", "--seconds", "45", minutes=7
        ),
        _benchmark(
            "paper_dkv",
            *("paper", *model, "--outputs", "16384", "--policy", "vase-dkv"),
            *("--budgets", "2048", "4096", "6144"),
            minutes=7,
        ),
        # Last: it changes nothing by itself.
        Stage("tuning", ("benchmarks.tuning", "--json", "{output}/tuning.json"), minutes=5),
    )


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-config", default="qwen3-14b", help="shape of the engine's model")
    parser.add_argument("--only", nargs="+", help="these stages")
    parser.add_argument("--again", action="store_true", help="also what has succeeded before")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="limit of a stage")
    parser.add_argument(
        "--within",
        type=float,
        metavar="MINUTES",
        help="end in this time: no stage is begun that takes longer than what is left",
    )
    parser.add_argument(
        "--archive", type=Path, metavar="FILE.tar.gz", help="all results, after every stage"
    )
    parser.add_argument(
        "--worker-arg", action="append", default=[], help="SGLang flag of every worker"
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "gpu")
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    chosen = parser.parse_args(argv)
    known = stages(chosen.model_config)
    names = [stage.name for stage in known]
    if unknown := set(chosen.only or ()) - set(names):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not chosen.dry_run and not on_gpu():
        raise SystemExit("benchmarks.gpu needs a GPU that torch can use; --dry-run works anywhere")
    picked = [stage for stage in known if not chosen.only or stage.name in chosen.only]
    deadline = math.inf
    if not chosen.dry_run:
        if any(stage.takes_dry_run for stage in picked):
            require_backend(chosen.worker_arg)
        if chosen.within:
            deadline = started + 60 * chosen.within - _STOP_SECONDS
    return run(picked, chosen, deadline)


def run(picked: list[Stage], chosen: argparse.Namespace, deadline: float = math.inf) -> int:
    """Run the stages; what runs at `deadline` (`time.monotonic`) is cut. Returns 1 if one failed
    or was not begun for want of time."""
    chosen.output.mkdir(parents=True, exist_ok=True)
    state = State(chosen.output / ("dry_run.json" if chosen.dry_run else "state.json"))
    out_of_time = False
    for index, stage in enumerate(picked, start=1):
        label = f"[{index}/{len(picked)}] {stage.name}"
        command = command_of(stage, chosen)
        if state.succeeded(stage, command) and not chosen.again and not chosen.dry_run:
            print(f"{label}: done before")
            continue
        left = deadline - time.monotonic()
        if left < 60 * min(stage.minutes, chosen.minutes):
            said = (
                f"{label}: takes about {stage.minutes:g} minutes, {max(0, left) / 60:.1f} are left"
            )
            print(f"{said}; call again to go on", file=sys.stderr)
            out_of_time = True
            break
        print(f"{label}: {' '.join(command[1:])}", flush=True)
        if chosen.dry_run and not stage.takes_dry_run:
            state.note(stage.name, "dry run: not tried", 0.0, command)
            continue
        started = time.monotonic()
        status = _execute(command, stage, chosen, min(60 * chosen.minutes, left))
        state.note(stage.name, status, time.monotonic() - started, command)
        if chosen.archive:
            _pack(chosen.output, chosen.archive)
        print(f"{label}: {status} after {time.monotonic() - started:.0f} s", flush=True)
        if status != "ok" and stage.must_pass:
            print("stopped: nothing is measured on top of a failed check", file=sys.stderr)
            return 1
    problems = state.problems()
    for name, status in problems.items():
        print(f"{name}: {status}", file=sys.stderr)
    return 1 if problems or out_of_time else 0


def command_of(stage: Stage, chosen: argparse.Namespace) -> list[str]:
    arguments = [part.replace("{output}", str(chosen.output)) for part in stage.arguments]
    if stage.takes_dry_run:
        arguments += ["--output", str(chosen.output)]
        arguments += [f"--worker-arg={flag}" for flag in chosen.worker_arg]
        arguments += ["--dry-run"] if chosen.dry_run else []
    return [sys.executable, "-m", *arguments]


def _execute(command: list[str], stage: Stage, chosen: argparse.Namespace, seconds: float) -> str:
    """ok, or what went wrong. The stage and all its children end with its time."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | dict(stage.env)
    log = chosen.output / f"{stage.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # SIGTERM lets a benchmark stop its workers; they are in process groups of their own.
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            with suppress(ProcessLookupError):  # of the tests, their processes too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"cut after {seconds / 60:.3g} minutes"
    if status:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"exit status {status}: {' '.join(last)[:300]}"
    return "ok"


def _pack(folder: Path, archive: Path) -> None:
    """Write the archive anew; one that is cut off while it is written replaces none."""
    partial = archive.with_name(f"{archive.name}.partial")
    with tarfile.open(partial, "w:gz") as packed:
        packed.add(folder, arcname=folder.name)
    partial.rename(archive)


class State:
    """What ran, in a file that is written after every stage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._stages = json.loads(path.read_text())["stages"]

    def succeeded(self, stage: Stage, command: list[str]) -> bool:
        """Whether this very command did; of a check also, whether it checked this very code."""
        before = self._stages.get(stage.name, {})
        if before.get("status") != "ok" or before["command"] != _written(command):
            return False
        return not stage.must_pass or _same_code(before["environment"], describe())

    def note(self, name: str, status: str, seconds: float, command: list[str]) -> None:
        self._stages[name] = {
            "status": status,
            "seconds": round(seconds, 1),
            "command": _written(command),
            "environment": describe(),
        }
        self._path.write_text(json.dumps({"stages": self._stages}, indent=1) + "\n")

    def problems(self) -> dict[str, str]:
        fine = ("ok", "dry run: not tried")
        return {
            name: stage["status"]
            for name, stage in self._stages.items()
            if stage["status"] not in fine
        }


def _written(command: list[str]) -> str:
    """As a person would type it. Paths are reduced to their last part."""
    arguments = [Path(part).name if part.startswith("/") else part for part in command[1:]]
    return " ".join(["python", *arguments])


def _same_code(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Not with local changes, nor without a commit: nothing says that they are the same."""
    return bool(
        before["commit"] == now["commit"]
        and not now["commit"]["dirty"]
        and now["commit"]["id"] != NO_COMMIT
    )


if __name__ == "__main__":
    sys.exit(main())
