"""Throughput and TTFT over the number of users, for several KV budgets in the same KV memory.

    python benchmarks/loadtest_report.py --model MODEL

One `vase-sgl serve` with a fixed pool of KV slots serves every cell of the matrix, so that the
memory is the same and a ratio compares neighbours in time: for each number of users all budgets run
one after the other, every other number in the opposite order. Writes NAME.json, every result of
`loadtest` in full, and NAME.md, the table, to benchmarks/results.

The claims are the ratios. Absolute numbers belong to the machine they were measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vase_sgl.client import Client

ROOT = Path(__file__).resolve().parents[1]
FULL = "full"
_START_SECONDS = 900
_STOP_SECONDS = 60
#: Waiting counts as time to the first token here, not as a refusal.
_QUEUE_SECONDS = 3600


def main() -> int:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder, _gateway(Path(folder), options) as (host, key):
        with Client(host, key) as client:  # the first call of a worker is slower than the others
            client.generate_once("Warm up.", max_new_tokens=8)
        cells = [
            _measure(Path(folder), host, key, users, budget, options)
            for users, budget in _cells(options.users, options.budgets)
        ]
    if all(cell["result"]["all"]["completed"] == 0 for cell in cells):
        print("no call was completed; raise --seconds or lower --max-new-tokens", file=sys.stderr)
        return 1
    report = {
        "format": "vase-sgl-loadtest-matrix/1",
        "settings": _settings(options),
        "cells": cells,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(report)
    (options.output / f"{options.name}.md").write_text(page)
    print(page)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or name of the model")
    add("--users", type=_numbers, default=[1, 4, 16, 64], help="1,4,16,64")
    add("--budgets", type=_budgets, default=["128", FULL], help="128,full; the last is the base")
    add("--window", type=int, default=32)
    add("--seconds", type=int, default=120, help="length of a cell; its calls are awaited")
    add("--prompt-tokens", type=int, default=64)
    add("--max-new-tokens", type=int, default=512)
    add("--kv-slots", type=int, default=4096, help="tokens the KV pool holds")
    add("--max-running", type=int, default=64, help="requests the worker runs at once")
    add("--drain-seconds", type=int, default=1800, help="longest wait for a cell's last calls")
    add("--worker-arg", action="append", default=[], help="further SGLang flag, as --worker-arg=X")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results")
    add("--name", default="loadtest")
    return parser


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("numbers of users are at least 1")
    return numbers


def _budgets(text: str) -> list[str]:
    budgets = text.split(",")
    for budget in budgets:
        if budget != FULL and not budget.isdecimal():
            raise argparse.ArgumentTypeError(f"{budget!r} is neither a budget nor {FULL}")
    return budgets


def _cells(users: list[int], budgets: list[str]) -> Iterator[tuple[int, str]]:
    for turn, number in enumerate(users):
        for budget in budgets if turn % 2 == 0 else reversed(budgets):
            yield number, budget


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(options).items() if k not in ("output", "name")} | {
        "model": Path(options.model).name
    }


def _measure(
    folder: Path, host: str, key: str, users: int, budget: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One cell: a headless load test in a process of its own."""
    path = folder / f"{users}-{budget}.json"
    eviction = (
        ["--policy", FULL] if budget == FULL else ["--budget", budget, "--window", options.window]
    )
    command = [
        *(sys.executable, "-m", "loadtest", "--headless", "--only-summary", "--loglevel", "ERROR"),
        *("--host", host, "--users", users, "--run-time", f"{options.seconds}s"),
        *("--stop-timeout", options.drain_seconds, "--call-timeout", options.drain_seconds),
        *("--prompt-tokens", options.prompt_tokens, "--max-new-tokens", options.max_new_tokens),
        *eviction,
        *("--result", path),
    ]
    print(f"{users} users, budget {budget}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"VASE_API_KEY": key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # 1: calls failed, which the table says.
    if done.returncode not in (0, 1) or not path.exists():
        raise SystemExit(f"the load test ended with {done.returncode}:\n{done.stderr}")
    return {"users": users, "budget": budget, "result": json.loads(path.read_text())}


@contextmanager
def _gateway(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """`vase-sgl serve` with its worker; yields host:port and an API key."""
    tenants = folder / "tenants.yaml"
    cli = (sys.executable, "-m", "vase_sgl.cli")
    key = subprocess.run(
        [*cli, "tenants", "add", "load", "--file", str(tenants)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    log = folder / "worker.log"
    process = subprocess.Popen(
        [
            *(*cli, "serve", "--model-path", options.model, "--grpc-port", "0"),
            *("--tenants-file", str(tenants), "--log-level", "warning"),
            *("--audit-url", f"sqlite+aiosqlite:///{folder / 'audit.sqlite3'}", "--"),
            *("--max-total-tokens", str(options.kv_slots)),
            *("--max-running-requests", str(options.max_running), *options.worker_arg),
        ],
        env=os.environ
        | {
            "PYTHONUNBUFFERED": "1",
            "VASE_WORKER__LOG_FILE": str(log),
            "VASE_QUEUE__MAX_WAIT_SECONDS": str(_QUEUE_SECONDS),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        yield _wait_until_serving(process, lines, log), key
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None  # Popen was asked for a pipe
    for line in process.stdout:
        lines.append(line.rstrip())


def _wait_until_serving(process: subprocess.Popen[str], lines: list[str], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        for line in lines:
            if match := re.search(r"serving on (\S+)", line):
                return match[1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    raise SystemExit("the gateway did not start:\n" + "\n".join([*said[-20:], *lines[-20:]]))


def markdown(report: dict[str, Any]) -> str:
    """The table: for each number of users every budget, and its ratios to the last one."""
    settings, cells = report["settings"], report["cells"]
    gateway = cells[0]["result"]["gateway"]
    base = settings["budgets"][-1]
    by_cell = {(cell["users"], cell["budget"]): cell["result"]["all"] for cell in cells}
    lines = [
        f"# Load over users, {settings['model']}",
        "",
        f"{settings['prompt_tokens']} words of prompt, {settings['max_new_tokens']} tokens of "
        f"answer, window {settings['window']}, {settings['seconds']} s a cell and its last calls. "
        f"All cells share one worker with {gateway['total_slots']} KV slots on "
        f"{gateway['fingerprint'].get('device', 'an unnamed device')}. Ratios: to budget {base} in "
        "the row's own number of users.",
        "",
        "| users | budget | completed | failed | unfinished | tokens/s | ratio "
        "| TTFT p50 ms | ratio | TTFT p95 ms | TPOT p50 ms | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for users in settings["users"]:
        for budget in settings["budgets"]:
            lines.append(_line(users, budget, by_cell[users, budget], by_cell[users, base]))
    return "\n".join(lines) + "\n"


def _line(users: int, budget: str, found: dict[str, Any], base: dict[str, Any]) -> str:
    def of(result: dict[str, Any], metric: str, key: str) -> float | None:
        return None if result[metric] is None else float(result[metric][key])

    def ratio(value: float | None, reference: float | None) -> str:
        return f"{value / reference:.2f}" if value is not None and reference else "-"

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    rate, base_rate = found["output_tokens_per_second"], base["output_tokens_per_second"]
    ttft, tpot = of(found, "ttft_ms", "p50"), of(found, "tpot_ms", "p50")
    values = [
        *(
            str(users),
            budget,
            *(str(found[name]) for name in ("completed", "failed", "unfinished")),
        ),
        *(text(rate), ratio(rate, base_rate)),
        *(text(ttft), ratio(ttft, of(base, "ttft_ms", "p50")), text(of(found, "ttft_ms", "p95"))),
        *(text(tpot), ratio(tpot, of(base, "tpot_ms", "p50"))),
    ]
    return "| " + " | ".join(values) + " |"


if __name__ == "__main__":
    sys.exit(main())
