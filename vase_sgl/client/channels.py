"""Connections to a gateway."""

from __future__ import annotations

import dataclasses

import grpc

from vase_sgl.client.errors import InvalidRequest
from vase_sgl.rpc.keepalive import keepalive

try:
    from opentelemetry import propagate
except ImportError:  # traces are for those who have it
    propagate = None  # type: ignore[assignment]

#: Answers and records can be long; gRPC's own limit is 4 MiB.
MAX_MESSAGE_BYTES = 64 * 2**20

OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Finds out about a gateway that vanished while an answer is awaited.
    *keepalive(30, 10),
]


@dataclasses.dataclass(frozen=True)
class Tls:
    """An encrypted connection; PEM contents.

    root_certificates: who may sign the gateway's certificate; None: the system's authorities.
    certificate, key: the client's own, both or neither, where the gateway asks for one.
    """

    root_certificates: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):  # gRPC would end the whole process
            raise ValueError("a client's certificate needs its key, and a key its certificate")

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC wants."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.key, self.certificate)


def checked_key(api_key: str | None) -> str | None:
    """The key without the white space around it, such as the newline at the end of a file.

    Raises `InvalidRequest`, which does not show the key, for what gRPC could not send.
    """
    if api_key is None:
        return None
    key = api_key.strip()
    if not all("!" <= character <= "~" for character in key):
        raise InvalidRequest(
            "the API key contains a space, a line break or a character that is not ASCII; "
            "give it as `vase-sgl tenants add` showed it",
            "INVALID_ARGUMENT",
        )
    return key


def metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: who calls, and with OpenTelemetry installed the current trace."""
    identity = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
    if propagate is None:
        return identity
    trace: dict[str, str] = {}
    propagate.inject(trace)
    # gRPC takes lower case only, and some propagators' keys are none (X-Amzn-Trace-Id).
    return (*identity, *((key.lower(), value) for key, value in trace.items()))
