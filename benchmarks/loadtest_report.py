"""Throughput and TTFT over the number of users, for several KV budgets in the same KV memory.

    python benchmarks/loadtest_report.py --model MODEL

One `vase-sgl serve` with a fixed pool of KV slots serves every cell of the matrix, so that the
memory is the same and a ratio compares neighbours in time: for each number of users all budgets run
one after the other, every other number in the opposite order. Then a noisy neighbour, limited to
few calls at once, works beside a quiet tenant. At the end the audit store is counted and its chains
are verified: it must hold what Locust saw, no more and no less. Writes NAME.json, every result of
`loadtest` in full, and NAME.md, the tables, to benchmarks/results.

The claims are the ratios. Absolute numbers belong to the machine they were measured on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vase_sgl.client import Client
from vase_sgl.demo.gateway import GatewayFailed, GatewayProcess, add_tenant
from vase_sgl.gateway.audit.store import AuditStore

ROOT = Path(__file__).resolve().parents[1]
FULL = "full"
#: Waiting counts as time to the first token here, not as a refusal.
_QUEUE_SECONDS = 3600


QUIET, NOISY = "quiet", "noisy"


def main() -> int:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _gateway(folder, options) as (host, keys):
            with Client(host, keys[QUIET]) as client:  # a worker's first call is slow
                client.generate_once("Warm up.", max_new_tokens=8)
            cells = [
                _measure(folder, host, keys, users, budget, options)
                for users, budget in _cells(options.users, options.budgets)
            ]
            neighbours = _measure_neighbours(folder, host, keys, options)
        audit = asyncio.run(_recorded(folder))
    if all(cell["result"]["all"]["completed"] == 0 for cell in cells):
        print("no call was completed; raise --seconds or lower --max-new-tokens", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "format": "vase-sgl-loadtest-matrix/2",
        "settings": _settings(options),
        "cells": cells,
        "neighbours": neighbours,
        "audit": {"recorded": audit, "seen": _seen(cells, neighbours)},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(report)
    (options.output / f"{options.name}.md").write_text(page)
    print(page)
    if report["audit"]["recorded"] != report["audit"]["seen"]:
        print("the audit store does not hold what Locust saw", file=sys.stderr)
        return 1
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
    add("--neighbours", type=int, default=16, help="users of the noisy-neighbour cell")
    add("--noisy-calls", type=int, default=2, help="the noisy tenant's limit of calls at once")
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
    folder: Path,
    host: str,
    keys: dict[str, str],
    users: int,
    budget: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One cell: a headless load test in a process of its own."""
    eviction = (
        ["--policy", FULL] if budget == FULL else ["--budget", budget, "--window", options.window]
    )
    print(f"{users} users, budget {budget}", file=sys.stderr, flush=True)
    result = _locust(folder, host, keys, options, "--users", users, *eviction)
    return {"users": users, "budget": budget, "result": result}


def _measure_neighbours(
    folder: Path, host: str, keys: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """A quarter of the users quiet; the others, of one tenant, call again whenever refused."""
    tenants = folder / "callers.yaml"
    callers = [
        {"name": QUIET, "key_env": "QUIET_KEY"},
        {"name": NOISY, "key_env": "NOISY_KEY", "weight": 3, "noisy": True},
    ]
    tenants.write_text(yaml.safe_dump({"tenants": callers}))
    budget = next((budget for budget in options.budgets if budget != FULL), FULL)
    eviction = () if budget == FULL else ("--budget", budget, "--window", options.window)
    print(f"{options.neighbours} users, a noisy neighbour", file=sys.stderr, flush=True)
    return _locust(
        *(folder, host, keys, options, "--users", options.neighbours, *eviction),
        *("--scenario", "noisy-neighbour", "--tenants", tenants),
    )


def _locust(
    folder: Path, host: str, keys: dict[str, str], options: argparse.Namespace, *more: object
) -> dict[str, Any]:
    path = folder / "result.json"
    path.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "loadtest", "--headless", "--only-summary", "--loglevel", "ERROR"),
        *("--host", host, "--run-time", f"{options.seconds}s"),
        *("--stop-timeout", options.drain_seconds, "--call-timeout", options.drain_seconds),
        *("--prompt-tokens", options.prompt_tokens, "--max-new-tokens", options.max_new_tokens),
        *("--result", path, *more),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ
        | {"VASE_API_KEY": keys[QUIET], "QUIET_KEY": keys[QUIET], "NOISY_KEY": keys[NOISY]},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # 1: calls failed, which the table says.
    if done.returncode not in (0, 1) or not path.exists():
        raise SystemExit(f"the load test ended with {done.returncode}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _seen(cells: list[dict[str, Any]], neighbours: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Answers by tenant and status, as Locust counted them, and the one that warmed up."""
    seen: dict[str, Counter[str]] = {QUIET: Counter(completed=1), NOISY: Counter()}
    for result in (*(cell["result"] for cell in cells), neighbours):
        for tenant, found in result["tenants"].items():
            who = tenant if tenant in seen else QUIET
            seen[who].update(completed=found["completed"], aborted=found["unfinished"])
    return {tenant: dict(sorted((+counts).items())) for tenant, counts in seen.items()}


async def _recorded(folder: Path) -> dict[str, dict[str, int]]:
    """Records by tenant and status; every record's id is its own, and every chain is whole."""
    url = _audit_url(folder)
    command = [sys.executable, "-m", "vase_sgl.cli", "audit", "verify", "--url", url]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    store = await AuditStore.open(url)
    try:
        counts = {QUIET: Counter[str](), NOISY: Counter[str]()}
        for tenant, count in (await store.tenants()).items():
            stored = await store.latest(tenant, before=None, count=count + 1)
            if len({entry.record_id for entry in stored}) != count:
                raise SystemExit(f"tenant {tenant} has records twice, or some are missing")
            counts[tenant].update(str(entry.status) for entry in stored)
        return {tenant: dict(sorted(found.items())) for tenant, found in counts.items()}
    finally:
        await store.close()


def _audit_url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'audit.sqlite3'}"


@contextmanager
def _gateway(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """`vase-sgl serve` with its worker; yields host:port and each tenant's API key."""
    tenants = folder / "tenants.yaml"
    limits = {QUIET: (), NOISY: ("--max-concurrent-requests", str(options.noisy_calls))}
    keys = {tenant: add_tenant(tenant, tenants, *limit) for tenant, limit in limits.items()}
    arguments = (
        *("--model-path", options.model, "--tenants-file", str(tenants)),
        *("--audit-url", _audit_url(folder), "--"),
        *("--max-total-tokens", str(options.kv_slots)),
        *("--max-running-requests", str(options.max_running), *options.worker_arg),
    )
    env = {
        "VASE_WORKER__LOG_FILE": str(folder / "worker.log"),
        "VASE_QUEUE__MAX_WAIT_SECONDS": str(_QUEUE_SECONDS),
    }
    with GatewayProcess(arguments, env) as gateway:
        yield gateway.target, keys


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
    return "\n".join([*lines, *_neighbour_lines(report), *_audit_lines(report["audit"])]) + "\n"


def _neighbour_lines(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    lines = [
        *("", "## A noisy neighbour", ""),
        f"{settings['neighbours']} users, a quarter of them quiet. The noisy tenant may have "
        f"{settings['noisy_calls']} calls at once, and calls again whenever it is refused.",
        "",
        "| tenant | completed | refused | failed | tokens/s | TTFT p50 ms | TTFT p95 ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for tenant in (QUIET, NOISY):
        found = report["neighbours"]["tenants"][tenant]
        ttft = found["ttft_ms"] or {"p50": math.nan, "p95": math.nan}
        counts = " | ".join(str(found[name]) for name in ("completed", "rejected", "failed"))
        rate = found["output_tokens_per_second"]
        lines.append(
            f"| {tenant} | {counts} | {rate:.4g} | {ttft['p50']:.4g} | {ttft['p95']:.4g} |"
        )
    return lines


def _audit_lines(audit: dict[str, Any]) -> list[str]:
    lines = [
        *("", "## Audit records", ""),
        "Answers that Locust saw over all cells, and records in the store; ids are unique and the "
        "hash chains verify.",
        "",
        "| tenant | status | seen | recorded |",
        "|---|---|---:|---:|",
    ]
    for tenant in (QUIET, NOISY):
        seen, recorded = audit["seen"][tenant], audit["recorded"][tenant]
        lines += [
            f"| {tenant} | {status} | {seen.get(status, 0)} | {recorded.get(status, 0)} |"
            for status in sorted(seen | recorded)
        ]
    return lines


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
    try:
        sys.exit(main())
    except GatewayFailed as error:
        sys.exit(str(error))
