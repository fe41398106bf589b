"""Workers that fail: the client gets a status and a text, the record says what happened."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import NEVER, AsyncClient, Client, InvalidRequest, Unavailable, VaseError
from vase_sgl.gateway import logs, worker_answers, worker_http
from vase_sgl.gateway.audit import AuditStore
from vase_sgl.gateway.config import load_config
from vase_sgl.gateway.errors import LimitExceeded
from vase_sgl.gateway.listening import PortInUse
from vase_sgl.gateway.server import Gateway


async def health_becomes(channel: grpc.aio.Channel, wanted: int) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(10):
        async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
            if answer.status == wanted:
                return


async def test_health_follows_the_worker(running: Running) -> None:
    async with grpc.aio.insecure_channel(running.target) as channel:
        running.worker.faults.healthy = False
        await health_becomes(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(Unavailable, match=r"no worker is ready: .* status 503"):
            await running.client.generate_once("tell me")
        running.worker.faults.healthy = True
        await health_becomes(channel, health_pb2.HealthCheckResponse.SERVING)
    await running.client.generate_once("tell me", max_new_tokens=2)


async def test_a_worker_that_is_not_there_yet(tmp_path: Path) -> None:
    config = load_config(
        overrides={
            "listen": {"port": 0},
            "worker": {"urls": ["http://127.0.0.1:9"], "health_interval_seconds": 0.1},
            "audit": {"url": f"sqlite+aiosqlite:///{tmp_path / 'audit.sqlite3'}"},
            "insecure_no_auth": True,
        }
    )
    gateway = await Gateway.start(config, lambda seconds: None)
    async with AsyncClient(f"127.0.0.1:{gateway.port}", retry=NEVER) as client:
        with pytest.raises(Unavailable, match="no worker is ready"):
            await client.generate_once("tell me")
        with pytest.raises(Unavailable, match="no worker is ready"):
            await client.capacity()
        assert [r async for r in client.list_records()] == []
    await gateway.stop()


async def test_a_worker_without_the_plugin_is_not_ready(running: Running) -> None:
    running.worker.fingerprint = None  # type: ignore[assignment]
    await running.worker.noticed()
    with pytest.raises(Unavailable, match=r"does not report vase_sgl's state.*`vase-sgl worker`"):
        await running.client.generate_once("tell me")


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (
            {"refuse_status": 400},
            InvalidRequest,
            "the worker refused the request: refused on order",
        ),
        (
            {"refuse_status": 500},
            Unavailable,
            "answered generate with status 500: refused on order",
        ),
        (
            {"error_event": "bad parameter"},
            InvalidRequest,
            "the worker refused the request: bad par",
        ),
        ({"cut_after_tokens": 3}, Unavailable, "was lost while it answered"),
        ({"abort_after_tokens": 3}, VaseError, "the worker gave the request up: out of luck"),
    ],
)
async def test_failures_of_a_generation(
    running: Running, fault: dict[str, object], kind: type[VaseError], text: str
) -> None:
    for name, value in fault.items():
        setattr(running.worker.faults, name, value)
    stream = running.client.generate("tell me", max_new_tokens=10)
    with pytest.raises(kind) as error:
        _ = [chunk async for chunk in stream]
    assert text in str(error.value)
    record = await running.client.get_record(stream.request_id)
    assert record.status == "failed" and text in record.failure
    tokens = fault.get("cut_after_tokens") or fault.get("abort_after_tokens") or 0
    assert len(record.output_token_ids) == tokens
    for name in fault:
        setattr(running.worker.faults, name, None)
    await running.client.generate_once("tell me", max_new_tokens=2)


async def test_a_worker_lost_after_its_last_token_answered(running: Running) -> None:
    """Before the mark of its stream's end; the breaker knows nothing of it either."""
    running.worker.faults.cut_before_done = True
    for _ in range(6):  # more failures than the breaker takes
        stream = running.client.generate("tell me", max_new_tokens=6)
        assert sum([len(chunk.token_ids) async for chunk in stream]) == 6
        assert stream.result.finish_reason == "length"
        record = await running.client.get_record(stream.request_id)
        assert record.status == "completed" and len(record.output_token_ids) == 6
    verdict = await running.client.replay(stream.request_id).verdict()
    assert verdict.outcome == "MATCH"


@pytest.mark.parametrize("what", ["tokens", "text"])
async def test_a_worker_that_sends_more_than_was_asked_for_is_cut_off(
    running: Running, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """And charged for what was; a replay of it ends as well."""
    answer = await running.client.generate_once("tell me", max_new_tokens=5)
    usage = running.gateway._admissions._usage
    charged: list[int] = []

    async def leave(*arguments: Any) -> None:
        charged.append(arguments[-1])

    monkeypatch.setattr(usage, "leave", leave)
    key = running.add_tenant("bob", limits={"tokens_per_minute": 60})
    if what == "tokens":
        running.worker.faults.unasked_tokens = 2000
    else:
        running.worker.padding = worker_answers.MAX_TOKEN_CHARS
    running.worker.token_seconds = 0.002
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        stream, tokens = bob.generate("tell me", max_new_tokens=5), 0
        with pytest.raises(Unavailable, match=f"answered with more {what} than"):
            async for chunk in stream:
                tokens += len(chunk.token_ids)
        record = await bob.get_record(stream.request_id)
    assert tokens == len(record.output_token_ids) == (5 if what == "tokens" else 0)
    assert record.status == "failed" and f"more {what} than" in record.failure
    assert charged == [2 + tokens if tokens else 0]
    assert await running.worker.wait_for_abort() == stream.request_id
    with pytest.raises(Unavailable, match=f"answered with more {what} than"):
        await running.client.replay(answer.request_id).verdict()
    await running.worker.wait_for_abort_of(2)


class EndlessError(ScriptedWorker):
    """A worker that does not stop to say what went wrong."""

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(bytes(2**20))
        return response


class LongError(ScriptedWorker):
    """A worker that quotes all of what it did not like."""

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no: " + "語" * 100_000}}, status=400)


class OtherShape(ScriptedWorker):
    """A worker whose events are not SGLang's."""

    async def _stream(self, body: dict[str, Any], response: web.StreamResponse) -> None:
        meta = {"completion_tokens": 1, "finish_reason": None, "vase": "none"}
        event = {"text": "a", "output_ids": [1], "meta_info": meta}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


class EndsEarly(ScriptedWorker):
    """A worker that ends its stream in good order, and says no reason why."""

    async def _stream(self, body: dict[str, Any], response: web.StreamResponse) -> None:
        meta = {"completion_tokens": 1, "finish_reason": None}
        event = {"text": "a", "output_ids": [1], "meta_info": meta}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (EndsEarly, Unavailable, "ended the answer early; it may be restarting"),
        (EndlessError, Unavailable, "gave an answer that cannot be understood"),
        (LongError, InvalidRequest, "the worker refused the request: no: 語語語"),
        (OtherShape, Unavailable, "gave an answer that cannot be understood"),
    ],
)
async def test_workers_that_answer_too_much_or_otherwise(
    tmp_path: Path, kind: type[ScriptedWorker], error: type[VaseError], text: str
) -> None:
    async with kind() as worker, run_gateway(tmp_path, worker={"urls": [worker.url]}) as running:
        with pytest.raises(error, match=text) as failure:
            await running.client.generate_once("tell me", max_new_tokens=2, timeout=20)
        assert len(str(failure.value).encode()) < 2000
        (summary,) = [record async for record in running.client.list_records()]
        assert summary.status == "failed"


class Elsewhere(ScriptedWorker):
    """A worker that sends its callers to another one."""

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(self.elsewhere)

    elsewhere = ""


async def test_prompts_go_nowhere_but_to_the_workers(tmp_path: Path) -> None:
    async with (
        ScriptedWorker() as other,
        Elsewhere() as worker,
        run_gateway(tmp_path, worker={"urls": [worker.url]}) as running,
    ):
        worker.elsewhere = f"{other.url}/generate"
        with pytest.raises(Unavailable, match="answered generate with status 307"):
            await running.client.generate_once("tell me", max_new_tokens=2)
        assert other.bodies == []


class DeafToAborts(ScriptedWorker):
    """A worker that no longer answers, when it is asked to give a request up."""

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        await asyncio.sleep(3600)
        return web.Response()


async def test_a_worker_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_http, "ABORT_TIMEOUT", 0.2)
    async with DeafToAborts() as worker:
        worker.token_seconds = 0.02
        config: dict[str, Any] = {"worker": {"urls": [worker.url]}, "drain_seconds": 0.1}
        async with run_gateway(tmp_path, **config) as running:
            stream = running.client.generate("tell me", max_new_tokens=4000)
            await stream.started()
            await asyncio.wait_for(running.gateway.stop(), 15)
            assert worker.aborted


def test_one_failure_of_several_generations_is_an_error_of_each() -> None:
    """A batch of records that cannot be written fails all its generations with one exception."""
    shared = LimitExceeded("too many", reason="queue_total", retry_seconds=2.0)
    first, second = (shared.of_generation(name, final=name == "b") for name in "ab")
    assert isinstance(first, LimitExceeded) and str(first) == "too many"
    assert (first.reason, first.retry_seconds) == ("queue_total", 2.0)
    assert (first.request_id, first.final) == ("a", False)
    assert (second.request_id, second.final) == ("b", True)
    assert shared.request_id is None


async def test_what_the_end_cuts_off_is_recorded_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gateway(tmp_path, drain_seconds=0.1) as running:
        append = running.gateway._store.append

        async def slow(record: Any) -> Any:
            await asyncio.sleep(0.3)
            return await append(record)

        monkeypatch.setattr(running.gateway._store, "append", slow)
        running.worker.token_seconds = 0.02
        stream = running.client.generate("tell me", max_new_tokens=4000)
        request_id = await stream.started()
        await running.gateway.stop()
    store = await AuditStore.open(running.audit_url)
    stored = await store.get("alice", request_id)
    assert stored is not None and stored.record.status == "aborted"
    await store.close()


async def test_a_generation_without_a_record_has_no_result(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And can be found in the log, line by line."""
    caplog.handler.setFormatter(logs.JsonFormatter())

    async def full(record: object) -> None:
        raise OSError("disk full at /secret/place")

    monkeypatch.setattr(running.gateway._store, "append", full)
    stream = running.client.generate("tell me", max_new_tokens=3)
    with pytest.raises(VaseError) as error:
        _ = [chunk async for chunk in stream]
    assert error.value.code == "INTERNAL"
    assert str(error.value) == (
        "the generation failed inside the gateway; its log has the reason under the request id "
        f"{stream.request_id}"
    )
    assert error.value.request_id == stream.request_id and error.value.final
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    (line,) = [line for line in lines if line["message"].startswith("a defect in generation")]
    assert line["request_id"] == stream.request_id and line["tenant"] == "alice"
    assert "disk full" in line["error"]


async def test_a_worker_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    async with ScriptedWorker() as worker:
        section = {"urls": [worker.url], "stall_seconds": 0.3}
        async with run_gateway(tmp_path, worker=section) as running:
            worker.token_seconds = 30
            with pytest.raises(Unavailable, match="did not answer in time"):
                await running.client.generate_once("tell me", max_new_tokens=3)
            (aborted,) = [r.record_id async for r in running.client.list_records()]
            assert worker.aborted == [aborted]


async def test_token_ids_that_cannot_be_checked_are_refused(running: Running) -> None:
    """An id outside the vocabulary would end the worker."""
    running.worker.hides_vocabulary = True
    await running.worker.noticed()
    with pytest.raises(InvalidRequest, match="does not report its vocabulary size"):
        await running.client.generate_once([1, 2], max_new_tokens=2)
    await running.client.generate_once("tell me", max_new_tokens=2)


async def test_requests_go_to_workers_in_turn(tmp_path: Path) -> None:
    """No check falls into a request: a worker that says it is busy loses its turn."""
    async with ScriptedWorker() as first, ScriptedWorker() as second:
        workers = {"urls": [first.url, second.url], "health_interval_seconds": 60}
        async with run_gateway(tmp_path, worker=workers) as running:
            await until(lambda: len(running.gateway._router.ready()) == 2)
            for _ in range(4):
                await running.client.generate_once("tell me", max_new_tokens=2)
            assert len(first.bodies) == len(second.bodies) == 2
            assert (await running.client.capacity()).total_slots == 20_000


async def test_requests_go_around_a_dead_worker(tmp_path: Path) -> None:
    async with ScriptedWorker() as first, ScriptedWorker() as second:
        workers = {"urls": [first.url, second.url], "health_interval_seconds": 0.1}
        async with run_gateway(tmp_path, worker=workers) as running:
            await until(lambda: len(running.gateway._router.ready()) == 2)
            first.faults.healthy = False
            await first.noticed()
            for _ in range(3):
                await running.client.generate_once("tell me", max_new_tokens=2)
            assert (len(first.bodies), len(second.bodies)) == (0, 3)


async def test_a_taken_port_is_named(running: Running, tmp_path: Path) -> None:
    config = load_config(
        overrides={
            "listen": {"port": running.gateway.port},
            "worker": {"urls": [running.worker.url]},
            "audit": {"url": f"sqlite+aiosqlite:///{tmp_path / 'other.sqlite3'}"},
            "insecure_no_auth": True,
        }
    )
    with pytest.raises(PortInUse, match=f":{running.gateway.port}: the port is taken"):
        await Gateway.start(config, lambda seconds: None)
    await running.client.generate_once("tell me", max_new_tokens=2)


async def test_a_gateway_that_is_not_there_is_named() -> None:
    with (
        Client("127.0.0.1:9", retry=NEVER) as client,
        pytest.raises(Unavailable, match="check host and port"),
    ):
        await asyncio.to_thread(client.capacity)
