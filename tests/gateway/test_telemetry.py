"""Spans: what they say, and what they never say."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.gateway.running import Running
from vase_sgl.client import InvalidRequest
from vase_sgl.gateway import telemetry
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", telemetry._tracer)  # is put back
    telemetry.use(provider)
    yield exporter
    provider.shutdown()


async def test_generate_and_replay_have_spans(
    running: Running, spans: InMemorySpanExporter
) -> None:
    answer = await running.client.generate_once(
        "a-secret-prompt", max_new_tokens=60, budget=32, window=8, policy="random"
    )
    await running.client.replay(answer.request_id).verdict()
    (generate,) = [s for s in spans.get_finished_spans() if s.name == "vase.generate"]
    (replay,) = [s for s in spans.get_finished_spans() if s.name == "vase.replay"]
    eviction = {
        "vase.tenant": "alice",
        "vase.policy": "random",
        "vase.budget": 32,
        "vase.rounds": 3,
    }
    assert (generate.name, dict(generate.attributes or {})) == ("vase.generate", eviction)
    assert replay.name == "vase.replay"
    assert dict(replay.attributes or {}) == {**eviction, "vase.outcome": "match"}
    told = "".join(s.to_json() for s in spans.get_finished_spans())
    for secret in ("secret-prompt", running.key, str(answer.result.seeds.sampling)):
        assert secret not in told


async def test_a_failed_call_says_only_what_kind(
    running: Running, spans: InMemorySpanExporter
) -> None:
    with pytest.raises(InvalidRequest):
        await running.client.generate_once("tell me", max_new_tokens=-12345)
    (span,) = spans.get_finished_spans()
    assert span.status.description == "InvalidRequest" and "12345" not in span.to_json()


def test_a_span_of_the_server_s_own_instrumentation_stays() -> None:
    with TracerProvider().get_tracer("server").start_as_current_span("call") as span:
        headers = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
        with telemetry.caller(headers):
            assert trace.get_current_span() is span


async def test_without_a_provider_the_caller_s_trace_still_reaches_the_worker(
    running: Running,
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with grpc.aio.insecure_channel(running.target) as channel:
        request = pb.GenerateRequest(text="hello", max_new_tokens=1)
        metadata = (("authorization", f"Bearer {running.key}"), ("traceparent", parent))
        call = gateway_pb2_grpc.VaseGatewayStub(channel).Generate(request, metadata=metadata)
        assert [message async for message in call]
    assert running.worker.traceparents == [parent]
