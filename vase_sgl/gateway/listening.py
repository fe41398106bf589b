"""Where the gateway listens: the ports of gRPC, of the OpenAI-compatible door and of Prometheus."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from vase_sgl.gateway.config import ConfigError, GatewayConfig, Grpc, Tls
from vase_sgl.gateway.observability import Observability
from vase_sgl.gateway.openai.door import OpenAIDoor
from vase_sgl.rpc.keepalive import keepalive

logger = logging.getLogger(__name__)


class PortInUse(Exception):
    """The listen address cannot be bound. The text says what to do."""


def channel_options(settings: Grpc) -> list[tuple[str, int]]:
    """gRPC's own names for the settings of the port."""
    return [
        ("grpc.max_receive_message_length", settings.max_receive_bytes),
        ("grpc.max_send_message_length", settings.max_send_bytes),
        *keepalive(settings.keepalive_seconds, settings.keepalive_timeout_seconds),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ping as well; gRPC's own default would cut them off after a few. One that
        # pings faster than this is cut off after `max_ping_strikes`.
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            int(settings.min_ping_interval_seconds * 1000),
        ),
        ("grpc.http2.max_ping_strikes", 2),
        # Otherwise a second gateway binds the same port and takes half of the calls.
        ("grpc.so_reuseport", 0),
    ]


def bind(server: grpc.aio.Server, config: GatewayConfig) -> int:
    """Bind the listen address; the port that was taken. Raises `PortInUse` or `ConfigError`."""
    host, port = config.listen.host, config.listen.port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if config.tls is None:
            if host not in ("127.0.0.1", "::1", "localhost"):
                logger.warning("API keys travel in clear text on %s; set tls", address)
            return server.add_insecure_port(address)
        credentials = _credentials(config.tls)
        _context(config.tls)  # gRPC says of a wrong certificate or key what it says of a taken port
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _in_use(address, "listen.port or --grpc-port") from error


async def open_door(door: OpenAIDoor, config: GatewayConfig) -> int:
    """Open the HTTP door; the port that was taken. Raises `PortInUse` or `ConfigError`."""
    host, port = config.listen.host, config.http.port or 0
    try:
        return await door.open(host, port, None if config.tls is None else _context(config.tls))
    except OSError as error:
        raise _in_use(f"{host}:{port}", "http.port or --http-port") from error


async def open_page(observability: Observability, config: GatewayConfig) -> int:
    """Open the page for Prometheus; the port that was taken. Raises `PortInUse`."""
    host, port = config.listen.host, config.telemetry.metrics_port or 0
    try:
        return await observability.open_page(host, port)
    except OSError as error:
        raise _in_use(f"{host}:{port}", "telemetry.metrics_port or --metrics-port") from error


def _in_use(address: str, option: str) -> PortInUse:
    return PortInUse(
        f"cannot listen on {address}: the port is taken or the address is not this machine's; "
        f"stop the other process, or choose another port with {option}"
    )


def _context(tls: Tls) -> ssl.SSLContext:
    """The door's TLS, as strict as gRPC's."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # With an empty password an encrypted key is an error; without one it is asked for.
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except OSError as error:  # SSL's errors are such
        raise ConfigError(
            f"tls: {tls.certificate} cannot be used: {error}; it has to be PEM, with a certificate "
            "and its private key, not encrypted; tls.key names the key if it is another file"
        ) from error
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except OSError as error:
            raise ConfigError(f"tls.client_ca: {tls.client_ca} cannot be used: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"tls: cannot read {path}: {error.strerror}") from error

    return grpc.ssl_server_credentials(
        [(read(tls.key or tls.certificate), read(tls.certificate))],
        root_certificates=read(tls.client_ca) if tls.client_ca else None,
        require_client_auth=tls.client_ca is not None,
    )
