"""What the log and the metrics say of how generations end, and when."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.exc

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from tests.gateway.test_observability import scrape
from vase_sgl.client import Unavailable, VaseError
from vase_sgl.gateway import logs, worker_http
from vase_sgl.gateway.audit import store

LABELS = ("scripted", "text_completion", "vase_sgl")
DURATIONS = "gen_ai_server_request_duration_seconds_count"


@pytest.fixture
async def seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Running]:
    """A gateway with a page for Prometheus, and a log in JSON."""
    caplog.set_level(logging.INFO, "vase_sgl")
    monkeypatch.setattr(caplog.handler, "formatter", logs.JsonFormatter())
    async with run_gateway(tmp_path, telemetry={"metrics_port": 0}) as running:
        caplog.clear()
        yield running


def ends(caplog: pytest.LogCaptureFixture, request_id: str | None) -> list[dict[str, Any]]:
    """The lines that tell of the end of this generation."""
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    return [
        line
        for line in lines
        if line.get("request_id") == request_id and line["message"].startswith("generation ")
    ]


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        (
            {"error_event": "what of a-secret-prompt"},
            "INVALID_ARGUMENT",
            "a field is wrong or above a ceiling",
        ),
        ({"refuse_status": 500}, "UNAVAILABLE", "worker WORKER answered generate with status 500"),
        ({"cut_after_tokens": 3}, "UNAVAILABLE", "worker WORKER was lost while it answered"),
        ({"abort_after_tokens": 3}, "ABORTED", "the worker gave the request up"),
    ],
)
async def test_the_log_says_why_one_failed_and_where(
    seen: Running, caplog: pytest.LogCaptureFixture, fault: dict[str, Any], code: str, reason: str
) -> None:
    """In words of our own: the worker's might quote the prompt."""
    for name, value in fault.items():
        setattr(seen.worker.faults, name, value)
    with pytest.raises(VaseError) as error:
        await seen.client.generate_once("a-secret-prompt", max_new_tokens=10)
    (line,) = ends(caplog, error.value.request_id)
    worker = seen.worker.url
    assert (line["level"], line["status"], line["code"]) == ("warning", "failed", code)
    assert line["worker"] == worker
    told = f"failed on worker {worker}: {code}: {reason.replace('WORKER', worker)}"
    assert told in line["message"]
    for said in ("secret-prompt", "refused on order", "out of luck"):
        assert said not in caplog.text


async def test_the_log_tells_of_those_that_had_no_worker(
    seen: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VaseError) as error:
        await seen.client.generate_once("tell me", max_new_tokens=2, seed=2**63 - 1, top_p=7.0)
    (line,) = ends(caplog, error.value.request_id)
    assert (line["level"], line["code"]) == ("info", "INVALID_ARGUMENT")
    assert "top_p" not in line["message"]
    monkeypatch.setattr(worker_http, "SHORT_TIMEOUT", 0.1)
    seen.worker.faults.tokenizing_seconds = 1
    with pytest.raises(Unavailable) as error:
        await seen.client.generate_once("tell me", max_new_tokens=2)
    (line,) = ends(caplog, error.value.request_id)
    assert (line["level"], line["code"]) == ("warning", "UNAVAILABLE")
    assert f"had a worker: UNAVAILABLE: worker {seen.worker.url} did not token" in line["message"]


async def test_one_that_was_left_is_no_warning(
    seen: Running, caplog: pytest.LogCaptureFixture
) -> None:
    seen.worker.token_seconds = 0.01
    stream = seen.client.generate("tell me", max_new_tokens=4000)
    await stream.started()
    stream.cancel()
    await seen.worker.wait_for_abort()
    await until(lambda: ends(caplog, stream.request_id))
    (line,) = ends(caplog, stream.request_id)
    assert (line["level"], line["status"], line["code"]) == ("info", "aborted", "CANCELLED")


async def test_an_answer_whose_record_is_lost_did_not_complete(
    seen: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any, **__: Any) -> None:
        raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("disk is full"))

    monkeypatch.setattr(seen.gateway._store, "_write", full)
    with pytest.raises(Unavailable) as error:
        await seen.client.generate_once("tell me", max_new_tokens=3)
    (line,) = ends(caplog, error.value.request_id)
    assert (line["level"], line["status"], line["code"]) == ("warning", "failed", "UNAVAILABLE")
    assert "the audit store cannot be written now" in line["message"]
    assert "Traceback" not in caplog.text and "completed" not in caplog.text
    counted = await scrape(seen)
    assert {key[1:] for key in counted if key[0] == DURATIONS} == {
        tuple(sorted((*LABELS, "UNAVAILABLE")))
    }
    assert counted["vase_audit_commit_duration_seconds_count",] == 1


async def test_one_that_fails_unrecorded_keeps_its_own_error(
    seen: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any, **__: Any) -> None:
        raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("disk is full"))

    monkeypatch.setattr(seen.gateway._store, "_write", full)
    seen.worker.faults.abort_after_tokens = 3
    with pytest.raises(VaseError, match="the worker gave the request up") as error:
        await seen.client.generate_once("tell me", max_new_tokens=9)
    (line,) = ends(caplog, error.value.request_id)
    assert (line["status"], line["code"]) == ("failed", "ABORTED")


async def test_a_defect_is_not_taken_for_the_clients_leaving(
    seen: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("vase_sgl.gateway.deltas.OutputDeltas.take_text", broken)
    with pytest.raises(VaseError) as error:
        await seen.client.generate_once("tell me", max_new_tokens=3)
    assert error.value.code == "INTERNAL" and error.value.request_id is not None
    record = await seen.client.get_record(error.value.request_id)
    assert (record.status, record.failure) == ("failed", "a defect inside the gateway")
    (line,) = ends(caplog, error.value.request_id)
    assert (line["level"], line["code"]) == ("warning", "INTERNAL")
    assert (await scrape(seen))[DURATIONS, *sorted((*LABELS, "INTERNAL"))] == 1


async def test_the_first_token_is_counted_when_it_comes(seen: Running) -> None:
    seen.worker.token_seconds = 0.01
    stream = seen.client.generate("tell me", max_new_tokens=4000)
    await anext(aiter(stream))
    counted = await scrape(seen)
    assert counted["gen_ai_server_time_to_first_token_seconds_count", *LABELS] == 1
    assert not [key for key in counted if key[0] == DURATIONS]
    stream.cancel()
    await seen.worker.wait_for_abort()


async def test_a_slow_store_is_told_of(
    seen: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = seen.gateway._store._write

    async def slow(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(0.3)
        return await write(*arguments, **options)

    await seen.client.generate_once("tell me", max_new_tokens=2)
    assert "is slow" not in caplog.text
    monkeypatch.setattr(store, "_SLOW_SECONDS", 0.1)
    monkeypatch.setattr(seen.gateway._store, "_write", slow)
    await seen.client.generate_once("tell me", max_new_tokens=2)
    assert caplog.text.count("the audit store is slow: 1 records took ") == 1
    counted = await scrape(seen)
    assert counted["vase_audit_commit_duration_seconds_count",] == 2
    assert counted["vase_audit_commit_duration_seconds_sum",] > 0.3


async def test_the_log_says_which_worker_another_one_stood_in_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedWorker() as other, ScriptedWorker() as failing:
        failing.faults.refuse_status = 500
        workers = {"urls": [failing.url, other.url]}
        async with run_gateway(tmp_path, worker=workers) as running:
            await until(lambda: len(running.gateway._router.ready()) == 2)
            for _ in range(2):  # in turn
                await running.client.generate_once("tell me", max_new_tokens=2)
    told = f"{failing.url} to another: worker {failing.url} answered generate with status 500"
    assert any(message.endswith(told) for message in caplog.messages)
    assert "refused on order" not in caplog.text
