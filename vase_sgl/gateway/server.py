"""The gateway process: start in an order that fails early, serve, drain."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from vase_sgl.gateway.audit import AuditStore
from vase_sgl.gateway.auth import AuthInterceptor, KeyAuthenticator, NoAuthenticator
from vase_sgl.gateway.config import ConfigError, GatewayConfig, Tls
from vase_sgl.gateway.runs import Background
from vase_sgl.gateway.service import GatewayService
from vase_sgl.gateway.worker_embedded import EmbeddedWorker, Progress, worker_command
from vase_sgl.gateway.worker_http import HttpWorker
from vase_sgl.gateway.workers import Worker, WorkerRouter
from vase_sgl.rpc.v1 import gateway_pb2, gateway_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAME: str = gateway_pb2.DESCRIPTOR.services_by_name["VaseGateway"].full_name


class PortInUse(Exception):
    """The listen address cannot be bound. The text says what to do."""


class Gateway:
    """A running gateway. Made by `start`, ended by `stop`."""

    def __init__(
        self,
        config: GatewayConfig,
        server: grpc.aio.Server,
        health_servicer: HealthServicer,
        router: WorkerRouter,
        store: AuditStore,
        background: Background,
        port: int,
    ) -> None:
        self._config = config
        self._server = server
        self._health = health_servicer
        self._router = router
        self._store = store
        self._background = background
        self.port = port

    @classmethod
    async def start(cls, config: GatewayConfig, progress: Progress) -> Gateway:
        """Bind the port, start the worker, serve.

        What can go wrong cheaply goes first: tenants, store and port before the model. With an
        embedded worker it returns when the model is ready; remote workers are waited for in the
        background, and health says NOT_SERVING until one is ready.
        Raises `TenantFileError`, `AuditError`, `PortInUse`, `ConfigError`, `WorkerStartError`.
        """
        authenticator = (
            NoAuthenticator()
            if config.insecure_no_auth
            else KeyAuthenticator(config.tenants_file)
        )
        store = await AuditStore.open(config.audit.url)
        background = Background()
        server = grpc.aio.server(
            interceptors=[AuthInterceptor(authenticator)],
            options=_options(config),
            maximum_concurrent_rpcs=config.grpc.max_concurrent_calls,
        )
        workers: list[Worker] = []
        try:
            port = _bind(server, config)
            if config.worker.model_path is not None:
                workers.append(await _embedded(config, config.worker.model_path, progress))
            else:
                workers.extend(HttpWorker(url) for url in config.worker.urls)
            health_servicer = HealthServicer()

            async def announce(ready: bool) -> None:
                state = health_pb2.HealthCheckResponse
                status = state.SERVING if ready else state.NOT_SERVING
                for name in (health.OVERALL_HEALTH, SERVICE_NAME):
                    await health_servicer.set(name, status)

            await announce(False)
            router = WorkerRouter(
                workers,
                interval_seconds=config.worker.health_interval_seconds,
                on_change=announce,
            )
            gateway_pb2_grpc.add_VaseGatewayServicer_to_server(
                GatewayService(router, store, background, config.default_eviction), server
            )
            health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
            if config.grpc.reflection:
                names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
                reflection.enable_server_reflection(names, server)
            if config.worker.model_path is not None:
                await router.check_all()
            await server.start()
            router.start()
        except BaseException:
            await server.stop(None)
            await asyncio.gather(*(worker.close() for worker in workers))
            await store.close()
            raise
        logger.info("serving on %s:%d", config.listen.host, port)
        return cls(config, server, health_servicer, router, store, background, port)

    async def stop(self) -> None:
        """Drain: health says NOT_SERVING, new calls are refused, running ones may finish.

        After `drain_seconds` the rest is cancelled, aborted in its worker and recorded.
        """
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._config.drain_seconds)
        await self._background.settle()
        await self._router.close()
        await self._store.close()


async def _embedded(config: GatewayConfig, model_path: str, progress: Progress) -> EmbeddedWorker:
    return await EmbeddedWorker.start(
        worker_command(model_path, config.worker.args),
        log=config.worker.log_file,
        start_timeout_seconds=config.worker.start_timeout_seconds,
        stop_grace_seconds=config.worker.stop_grace_seconds,
        progress=progress,
    )


def _bind(server: grpc.aio.Server, config: GatewayConfig) -> int:
    """Bind the listen address; the port that was taken. Raises `PortInUse` or `ConfigError`."""
    host, port = config.listen.host, config.listen.port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if config.tls is None:
            if host not in ("127.0.0.1", "::1", "localhost"):
                logger.warning("API keys travel in clear text on %s; set tls", address)
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(config.tls))
    except RuntimeError as error:
        raise PortInUse(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; "
            "stop the other process, or choose another port with listen.port or --grpc-port"
        ) from error


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"tls: cannot read {path}: {error.strerror}") from error

    return grpc.ssl_server_credentials(
        [(read(tls.key), read(tls.certificate))],
        root_certificates=read(tls.client_ca) if tls.client_ca else None,
        require_client_auth=tls.client_ca is not None,
    )


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    settings = config.grpc
    return [
        ("grpc.max_receive_message_length", settings.max_receive_bytes),
        ("grpc.max_send_message_length", settings.max_send_bytes),
        ("grpc.keepalive_time_ms", int(settings.keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_seconds * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ping as well; gRPC's own default would cut them off after a few.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        # Otherwise a second gateway binds the same port and takes half of the calls.
        ("grpc.so_reuseport", 0),
    ]
