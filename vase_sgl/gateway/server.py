"""The gateway process: start in an order that fails early, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import AsyncExitStack

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vase_sgl.gateway.admission import Admissions
from vase_sgl.gateway.audit import AuditStore, KeyRing
from vase_sgl.gateway.auth import Authenticator, KeyAuthenticator, NoAuthenticator
from vase_sgl.gateway.cache_salt import CacheSalts
from vase_sgl.gateway.config import Audit, ConfigError, GatewayConfig, WorkerSection
from vase_sgl.gateway.discovery import discover, resolve
from vase_sgl.gateway.fair_queue import FairQueue
from vase_sgl.gateway.fleet import Fleet
from vase_sgl.gateway.generation import Generations
from vase_sgl.gateway.health import MAX_WATCHES, GatewayHealth
from vase_sgl.gateway.interceptor import AuthInterceptor
from vase_sgl.gateway.leases import Lease
from vase_sgl.gateway.limits.local import LocalUsage
from vase_sgl.gateway.limits.shared import SharedUsage
from vase_sgl.gateway.limits.usage import Usage
from vase_sgl.gateway.listening import bind, channel_options, open_door, open_page
from vase_sgl.gateway.metrics import Metrics
from vase_sgl.gateway.observability import Observability
from vase_sgl.gateway.openai.door import OpenAIDoor
from vase_sgl.gateway.openai.requests import MAX_SAMPLES
from vase_sgl.gateway.planning import Planner
from vase_sgl.gateway.recording import Recorder
from vase_sgl.gateway.replay import Replays
from vase_sgl.gateway.replay_gate import ReplayGate
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.runs import Background
from vase_sgl.gateway.service import GatewayService
from vase_sgl.gateway.shutdown import Shutdown
from vase_sgl.gateway.tokenizing import Tokenizing
from vase_sgl.gateway.worker_embedded import EmbeddedWorker, Progress, worker_command
from vase_sgl.gateway.worker_http import HttpWorker
from vase_sgl.rpc.v1 import gateway_pb2, gateway_pb2_grpc

logger = logging.getLogger(__name__)

#: Between the end of what still runs and that of its connections: clients are told meanwhile.
_TELLING_SECONDS = 2.0

SERVICE_NAME: str = gateway_pb2.DESCRIPTOR.services_by_name["VaseGateway"].full_name


class Gateway:
    """A running gateway. Made by `start`, ended by `stop`."""

    def __init__(
        self,
        config: GatewayConfig,
        server: grpc.aio.Server,
        store: AuditStore,
        usage: Usage,
        authenticator: Authenticator,
        observability: Observability,
        metrics: Metrics,
        port: int,
    ) -> None:
        self._config = config
        self._observability = observability
        self._metrics = metrics
        self._server = server
        self._store = store
        self._usage = usage
        self._health = GatewayHealth(
            SERVICE_NAME, max(min(MAX_WATCHES, config.grpc.max_concurrent_calls // 4), 1)
        )
        self._background = Background()
        self._shutdown = Shutdown()
        self._embedded = _embedded_worker(config)
        self._fleet = Fleet(
            [self._embedded] if self._embedded else [self._remote(u) for u in config.worker.urls],
            config.worker,
            on_change=self._health.announce,
            on_room=lambda: self._queue.dispatch_soon(),
        )
        self._router = WorkerRouter(self._fleet, affinity_tokens=config.worker.affinity_tokens)
        self._queue: FairQueue[Lease] = FairQueue(
            max_waiting=config.max_waiting,
            max_waiting_per_tenant=config.queue.max_waiting_per_tenant,
            max_wait_seconds=config.queue.max_wait_seconds,
            max_arriving=max(config.grpc.max_concurrent_calls, MAX_SAMPLES),
            sweep=self._router.sweep,
        )
        self._admissions = Admissions(usage, self._queue, self._router, self._background, metrics)
        metrics.watch(self._fleet.statuses, lambda: self._queue.waiting)
        self._tokenizing = Tokenizing(
            retries=config.worker.retries, max_wait_seconds=config.queue.max_wait_seconds
        )
        self._salts = CacheSalts(shared=config.worker.share_prefix_cache)
        self._generations = Generations(
            self._router,
            Planner(
                self._router,
                self._tokenizing,
                self._salts,
                default_eviction=config.default_eviction,
                allow_inspect=config.allow_inspect,
            ),
            Recorder(store, self._background, metrics),
            self._background,
            self._shutdown,
            metrics,
            retries=config.worker.retries,
        )
        self._door = OpenAIDoor(
            authenticator,
            self._admissions,
            self._generations,
            self._router,
            default_max_tokens=config.http.default_max_tokens,
            client_stall_seconds=config.grpc.client_stall_seconds,
            max_body_bytes=config.grpc.max_receive_bytes,
            max_concurrent=config.grpc.max_concurrent_calls,
            on_full=lambda: metrics.rejected("calls"),
        )
        self.port = port
        #: Port of the OpenAI-compatible door. None: it is shut.
        self.http_port: int | None = None
        #: Port of the page for Prometheus. None: there is none.
        self.metrics_port: int | None = None

    @classmethod
    async def start(cls, config: GatewayConfig, progress: Progress) -> Gateway:
        """Bind the port, serve, start the embedded worker and wait for it.

        What can go wrong cheaply goes first: tenants, port, Redis and store before the model.
        Health says NOT_SERVING until a worker is ready; remote workers are waited for in the
        background. Raises `TenantFileError`, `PortInUse`, `ConfigError`, `SharedUsageError`,
        `AuditError`, `WorkerStartError`; failed or cancelled, it leaves nothing behind.
        """
        if config.max_waiting >= config.grpc.max_concurrent_calls:
            logger.warning(
                "queue.max_waiting: %d is not below grpc.max_concurrent_calls: %d. Who waits is a "
                "call, so the calls are full before the line is, and whoever comes is refused; "
                "lower the first or raise the second",
                config.max_waiting,
                config.grpc.max_concurrent_calls,
            )
        observability = Observability(config.telemetry)
        metrics = Metrics(
            observability.meters, tenant_histograms=config.telemetry.tenant_histograms
        )
        authenticator: Authenticator = (
            NoAuthenticator()
            if config.insecure_no_auth
            else KeyAuthenticator(config.tenants_file, on_refusal=metrics.rejected)
        )
        server = grpc.aio.server(
            interceptors=[
                AuthInterceptor(
                    authenticator,
                    client_stall_seconds=config.grpc.client_stall_seconds,
                    max_calls=config.grpc.max_concurrent_calls,
                    on_full=lambda: metrics.rejected("calls"),
                )
            ],
            options=channel_options(config.grpc),
        )
        async with AsyncExitStack() as undo:
            undo.push_async_callback(observability.close)
            port = bind(server, config)
            undo.push_async_callback(server.stop, None)
            usage = await _usage(config)
            undo.push_async_callback(usage.close)
            store = await _open_store(config.audit)
            undo.push_async_callback(store.close)
            metrics.watch_store(lambda: store.write_failures)
            gateway = cls(config, server, store, usage, authenticator, observability, metrics, port)
            undo.push_async_callback(gateway._fleet.close)
            undo.push_async_callback(gateway._door.close)
            if config.http.port is not None:
                gateway.http_port = await open_door(gateway._door, config)
            if config.telemetry.metrics_port is not None:
                gateway.metrics_port = await open_page(observability, config)
            await gateway._serve(progress)
            undo.pop_all()
        logger.info("serving on %s:%d", config.listen.host, gateway.port)
        return gateway

    async def stop(self) -> None:
        """Drain: health says NOT_SERVING, new calls are refused, running ones may finish.

        After `drain_seconds` the rest is ended with `GatewayStopped`, aborted in its worker and
        recorded.
        """
        await self._health.shut_down()
        seconds = self._config.drain_seconds
        logger.info("draining for up to %g s", seconds)
        end = asyncio.get_running_loop().call_later(seconds, self._shutdown.now)
        await self._close_doors(seconds + _TELLING_SECONDS)
        end.cancel()
        await self._tokenizing.close()
        await self._background.settle()
        await self._fleet.close()
        await self._usage.close()
        await self._store.close()
        await self._observability.close()

    async def hurry(self) -> None:
        """Cut a running `stop` short: end what still runs."""
        self._shutdown.now()
        await self._close_doors(_TELLING_SECONDS)

    async def _close_doors(self, seconds: float) -> None:
        """Take no more calls; close as soon as there are none, and after so long whatever runs."""
        await asyncio.gather(self._server.stop(seconds), self._door.drain(seconds))
        await self._door.close()

    def _remote(self, url: str) -> HttpWorker:
        section = self._config.worker
        return HttpWorker(
            url,
            stall_seconds=section.stall_seconds,
            api_key=_key(section),
            tls=_worker_tls(section),
        )

    async def _serve(self, progress: Progress) -> None:
        gate: ReplayGate[Lease] = ReplayGate(**self._config.replay.model_dump())
        service = GatewayService(
            self._router,
            self._store,
            self._admissions,
            self._generations,
            Replays(
                self._router,
                self._admissions,
                self._store,
                self._background,
                self._shutdown,
                gate,
                self._salts,
            ),
            client_stall_seconds=self._config.grpc.client_stall_seconds,
        )
        gateway_pb2_grpc.add_VaseGatewayServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._config.grpc.reflection:
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        await self._server.start()
        if self._embedded is not None:
            await self._embedded.start(progress)
            await self._fleet.check_all()
        dns = self._config.worker.dns
        self._fleet.start(
            discover(
                dns,
                interval_seconds=self._config.worker.dns_interval_seconds,
                connect=self._remote,
                resolve=resolve,
            )
            if dns
            else None
        )


async def _usage(config: GatewayConfig) -> Usage:
    section = config.limits
    if section.redis_url is None:
        return LocalUsage()
    return await SharedUsage.connect(
        section.redis_url, prefix=section.redis_prefix, on_failure=section.on_redis_failure
    )


async def _open_store(config: Audit) -> AuditStore:
    by_version = {key.version: key.read() for key in config.encryption_keys}
    keys = KeyRing(by_version, active=config.active_key)
    return await AuditStore.open(config.url, migrate=config.migrate_on_start, keys=keys)


def _embedded_worker(config: GatewayConfig) -> EmbeddedWorker | None:
    section = config.worker
    if section.model_path is None:
        return None
    return EmbeddedWorker(
        worker_command(section.model_path, section.args),
        log=section.log_file,
        start_timeout_seconds=section.start_timeout_seconds,
        stop_grace_seconds=section.stop_grace_seconds,
        stall_seconds=section.stall_seconds,
        api_key=_key(section),
    )


def _key(section: WorkerSection) -> str | None:
    return None if section.api_key is None else section.api_key.get_secret_value()


def _worker_tls(section: WorkerSection) -> ssl.SSLContext | None:
    """Whose certificates `https://` workers may show. Raises `ConfigError`."""
    if section.ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=section.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"worker.ca_file: {section.ca_file} cannot be used: {error}") from error
