"""`vase-sgl eval` on a tiny grid, against the worker double over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from itertools import count, pairwise
from pathlib import Path

import pytest

from tests.eval.running_eval import GRID, TINY, rows, run_eval
from tests.gateway.running import run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from tests.gateway.test_transport import certificate
from vase_sgl.client import Tls
from vase_sgl.eval import progress
from vase_sgl.eval.cells import load
from vase_sgl.eval.items import Grade, Item
from vase_sgl.eval.sandbox import SandboxError
from vase_sgl.eval.tasks.passkey import PasskeyTask
from vase_sgl.gateway.limits import usage


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker() as worker:
        yield worker


async def test_a_grid_gives_a_row_per_sample_and_a_report(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    printed, shown = await run_eval(
        *TINY, *GRID, "--worker", worker.url, "-o", out, "--price-per-hour", "2.5"
    )
    assert printed == f"{out / 'report.html'} {out / 'report.md'}\n"
    assert "30 of 30 samples have an outcome" in shown
    found = rows(out)
    assert len(found) == 30 == len({json.dumps([r[k] for k in KEY]) for r in found})
    assert {(r["arm"], r["budget"]) for r in found} == {
        ("full", None),
        *((arm, budget) for arm in ("vase-attnv", "random+keep") for budget in (32, 48)),
    }
    one = next(r for r in found if r["arm"] == "vase-attnv" and r["budget"] == 32)
    sent = next(b for b in worker.bodies if b["rid"] == one["request_id"])["sampling_params"]
    assert sent["custom_params"]["vase"]["seed"] == one["seeds"]["eviction"]
    assert sent["sampling_seed"] == one["seeds"]["sampling"]
    assert (sent["temperature"], sent["max_new_tokens"]) == (0.6, 60)
    assert one["rounds"] > 0 and one["evicted_tokens"] > 0 and one["reserved_slots"] == 40
    assert one["full_kv_slots"] == one["prompt_tokens"] + 60 and one["output_tokens"] == 60
    assert one["digest"] and one["ttft_seconds"] <= one["total_seconds"]
    assert one["queue_seconds"] == 1e-6
    assert json.loads((out / "run.json").read_text())["query_ring_slots"] == {"production": 24.0}
    (cells,) = load([out]).cells.values()
    assert [(c.label, c.mean(c.slots)) for c in cells if c.budget == 32] == [
        ("random+keep @ 32", 40),
        ("vase-attnv @ 32", 40 + 24),
    ]
    assert one["correct"] is False and one["finish_reason"] == "length"
    # The same question has the same seeds in every arm, other questions others.
    by_pair: dict[tuple[str, int], set[int]] = {}
    for row in found:
        pair = row["item_id"], row["seed_index"]
        by_pair.setdefault(pair, set()).add(row["seeds"]["sampling"])
    assert all(len(seeds) == 1 for seeds in by_pair.values())
    assert len(set.union(*by_pair.values())) == 6
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    # Nothing in it leads out: names of XML vocabularies are no addresses to fetch.
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|@import|url\((?!#)|<script|<link", page)
    assert "no-regression control" in page and "Pareto front" in page


async def test_the_same_command_runs_only_what_is_left(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    where = ("--worker", worker.url, "-o", tmp_path)
    await run_eval(*TINY, *GRID, *where)
    whole = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(whole[: len(whole) * 2 // 3])  # in the middle of a row
    left = 30 - whole[: len(whole) * 2 // 3].count(b"\n")
    worker.bodies.clear()
    _, shown = await run_eval(*TINY, *GRID, *where)
    assert f"{30 - left} of 30 samples are there already" in shown
    assert len(worker.bodies) == left and len(rows(tmp_path)) == 30
    unlike = ("request_id", "started", "session", "total_seconds", "ttft_seconds")
    before = [json.loads(line) for line in whole.splitlines()]
    for old, new in zip(sorted(before, key=str), sorted(rows(tmp_path), key=str), strict=True):
        assert {k: v for k, v in old.items() if k not in unlike} == {
            k: v for k, v in new.items() if k not in unlike
        }
    run = json.loads((tmp_path / "run.json").read_text())
    del run["configuration"]["task_digests"]  # as an older version left it
    (tmp_path / "run.json").write_text(json.dumps(run))
    await run_eval(*TINY, *GRID, *where)
    assert len(worker.bodies) == left


async def test_a_clock_that_is_set_back_takes_no_seconds_away(
    worker: ScriptedWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a minute whenever it is read, also between a run and its resumption."""
    real, readings = time.time, count()
    monkeypatch.setattr(time, "time", lambda: real() - 60 * next(readings))
    where = ("--policies", "full", "--concurrency", 1, "--worker", worker.url, "-o", tmp_path)
    await run_eval(*TINY, *where)
    half = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)[:3]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(half))
    await run_eval(*TINY, *where)
    found = rows(tmp_path)
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [r["session"] for r in found] == [s["started"] for s in sessions for _ in range(3)]
    for session in sessions:
        mine = [r for r in found if r["session"] == session["started"]]
        seconds = sum(r["total_seconds"] for r in mine)
        assert seconds < session["ended"] - session["started"] < 60
    (cells,) = load([tmp_path]).cells.values()
    seconds = sum(r["total_seconds"] for r in found)
    assert cells[0].machine_seconds == pytest.approx(seconds, abs=1e-5)


async def test_another_configuration_in_the_same_folder_is_refused(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    where = ("--worker", worker.url, "-o", tmp_path)
    await run_eval(*TINY, "--policies", "full", *where)
    before = (tmp_path / "rows.jsonl").read_bytes()
    _, error = await run_eval(*TINY, "--policies", "full", *where, "--top-k", 5, status=1)
    assert '"top_k": -1} ' not in error and 'settings: there {"max_new_tokens": 60' in error
    assert "give the same options to go on, or another --output" in error
    worker.fingerprint["weights_digest"] = "another"
    (tmp_path / "rows.jsonl").write_bytes(before[: before.index(b"\n") + 1])
    _, error = await run_eval(*TINY, "--policies", "full", *where, status=1)
    assert "weights_digest: there 0123456789abcdef, now another" in error


async def test_a_thought_that_the_template_opened_is_no_answer(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    where = ("--policies", "full", "--worker", worker.url, "--concurrency", 1)
    worker.opening = "so it is. </think> "
    _, shown = await run_eval(*TINY, *where, "-o", tmp_path / "unaware")
    assert shown.count("closes a think block that it never opened") == 1
    assert "--opens-think" in shown
    _, shown = await run_eval(*TINY, *where, "-o", tmp_path / "closed", "--opens-think")
    assert "never opened" not in shown
    assert all(
        r["malformed"] == ["truncated", "no_final_answer"] for r in rows(tmp_path / "closed")
    )

    worker.opening = "The passkey is 12345. "
    for folder, flags, found in (("graded", (), "12345"), ("thought", ("--opens-think",), None)):
        await run_eval(*TINY, *where, "-o", tmp_path / folder, *flags)
        for row in rows(tmp_path / folder):
            assert row["extracted"] == found and row["text"].startswith("The passkey")
            assert ("unclosed_think" in row["malformed"]) is (found is None)


async def test_a_grader_that_breaks_costs_neither_the_row_nor_the_run(
    worker: ScriptedWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--policies", "full", "--worker", worker.url, "-o", tmp_path)

    def grade(self: PasskeyTask, item: Item, text: str) -> Grade:
        raise ValueError("no such number")

    monkeypatch.setattr(PasskeyTask, "grade", grade)
    await run_eval(*TINY, *where)
    assert [(r["status"], r["correct"], r["grade_reason"]) for r in rows(tmp_path)] == [
        ("completed", False, "the grader failed: ValueError('no such number')")
    ] * 6
    await run_eval(*TINY, *where)
    assert len(worker.bodies) == 6


async def test_a_sandbox_that_breaks_grades_nothing(
    worker: ScriptedWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grade(self: PasskeyTask, item: Item, text: str) -> Grade:
        raise SandboxError("no processes left")

    monkeypatch.setattr(PasskeyTask, "grade", grade)
    where = ("--policies", "full", "--worker", worker.url, "-o", tmp_path)
    with pytest.raises(AssertionError, match="no processes left"):
        await run_eval(*TINY, *where)
    assert rows(tmp_path) == []


async def test_failures_are_rows_and_run_again(worker: ScriptedWorker, tmp_path: Path) -> None:
    where = ("--policies", "full", "--worker", worker.url, "-o", tmp_path, "--concurrency", 1)
    worker.faults.cut_after_tokens = 3
    _, error = await run_eval(*TINY, *where, status=1)
    assert "5 samples in a row failed under full" in error and "was lost" in error
    assert [r["status"] for r in rows(tmp_path)] == ["failed"] * 5
    assert all(r["request_id"] in worker.aborted for r in rows(tmp_path))
    _, error = await run_eval("report", tmp_path, status=1)
    assert "passkey?steps=4, full, 6 samples: 1 not run: " in error and "5 failed: " in error
    assert not (tmp_path / "report.html").exists()
    worker.faults.cut_after_tokens = None
    await run_eval(*TINY, *where)
    page = (tmp_path / "report.md").read_text()
    assert "| passkey?steps=4, full | 0 | 5 | 0 | worker" in page


async def test_an_abort_is_an_outcome_that_counts_as_wrong(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    worker.faults.abort_after_tokens = 10
    await run_eval(*TINY, "--policies", "full", "--worker", worker.url, "-o", tmp_path)
    found = rows(tmp_path)
    assert {(r["status"], r["correct"]) for r in found} == {("aborted", False)}
    # It held memory until then.
    assert all(r["full_kv_slots"] == r["prompt_tokens"] + 10 for r in found)
    assert all(r["seeds"]["sampling"] and r["queue_seconds"] == 1e-6 for r in found)
    (cells,) = load([tmp_path]).cells.values()
    assert cells[0].slot_seconds > 0
    assert (
        "| passkey?steps=4, full | 6 | 0 | 0 | out of luck |"
        in (tmp_path / "report.md").read_text()
    )


async def test_ctrl_c_frees_the_requests_and_leaves_a_folder_to_go_on_with(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    worker.token_seconds = 0.02
    arguments = (*TINY, *GRID, "--worker", worker.url, "-o", tmp_path, "--concurrency", "2")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vase_sgl.cli", "eval", *map(str, arguments)),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    path = tmp_path / "rows.jsonl"
    async with asyncio.timeout(60):
        while not path.exists() or path.read_bytes().count(b"\n") < 3 or not worker.running:
            assert process.returncode is None
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, error = await process.communicate()
    assert process.returncode == 130, error
    assert b"interrupted; the same command goes on where it was" in error
    await worker.wait_for_abort()
    done = len(rows(tmp_path))
    assert {r["status"] for r in rows(tmp_path)} == {"completed"}
    worker.token_seconds = 0
    _, shown = await run_eval(*arguments)
    assert f"{done} of 30 samples are there already" in shown and len(rows(tmp_path)) == 30


async def test_through_a_gateway_every_row_can_be_replayed(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    known = Tls(*(file.read_bytes() for file in (cert, cert, key)))
    config = {"certificate": cert, "key": key, "client_ca": cert}
    async with run_gateway(tmp_path, client_tls=known, tls=config) as running:
        out = tmp_path / "out"
        await run_eval(
            *(*TINY, "--limit", 1, "--policies", "vase-dkv+keep", "--budgets", 32, "--window", 8),
            *("--gateway", running.target, "-o", out),
            *("--ca-file", cert, "--client-cert", cert, "--client-key", key),
            VASE_API_KEY=running.key,
        )
        for row in rows(out):
            record = await running.client.get_record(row["request_id"])
            assert record.text == row["text"] and record.seeds.eviction == row["seeds"]["eviction"]
            assert record.eviction is not None and record.eviction.prompt_mode == "keep"
            assert (await running.client.replay(row["request_id"]).verdict()).outcome == "MATCH"
        assert len(rows(out)) == 2 and rows(out)[0]["rounds"] > 0
        assert "prefix cache was not emptied before each arm." in (out / "report.md").read_text()
        _, error = await run_eval(
            *(*TINY, "--policies", "full", "--gateway", running.target, "-o", tmp_path / "no"),
            VASE_CA_FILE=str(cert),
            VASE_CLIENT_CERT=str(cert),
            VASE_CLIENT_KEY=str(key),
            VASE_API_KEY="vsk_wrong",
            status=1,
        )
        assert "this is not an API key" in error


async def test_want_of_room_at_a_gateway_is_waited_for_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests at once than the tenant may have: the others are refused for a while."""
    monkeypatch.setattr(usage, "CONCURRENCY_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    async with run_gateway(tmp_path) as running:
        running.worker.token_seconds = 0.02
        key = running.add_tenant("bob", limits={"max_concurrent_requests": 1})
        out = tmp_path / "out"
        _, shown = await run_eval(
            *(*TINY, "--max-new-tokens", 15, "--policies", "full"),
            *("--gateway", running.target, "-o", out),
            VASE_API_KEY=key,
        )
    assert "6 of 6 samples have an outcome" in shown and "0 attempts failed" in shown
    assert "(tenant bob may have 1 requests at once; wait until one ends)" in shown
    found = rows(out)
    assert [row["status"] for row in found] == ["completed"] * 6
    held = [row["total_seconds"] - row["queue_seconds"] for row in found]
    assert all(seconds > 0.2 for seconds in held)
    ends = [row["started"] + row["total_seconds"] for row in found]
    # They ran one after the other.
    assert sum(held) < max(ends) - min(row["started"] for row in found)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--policies", "full"), "name at least one task"),
        (("--tasks", "pass"), "unknown task 'pass'; known are"),
        (("--tasks", "passkey", "--policies", "full"), "say where the model is: --model to start"),
        (("--tasks", "passkey", "--worker", "U"), "vase-attnv needs a budget"),
        (
            ("--tasks", "passkey", "--policies", "full-fp8", "--worker", "U"),
            "needs a fp8 worker (its flags: --kv-cache-dtype fp8_e4m3); name one with --worker fp8",
        ),
        (
            ("--tasks", "passkey", "--policies", "full", "--worker", "fast=U"),
            "no worker configuration 'fast'; there are",
        ),
        (("--tasks", "passkey", "--budgets", "1k"), "'1k' is not a number"),
        (
            ("--tasks", "passkey", "--temperature", "0", "--seeds", "2"),
            "would narrow the intervals",
        ),
        (("--tasks", "passkey", "--policies", "full,full"), "names something twice"),
        (("--seeds", "2", "report", "."), "put it after `report`"),
        (("report", "nowhere"), "nowhere does not exist"),
    ],
)
async def test_wrong_options_are_named(arguments: tuple[str, ...], text: str) -> None:
    runner = await asyncio.to_thread(_fails, arguments)
    assert text in " ".join(runner.replace("│", " ").split())


async def test_an_answer_of_another_model_stops_the_run(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    where = ("--policies", "full", "--worker", worker.url, "-o", tmp_path)
    worker.faults.stamp = "1" * 16
    _, error = await run_eval(*TINY, *where, status=1)
    assert f"(stamp {'1' * 16}, then {'0' * 16}); its answer was not kept" in error
    assert rows(tmp_path) == []
    worker.faults.stamp = None  # restarted, and nobody has asked it yet: it is asked
    await run_eval(*TINY, *where)
    assert len(rows(tmp_path)) == 6


async def test_a_gateway_whose_worker_changed_stops_the_run(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as running:
        running.worker.token_seconds = 0.01

        async def update() -> None:
            await until(lambda: running.worker.bodies)
            running.worker.fingerprint["weights_digest"] = "another"

        updated = asyncio.create_task(update())
        _, error = await run_eval(
            *(*TINY, "--policies", "full,random", "--budgets", 32, "--window", 8),
            *("--gateway", running.target, "-o", tmp_path / "out"),
            VASE_API_KEY=running.key,
            status=1,
        )
        await updated
        assert "became another worker while full was asked passkey?steps=4; the rows of" in error
        assert "weights_digest: then 0123456789abcdef, now another" in error
        assert {row["arm"] for row in rows(tmp_path / "out")} == {"full"}


async def test_a_worker_that_cannot_run_an_arm_is_refused_before_it_is_asked(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    where = ("-o", tmp_path, "--worker")
    budget = ("--policies", "snapkv", "--budgets", 8192)
    _, error = await run_eval(*TINY, *budget, *where, worker.url, status=1)
    assert "snapkv @ 8192" in error and "allows budgets up to 4096; lower --budgets" in error
    fp8 = ("--policies", "full-fp8", *where, f"fp8={worker.url}")
    _, error = await run_eval(*TINY, *fp8, status=1)
    assert "its KV cache is of an unknown type; start it with --kv-cache-dtype fp8_e4m3" in error
    assert worker.bodies == []
    worker.fingerprint["kv_cache_dtype"] = "float8_e4m3fn"
    await run_eval(*TINY, *fp8)
    assert {row["worker"] for row in rows(tmp_path)} == {"fp8"}


async def test_every_task_of_an_arm_begins_alone_and_with_a_cold_cache(
    worker: ScriptedWorker, tmp_path: Path
) -> None:
    """Else seconds are counted twice, and the first arm alone pays for the prompts."""
    worker.token_seconds = 0.002
    tasks = ("--tasks", "passkey?steps=4,state-tracking?steps=4", "--limit", 3)
    arms = ("--policies", "full,random", "--budgets", 32, "--window", 8, "--max-new-tokens", 20)
    out = tmp_path / "out"
    await run_eval(*tasks, *arms, "--worker", worker.url, "-o", out)
    assert worker.flushes == [0, 3, 6, 9]
    spans: dict[tuple[str, str], list[float]] = {}
    for row in rows(out):
        end = row["started"] + row["total_seconds"]
        spans.setdefault((row["arm"], row["task"]), []).extend((row["started"], end))
    ordered = list(spans.values())
    assert len(ordered) == 4
    # Seconds since the epoch have six digits behind the point.
    assert all(max(a) < min(b) + 1e-5 for a, b in pairwise(ordered))
    told = "Its prefix cache was not emptied before each arm."
    assert told not in (out / "report.md").read_text()
    worker.running.add("of somebody else")
    await run_eval(*TINY, "--policies", "full", "--worker", worker.url, "-o", tmp_path / "shared")
    assert told in (tmp_path / "shared" / "report.md").read_text()


async def test_two_runs_are_reported_together(worker: ScriptedWorker, tmp_path: Path) -> None:
    for name, policy in (("a", "full"), ("b", "random")):
        arm = ("--policies", policy, "--budgets", 32, "--window", 8)
        await run_eval(*TINY, *arm, "--worker", worker.url, "-o", tmp_path / name)
    both = ("report", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both")
    await run_eval(*both)
    assert "| random | 32 | 6 |" in (tmp_path / "both" / "report.md").read_text()
    _, error = await run_eval(*both, tmp_path / "a", status=1)
    assert "passkey?steps=4, full: is in more than one of the inputs" in error
    assert len(load([tmp_path / "a"]).cells) == 1


KEY = ("arm", "budget", "task", "item_id", "seed_index")


def _fails(arguments: tuple[str, ...]) -> str:
    from typer.testing import CliRunner

    from vase_sgl.cli import build_app

    result = CliRunner().invoke(build_app(), ["eval", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code in (1, 2), result.output
    return result.stderr
