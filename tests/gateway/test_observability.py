"""Spans and metrics at a real OTLP receiver, the page for Prometheus, and the logs of a process."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.otlp_receiver import attributes, otlp_receiver
from tests.gateway.running import Running, add_tenant, run_gateway, until_ready
from tests.gateway.scripted_worker import ScriptedWorker
from tests.gateway.test_serve_command import run_python, serve, target_of
from vase_sgl.client import (
    NEVER,
    AsyncClient,
    AuthenticationError,
    RateLimited,
    Unavailable,
    VaseError,
)
from vase_sgl.gateway import logs, observability, tenants
from vase_sgl.gateway.config import TelemetrySection
from vase_sgl.gateway.listening import PortInUse
from vase_sgl.gateway.metrics import Metrics
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


async def test_a_trace_goes_from_the_caller_to_the_worker(tmp_path: Path) -> None:
    async with (
        otlp_receiver() as collector,
        run_gateway(
            tmp_path, http={"port": 0}, telemetry={"otlp_endpoint": collector.url}
        ) as running,
    ):
        async with grpc.aio.insecure_channel(running.target) as channel:
            request = pb.GenerateRequest(
                text="tell me",
                max_new_tokens=60,
                eviction=pb.EvictionParams(budget=32, window=8, policy="random"),
            )
            answer = await gateway_pb2_grpc.VaseGatewayStub(channel).GenerateOnce(
                pb.GenerateOnceRequest(request=request),
                metadata=(
                    ("authorization", f"Bearer {running.key}"),
                    ("traceparent", TRACEPARENT),
                ),
            )
        headers = {"Authorization": f"Bearer {running.key}", "traceparent": TRACEPARENT}
        body: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "a"}]}
        async with aiohttp.ClientSession(headers=headers) as http:
            url = f"{running.http_url}/v1/chat/completions"
            assert (await http.post(url, json=body | {"max_tokens": 2})).status == 200
        await running.gateway.stop()  # sends what is left

        calls = collector.spans("vase.generate")
        assert len(calls) == 2
        for span in calls:
            assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == "b7ad6b7169203331"
        call = calls[0]
        (queue, _) = collector.spans("vase.queue")
        (worker,) = collector.spans("text_completion scripted")
        assert len(collector.spans("chat scripted")) == 1
        assert queue.parent_span_id == worker.parent_span_id == call.span_id
        assert call.start_time_unix_nano <= queue.start_time_unix_nano
        assert queue.end_time_unix_nano <= worker.start_time_unix_nano
        assert running.worker.traceparents[0] == f"00-{TRACE}-{worker.span_id.hex()}-01"
        assert dict(attributes(worker)) == {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "vase_sgl",
            "gen_ai.request.model": "scripted",
            "gen_ai.request.max_tokens": 60,
            "gen_ai.request.temperature": 1.0,
            "gen_ai.request.top_p": 1.0,
            "gen_ai.response.id": answer.request_id,
            "gen_ai.usage.input_tokens": 2,
            "gen_ai.usage.output_tokens": 60,
            "gen_ai.response.finish_reasons": ["length"],
            "vase.worker": running.worker.url,
        }
        rounds = [dict(attributes(event)) for event in worker.events]
        assert [event.name for event in worker.events] == ["vase.eviction_round"] * 3
        assert [(r["vase.round"], r["vase.physical_length"]) for r in rounds] == [
            (1, 32),
            (2, 32),
            (3, 32),
        ]
        told = "".join(str(span) for span in collector.spans())
        assert str(answer.result.seeds.sampling) not in told and running.key not in told

        sent = collector.latest_metrics()
        for name in (
            "gen_ai.server.request.duration",
            "gen_ai.server.time_to_first_token",
            "gen_ai.server.time_per_output_token",
            "gen_ai.client.token.usage",
            "vase.queue.duration",
            "vase.requests",
        ):
            assert name in sent
        points = sent["gen_ai.client.token.usage"].histogram.data_points
        usage = {
            (a["gen_ai.operation.name"], a["gen_ai.token.type"]): point.sum
            for point in points
            for a in (dict(attributes(point)),)
        }
        assert usage["text_completion", "input"] == 2 and usage["text_completion", "output"] == 60
        assert usage["chat", "output"] == 2


#: A process whose environment brings providers, as `opentelemetry-instrument` does.
INSTRUMENTED = """
import sys
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from vase_sgl.cli import main

endpoint = sys.argv.pop(1)
tracers = TracerProvider()
tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, insecure=True)))
trace.set_tracer_provider(tracers)
reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint, insecure=True))
metrics.set_meter_provider(MeterProvider([reader]))
main()
"""


async def test_providers_of_the_environment_are_used(tmp_path: Path) -> None:
    key = add_tenant(tmp_path / ".vase-sgl" / "tenants.yaml", "alice")
    async with otlp_receiver() as collector, ScriptedWorker() as worker:
        options = ("serve", "--worker-url", worker.url, "--grpc-port", "0")
        async with run_python(tmp_path, "-c", INSTRUMENTED, collector.url, *options) as process:
            async with AsyncClient(await target_of(process), key, retry=NEVER) as client:
                await until_ready(client)
                await client.generate_once("tell me", max_new_tokens=2)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0
        assert len(collector.spans("vase.generate")) == 1
        assert "vase.requests" in collector.latest_metrics()


class Forger(ScriptedWorker):
    """A worker that is down, and would have that look like something else."""

    async def _health(self, request: web.Request) -> web.Response:
        await super()._health(request)
        return web.Response(status=503, text="down\r\n2026-01-01 INFO vase_sgl: all is well")


async def test_nobody_writes_a_line_of_the_log(tmp_path: Path) -> None:
    add_tenant(tmp_path / ".vase-sgl" / "tenants.yaml", "alice")
    async with Forger() as worker:
        options = ("--worker-url", worker.url, "--grpc-port", "0")
        async with serve(tmp_path, *options) as process:
            await target_of(process)
            assert process.stderr is not None
            async with asyncio.timeout(20):
                while b"is not ready" not in (line := await process.stderr.readline()):
                    assert line
    assert line.endswith(b": down\\r\\n2026-01-01 INFO vase_sgl: all is well\n")


async def scrape(running: Running) -> dict[tuple[str, ...], float]:
    """(sample name, sorted label values) -> value."""
    url = f"http://127.0.0.1:{running.gateway.metrics_port}/metrics"
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        assert answer.status == 200
        text = await answer.text()
    return {
        (s.name, *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def test_the_page_for_prometheus(tmp_path: Path) -> None:
    section = {"metrics_port": 0}
    breaker = {"breaker": {"failures": 1}}
    async with run_gateway(tmp_path, telemetry=section, worker=breaker) as running:
        worker = running.worker.url
        await running.client.generate_once(
            "tell me", max_new_tokens=60, budget=32, window=8, policy="random"
        )
        with pytest.raises(VaseError):
            await running.client.generate_once("tell me", max_new_tokens=0)
        limited = running.add_tenant("bob", limits={"requests_per_second": 0.1})
        async with AsyncClient(running.target, limited, retry=NEVER) as bob:
            await bob.generate_once("tell me", max_new_tokens=1)
            with pytest.raises(RateLimited):
                await bob.generate_once("tell me", max_new_tokens=1)
        async with AsyncClient(running.target, "vsk_unknown", retry=NEVER) as nobody:
            with pytest.raises(AuthenticationError):
                await nobody.generate_once("tell me")
        running.worker.token_seconds = 1  # its first comes after the scrape
        stream = running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        seen = await scrape(running)
        assert seen["vase_requests_total", "OK", "alice", "generate"] == 1
        assert seen["vase_requests_total", "INVALID_ARGUMENT", "alice", "generate"] == 1
        assert seen["vase_requests_total", "OK", "bob", "generate"] == 1
        assert seen["vase_requests_total", "RESOURCE_EXHAUSTED", "bob", "generate"] == 1
        assert seen["vase_rejections_total", "bob", "requests"] == 1
        assert seen["vase_rejections_total", "", "unauthenticated"] == 1
        assert seen["vase_eviction_rounds_total", "alice", "random"] == 3
        assert seen["vase_eviction_tokens_total", "alice", "random"] == 24
        assert seen["vase_queue_duration_seconds_count",] == 3
        assert seen["vase_tokens_total", "alice", "input"] == 2
        assert seen["vase_tokens_total", "alice", "output"] == 60
        assert seen["vase_requests_open",] == 1 and seen["vase_worker_in_flight", worker] == 1
        assert seen["vase_worker_breaker", "closed", worker] == 1
        labels = ("scripted", "text_completion", "vase_sgl")
        assert seen["gen_ai_server_time_to_first_token_seconds_count", *labels] == 2
        assert seen["gen_ai_server_time_per_output_token_seconds_count", *labels] == 1
        assert {"alice", "bob", ""} >= {
            key[1] for key in seen if key[0].startswith("vase_rejections")
        }

        stream.cancel()
        await running.worker.wait_for_abort()
        running.worker.faults.refuse_status = 500
        with pytest.raises(Unavailable):
            await running.client.generate_once("tell me", max_new_tokens=1)
        seen = await scrape(running)
        assert seen["vase_worker_breaker", worker, "open"] == 1
        assert seen["vase_worker_breaker", "closed", worker] == 0
        assert seen["vase_requests_total", "UNAVAILABLE", "alice", "generate"] == 1
        assert seen["vase_requests_total", "CANCELLED", "alice", "generate"] == 1
        assert seen["vase_requests_open",] == 0

        taken = {"metrics_port": running.gateway.metrics_port}
        (tmp_path / "other").mkdir()
        with pytest.raises(PortInUse, match="--metrics-port"):
            async with run_gateway(tmp_path / "other", telemetry=taken):
                pass


@asynccontextmanager
async def page() -> AsyncIterator[tuple[Metrics, Callable[[], Awaitable[str]]]]:
    """Instruments, and a scrape of them."""
    seen = observability.Observability(TelemetrySection(metrics_port=0))
    url = f"http://127.0.0.1:{await seen.open_page('127.0.0.1', 0)}/metrics"
    async with aiohttp.ClientSession() as http:

        async def scraped() -> str:
            async with http.get(url) as answer:
                return await answer.text()

        yield Metrics(seen.meters), scraped
    await seen.close()


async def test_streams_go_on_while_the_page_is_made() -> None:
    async with page() as (metrics, scrape_page):
        went_on = threading.Event()
        seen: list[bool] = []

        def waiting() -> int:
            seen.append(went_on.wait(5))
            return 7

        metrics.watch(list, waiting)
        scrapes = [asyncio.create_task(scrape_page()) for _ in range(3)]
        await asyncio.sleep(0.1)
        went_on.set()
        pages = await asyncio.gather(*scrapes)
        assert seen == [True] * 3
        # At the same time too, each has every line, once.
        assert all(text.count("\nvase_queue_waiting 7.0\n") == 1 for text in pages)
        assert not any("otel_scope" in text for text in pages)


@pytest.mark.parametrize("by_tenant", [False, True])
async def test_histograms_tell_tenants_apart_on_demand(tmp_path: Path, by_tenant: bool) -> None:
    section = {"metrics_port": 0, "tenant_histograms": by_tenant}
    async with run_gateway(tmp_path, telemetry=section) as running:
        await running.client.generate_once("tell me", max_new_tokens=2)
        seen = await scrape(running)
    histograms = {
        key[0]: "alice" in key
        for key in seen
        if key[0].endswith("_bucket") and "commit" not in key[0]
    }
    assert len(histograms) == 5 and set(histograms.values()) == {by_tenant}
    counters = {key[0] for key in seen if key[0].endswith("_total") and "alice" in key}
    assert {"vase_requests_total", "vase_tokens_total"} <= counters


async def test_no_tenant_of_many_is_left_out() -> None:
    outcomes = ("OK", "CANCELLED", "UNAVAILABLE")
    async with otlp_receiver() as collector:
        seen = observability.Observability(
            TelemetrySection(metrics_port=0, otlp_endpoint=collector.url)
        )
        metrics = Metrics(seen.meters, tenant_histograms=True)
        for number in range(1000):
            for outcome in outcomes:
                metrics.ended(f"tenant-{number}", "generate", outcome)
            for operation in ("chat", "text_completion"):
                metrics.answered(f"tenant-{number}", operation, {"model": "m" * 100}, 0.1)
        families = {family.name: family for family in seen._registry.collect()}
        await seen.close()
        sent = collector.latest_metrics()
        # gRPC servers take 4 MiB unless told otherwise.
        assert len(collector.metrics) > 1
        assert all(message.ByteSize() < 2 * 2**20 for message in collector.metrics)
    tenants = {f"tenant-{number}" for number in range(1000)}
    requests = families["vase_requests"].samples
    assert len(requests) == 3000 and {s.labels["vase_tenant"] for s in requests} == tenants
    assert len(sent["vase.requests"].sum.data_points) == 3000


async def test_what_a_full_gateway_refuses_is_counted(tmp_path: Path) -> None:
    async with run_gateway(
        tmp_path,
        telemetry={"metrics_port": 0},
        grpc={"max_concurrent_calls": 1},
        http={"port": 0},
    ) as running:
        running.worker.token_seconds = 0.02
        stream = running.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        with pytest.raises(RateLimited):
            await running.client.capacity()
        assert (await scrape(running))["vase_rejections_total", "", "calls"] == 1
        body = {"model": "scripted", "prompt": "tell me", "max_tokens": 4000, "stream": True}
        headers = {"Authorization": f"Bearer {running.key}"}
        url = f"{running.http_url}/v1/completions"
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.post(url, json=body),
            http.get(f"{running.http_url}/v1/models") as refused,
        ):
            assert refused.status == 429
        assert (await scrape(running))["vase_rejections_total", "", "calls"] == 2
        stream.cancel()


def test_both_formats_date_a_line_alike() -> None:
    record = logging.makeLogRecord({"msg": "x", "created": 1_700_000_000.25})
    date = "2023-11-14T22:13:20.250+00:00"
    assert json.loads(logs.JsonFormatter().format(record))["time"] == date
    assert logs.TextFormatter().format(record).startswith(f"{date} ")


async def test_the_logs_of_a_process_are_json_and_hold_no_secrets(tmp_path: Path) -> None:
    """Everything it says at level debug, over a run with good, bad and failing calls."""
    file = tmp_path / ".vase-sgl" / "tenants.yaml"
    key = add_tenant(file, "alice")
    async with ScriptedWorker() as worker:
        options = ("--worker-url", worker.url, "--grpc-port", "0", "--log-level", "debug")
        async with serve(tmp_path, *options, "--log-format", "json") as process:
            target = await target_of(process)
            async with AsyncClient(target, key, retry=NEVER) as client:
                await until_ready(client)
                answer = await client.generate_once("a-secret-prompt", max_new_tokens=4, seed=98765)
                await client.replay(answer.request_id).verdict()
                worker.faults.refuse_status = 500
                with pytest.raises(VaseError):
                    await client.generate_once("a-secret-prompt", max_new_tokens=4, seed=98765)
                with pytest.raises(VaseError):
                    await client.generate_once("a-secret-prompt", max_new_tokens=-7)
            async with AsyncClient(target, key[:-1] + "z", retry=NEVER) as wrong:
                with pytest.raises(VaseError):
                    await wrong.capacity()
            process.send_signal(signal.SIGTERM)
            _, errors = await asyncio.wait_for(process.communicate(), 20)
    text = errors.decode()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line for line in text.splitlines() if not line.startswith("{")] == [
        "draining; once more to stop at once"
    ]
    done = [line for line in lines if line.get("status") == "completed"]
    assert [(d["tenant"], d["request_id"]) for d in done] == [("alice", answer.request_id)]
    assert done[0]["output_tokens"] == 4 and done[0]["level"] == "info"
    assert any(line.get("status") == "failed" for line in lines)
    (tenant,) = tenants.load(file).tenants
    seeds = answer.result.seeds
    for secret in (
        key,
        key.split("_")[2],
        "secret-prompt",
        "98765",
        str(seeds.sampling),
        str(seeds.eviction),
        tenant.master.secret,
        tenant.keys[0].hash,
        answer.text.split()[0],
    ):
        assert secret not in text


@pytest.mark.parametrize(("last", "most"), [(observability._LAST_SECONDS, 5.0), (0.3, 2.0)])
async def test_a_collector_that_does_not_answer_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, most: float
) -> None:
    """Each message has a time of its own, and all that are left have one together."""
    monkeypatch.setattr(observability, "_LAST_SECONDS", last)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with run_gateway(tmp_path, telemetry={"otlp_endpoint": endpoint}) as running:
            await running.client.generate_once("tell me", max_new_tokens=2)
            begun = time.monotonic()
            await running.gateway.stop()
            assert time.monotonic() - begun < most


@pytest.mark.parametrize(
    "text",
    [
        "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer KEY\r\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nAuthorization Bearer KEY\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer KEY\r\n"
        'Transfer-Encoding: chunked\r\n\r\n{"prompt": "a-secret-prompt"}\r\n',
    ],
    ids=["carriage return", "no colon", "no chunk size"],
)
async def test_what_is_no_http_is_not_quoted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    caplog.set_level(logging.DEBUG, "vase_sgl")
    ports = {"http": {"port": 0}, "telemetry": {"metrics_port": 0}}
    async with run_gateway(tmp_path, **ports) as running:
        for port in (running.gateway.http_port, running.gateway.metrics_port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(text.replace("KEY", running.key).encode())
            async with asyncio.timeout(10):
                assert b" 400 " in await reader.readline()
            writer.close()
        for secret in (running.key, running.key.split("_")[2], "secret-prompt"):
            assert secret not in caplog.text
        assert caplog.text.count("Error handling request from 127.0.0.1: ") == 2
