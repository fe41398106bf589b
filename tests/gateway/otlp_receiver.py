"""A real OTLP receiver: what a collector is sent over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


class OtlpReceiver:
    """Keeps every span and metric, as the protocol's own messages."""

    def __init__(self) -> None:
        self.url = ""
        self.traces: list[trace_pb.ExportTraceServiceRequest] = []
        self.metrics: list[metrics_pb.ExportMetricsServiceRequest] = []

    def spans(self, name: str | None = None) -> list[Any]:
        """Every span, or those of this name."""
        return [
            span
            for request in self.traces
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if name in (None, span.name)
        ]

    def latest_metrics(self) -> dict[str, Any]:
        """The metrics by name, as last sent, in however many messages."""
        latest: dict[str, Any] = {}
        sent = (
            metric
            for request in self.metrics
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        )
        for metric in sent:
            known = latest.get(metric.name)
            if known is None or _time(known) != _time(metric):
                latest[metric.name] = known = type(metric)()
            known.MergeFrom(metric)
        return latest


@asynccontextmanager
async def otlp_receiver() -> AsyncIterator[OtlpReceiver]:
    """A receiver at `url`, for the body."""
    receiver = OtlpReceiver()

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:
            receiver.traces.append(request)
            return trace_pb.ExportTraceServiceResponse()

    class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:
            receiver.metrics.append(request)
            return metrics_pb.ExportMetricsServiceResponse()

    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    receiver.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(None)


def _time(metric: Any) -> int:
    """When the points of a metric were collected, all of them at once."""
    return int(getattr(metric, metric.WhichOneof("data")).data_points[0].time_unix_nano)


def attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of a span, an event or a data point."""
    for attribute in holder.attributes:
        value = attribute.value
        kind = value.WhichOneof("value")
        if kind == "array_value":
            yield attribute.key, [v.string_value for v in value.array_value.values]
        else:
            yield attribute.key, getattr(value, kind)
