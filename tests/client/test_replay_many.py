"""`vase-sgl replay --since`: which records, which verdicts, what exit status, what report."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.client.test_commands import environment, run
from tests.gateway.running import Running, run_gateway, until
from tests.gateway.test_newer_records import more, record_as_newer
from vase_sgl.cli import build_app, replay_many
from vase_sgl.cli.replay_many import is_chosen
from vase_sgl.client import AsyncClient
from vase_sgl.gateway import replay_gate
from vase_sgl.gateway.audit.entries import FORMAT

SINCE = ("replay", "--since", "2020-01-01")


async def generate(running: Running, count: int) -> list[str]:
    return [
        (await running.client.generate_once("tell me", max_new_tokens=20, budget=8, window=2))
        .request_id
        for _ in range(count)
    ]  # fmt: skip


async def report(running: Running, tmp_path: Path, *options: str, status: int = 0) -> Any:
    file = tmp_path / "out.json"
    file.unlink(missing_ok=True)
    await run(running, *SINCE, *options, "--report", str(file), status=status)
    return json.loads(file.read_text())


async def test_all_of_a_time_match(running: Running, tmp_path: Path) -> None:
    ids = await generate(running, 5)
    found = await report(running, tmp_path)
    assert not found["interrupted"]
    assert found["outcomes"] == {"MATCH": 5} and found["seed_checks"] == {"VERIFIED": 5}
    assert [r["record_id"] for r in found["records"]] == ids
    assert found["tokens_compared"] == 100 and found["tokens_per_second"] > 0
    output, _ = await run(running, *SINCE)
    assert "MATCH" in output and "100.0%" in output
    assert "5 of 5 completed records replayed in" in output and "tokens/s" in output
    printed, _ = await run(running, *SINCE, "--json")
    assert json.loads(printed)["outcomes"] == {"MATCH": 5}
    # An existing report is not overwritten, and nothing is run for it.
    (tmp_path / "there.json").write_text("mine")
    bodies = len(running.worker.bodies)
    await run(running, *SINCE, "--report", str(tmp_path / "there.json"), status=1)
    assert (tmp_path / "there.json").read_text() == "mine"
    assert len(running.worker.bodies) == bodies


async def test_what_fails_at_once_leaves_no_report(running: Running, tmp_path: Path) -> None:
    """Else the same command with the right key would be refused: the file is there."""
    file = tmp_path / "out.json"
    await run(running, *SINCE, "--report", str(file), "--api-key", "vsk_no", status=1)
    assert not file.exists()
    await run(running, *SINCE, "--report", str(file), status=5)
    assert json.loads(file.read_text())["records"] == []


async def test_a_divergence_is_shown_where_it_is(running: Running, tmp_path: Path) -> None:
    ids = await generate(running, 3)
    running.worker.faults.other_token_at = 7
    output, _ = await run(running, *SINCE, status=3)
    assert f"{ids[0]} DIVERGED: token 7" in output
    running.worker.faults.other_token_at = None
    running.worker.faults.other_digest_at_round = 2
    found = await report(running, tmp_path, status=3)
    assert found["outcomes"] == {"DIVERGED": 3}
    assert [r["verdict"]["first_differing_round"] for r in found["records"]] == [2, 2, 2]


async def test_other_outcomes_have_their_status(tmp_path: Path) -> None:
    # The client tries a replay three times, which is more failures than a breaker allows.
    async with run_gateway(tmp_path, worker={"breaker": {"failures": 100}}) as running:
        await generate(running, 2)
        running.worker.faults.refuse_status = 500
        found = await report(running, tmp_path, status=1)
        assert found["outcomes"] == {"FAILED": 2}
        assert all("status 500" in record["error"] for record in found["records"])
        running.worker.faults.refuse_status = None
        running.worker.fingerprint |= {"sglang": "1", "[/not markup]": "1"}
        output, _ = await run(running, *SINCE, status=4)
        assert "INCOMPARABLE: [/not markup], sglang" in output


async def test_more_than_may_wait_at_the_gateway_wait_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_gate, "MAX_WAITING_PER_TENANT", 1)
    monkeypatch.setattr(replay_many, "_ASK_AGAIN_SECONDS", 0.2)
    async with run_gateway(tmp_path, replay={"max_concurrent": 1}) as running:
        await generate(running, 12)
        running.worker.token_seconds = 0.01
        found = await report(running, tmp_path, "--parallel", "12")
    assert found["outcomes"] == {"MATCH": 12}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interruption_keeps_what_was_replayed(
    running: Running, tmp_path: Path, number: signal.Signals
) -> None:
    ids = await generate(running, 3)
    running.worker.token_seconds = 0.05
    file = tmp_path / "out.json"

    async def interrupted_at(replays: int) -> tuple[bytes, bytes]:
        begun = len(running.worker.bodies)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vase_sgl.cli", *SINCE, "--parallel", "1"),
            *("--report", str(file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **environment(running), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        await until(lambda: len(running.worker.bodies) == begun + replays)
        process.send_signal(number)
        said = await process.communicate()
        assert process.returncode == 130, said
        return said

    await interrupted_at(1)
    assert not file.exists()
    output, errors = await interrupted_at(2)
    assert b"MATCH" in output and errors == b"interrupted after 1 of 3 replays\n"
    found = json.loads(file.read_text())
    assert found["interrupted"] and found["outcomes"] == {"MATCH": 1}
    assert [r["record_id"] for r in found["records"]] == ids[:1]


async def test_a_time_is_cut_out(running: Running, tmp_path: Path) -> None:
    await generate(running, 1)
    await asyncio.sleep(0.01)
    start = datetime.datetime.now(datetime.UTC)
    await asyncio.sleep(0.01)
    (inside,) = await generate(running, 1)
    await asyncio.sleep(0.01)
    end = datetime.datetime.now(datetime.UTC).isoformat()
    await generate(running, 1)
    file = str(tmp_path / "out.json")
    period = ("--since", start.isoformat(), "--until", end)
    await run(running, "replay", *period, "--report", file)
    assert [r["record_id"] for r in json.loads(Path(file).read_text())["records"]] == [inside]
    output, _ = await run(running, "replay", "--since", "2100-01-01", status=5)
    assert output.startswith("nothing to replay: 0 completed records")


async def test_what_cannot_be_replayed_is_counted(running: Running) -> None:
    key = running.add_tenant("bob", roles=["generate", "replay"], retention="hash")
    async with AsyncClient(running.target, key) as bob:
        await bob.generate_once("tell me", max_new_tokens=2)
    running.worker.faults.abort_after_tokens = 1
    with pytest.raises(Exception, match="out of luck"):
        await running.client.generate_once("tell me", max_new_tokens=2)
    output, _ = await run(running, *SINCE, "--api-key", key, status=5)
    assert "1 completed records in that time, 1 of the sample hold digests only" in output
    output, _ = await run(running, *SINCE, status=5)  # alice: one failed generation
    assert "0 completed records" in output


async def test_records_of_a_newer_gateway_are_counted_and_the_others_replayed(
    running: Running,
) -> None:
    await record_as_newer(running, more(format=FORMAT + 1))
    output, _ = await run(running, *SINCE)
    assert "1 of 1 completed records replayed" in output
    assert output.rstrip().endswith("; 1 are of a newer gateway")


async def test_two_runs_choose_the_same_records(running: Running, tmp_path: Path) -> None:
    ids = await generate(running, 12)
    first = await report(running, tmp_path, "--sample", "50%")
    again = await report(running, tmp_path, "--sample", "50%")
    chosen = [r["record_id"] for r in first["records"]]
    assert chosen == [r["record_id"] for r in again["records"]]
    assert chosen == [i for i in ids if is_chosen(i, 0.5, 0)]


def test_a_sample_is_even_nested_and_depends_on_the_seed() -> None:
    ids = [f"{n:032x}" for n in range(20_000)]
    small = {i for i in ids if is_chosen(i, 0.05, 0)}
    assert 900 < len(small) < 1100
    assert small < {i for i in ids if is_chosen(i, 0.2, 0)}
    assert all(is_chosen(i, 1.0, 0) for i in ids)
    other = {i for i in ids if is_chosen(i, 0.05, 1)}
    assert len(small & other) < 100


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "give a record id, or --since"),
        (("ab", "--since", "2020-01-01"), "give a record id, or --since"),
        (("ab", "--sample", "5%"), "needs --since"),
        (("--since", "yesterday"), "'yesterday' is not a date"),
        (("--since", "2020-01-01", "--sample", "0.05"), "not a share; one looks like 5%"),
        (("--since", "2020-01-01", "--sample", "0%"), "not a share"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], text: str) -> None:
    result = CliRunner().invoke(build_app(), ["replay", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())
