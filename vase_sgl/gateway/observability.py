"""Where spans and metrics go: an OTLP collector, a page for Prometheus, both, or where the
environment of the process sends its own, as `opentelemetry-instrument` sets it up."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import (
    CardinalityLimits,
    MetricReader,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from vase_sgl import __version__
from vase_sgl.gateway import logs, telemetry
from vase_sgl.gateway.config import TelemetrySection

#: Seconds for one message to the collector.
_EXPORT_SECONDS = 3.0
#: Seconds for what is left at the end: a collector that is away does not hold up a restart.
_LAST_SECONDS = 5.0
#: Series in one message. gRPC servers, collectors among them, take 4 MiB unless told otherwise, and
#: a histogram with its labels is some 500 bytes.
_BATCH = 2000
#: Label sets of one metric. OpenTelemetry's 2000 are those of some 250 tenants; all further ones
#: get a single series, without a tenant.
_LABEL_SETS = 100_000
_LIMITS: CardinalityLimits = {Counter: _LABEL_SETS, Histogram: _LABEL_SETS}


class Observability:
    """The providers of one gateway."""

    def __init__(self, settings: TelemetrySection) -> None:
        resource = Resource.create(
            {SERVICE_NAME: settings.service_name, SERVICE_VERSION: __version__}
        )
        self._registry = CollectorRegistry()
        self._page: web.AppRunner | None = None
        self._scraping = asyncio.Lock()
        self._tracers: TracerProvider | None = None
        self._spans: OTLPSpanExporter | None = None
        readers: list[MetricReader] = []
        if settings.metrics_port is not None:
            # Without labels that say on every line what is the same for all.
            readers.append(
                PrometheusMetricReader(
                    scope_info_enabled=False, registry=self._registry, cardinality_limits=_LIMITS
                )
            )
        if settings.otlp_endpoint is not None:
            collector: dict[str, Any] = {
                "endpoint": settings.otlp_endpoint,
                "insecure": settings.otlp_endpoint.startswith("http://"),
                "timeout": _EXPORT_SECONDS,
            }
            readers.append(
                PeriodicExportingMetricReader(
                    OTLPMetricExporter(**collector, max_export_batch_size=_BATCH),
                    export_interval_millis=settings.export_interval_seconds * 1000,
                    cardinality_limits=_LIMITS,
                )
            )
            self._spans = OTLPSpanExporter(**collector)
            self._tracers = TracerProvider(resource=resource)
            self._tracers.add_span_processor(
                BatchSpanProcessor(
                    self._spans, schedule_delay_millis=settings.export_interval_seconds * 1000
                )
            )
        telemetry.use(self._tracers or _tracers_of_the_environment())
        self._meters = MeterProvider(readers, resource) if readers else None

    @property
    def meters(self) -> metrics.MeterProvider:
        """Where the gateway's instruments come from."""
        return self._meters or metrics.get_meter_provider()  # the environment's, if it has one

    async def open_page(self, host: str, port: int) -> int:
        """Serve /metrics for Prometheus; the port that was taken. Raises `OSError`."""
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._page = web.AppRunner(
            app, access_log=None, logger=logs.http_server_logger(), shutdown_timeout=1.0
        )
        await self._page.setup()
        await web.TCPSite(self._page, host, port).start()
        return int(self._page.addresses[0][1])

    async def close(self) -> None:
        """Send what is left, within seconds, and stop."""
        if self._page is not None:
            await self._page.cleanup()
        telemetry.use(None)
        await asyncio.gather(self._close_tracers(), self._close_meters())

    async def _close_tracers(self) -> None:
        if self._tracers is None or self._spans is None:
            return
        closing = asyncio.create_task(asyncio.to_thread(self._tracers.shutdown))
        await asyncio.wait({closing}, timeout=_LAST_SECONDS)
        if not closing.done():
            self._spans.shutdown()  # which ends the message under way and those that wait
        await closing

    async def _close_meters(self) -> None:
        if self._meters is not None:
            await asyncio.to_thread(self._meters.shutdown, timeout_millis=_LAST_SECONDS * 1000)

    async def _answer(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        # Streams go on meanwhile, if slowly: the page takes most of the interpreter's time until it
        # is done. One at a time, as two would take lines from each other.
        async with self._scraping:
            body = await asyncio.to_thread(encode, self._registry)
        return web.Response(body=body, headers={"Content-Type": content_type})


def _tracers_of_the_environment() -> trace.TracerProvider | None:
    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else provider
