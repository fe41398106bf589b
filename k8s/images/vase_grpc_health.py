#!/usr/bin/env python3
"""Ask a gRPC server how it is, by the standard health protocol: `vase-grpc-health`.

Exit status 0 if the service is SERVING, 1 if not, 2 if it cannot be asked. For the image's health
check, and for probes behind TLS, which the kubelet's own gRPC probe cannot do.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        with _channel(options) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=options.service), timeout=options.timeout
            )
    except (grpc.RpcError, OSError) as error:
        known = isinstance(error, grpc.Call)
        reason = f"{error.code().name} {error.details()}" if known else error
        print(f"{options.target}: {reason}", file=sys.stderr)
        return 2
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vase-grpc-health", description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port")
    parser.add_argument("--service", default="", help="health service; empty: the whole server")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds")
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--ca-file", type=Path, help="encrypt; trust what is in this PEM file")
    trust.add_argument(
        "--trust-any",
        action="store_true",
        help="encrypt; trust the certificate that is shown (for a server on this very host)",
    )
    parser.add_argument("--server-name", help="name in the certificate, if not the target's")
    parser.add_argument("--certificate", type=Path, help="client certificate, PEM")
    parser.add_argument("--key", type=Path, help="its key, PEM")
    options = parser.parse_args(arguments)
    if (options.certificate is None) != (options.key is None):
        parser.error("--certificate and --key belong together")
    encrypted = options.ca_file is not None or options.trust_any
    if not encrypted and (options.server_name or options.certificate):
        parser.error("--server-name and --certificate need --ca-file or --trust-any")
    return options


def _channel(options: argparse.Namespace) -> grpc.Channel:
    settings: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if options.trust_any:
        roots = _shown(options)
    elif options.ca_file is not None:
        roots = options.ca_file.read_bytes()
    else:
        return grpc.insecure_channel(options.target, options=settings)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=roots,
        private_key=options.key.read_bytes() if options.key else None,
        certificate_chain=options.certificate.read_bytes() if options.certificate else None,
    )
    if options.server_name:
        settings.append(("grpc.ssl_target_name_override", options.server_name))
    return grpc.secure_channel(options.target, credentials, options=settings)


def _shown(options: argparse.Namespace) -> bytes:
    """The certificate that the server shows, PEM."""
    host, _, port = options.target.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=options.timeout) as raw,
        context.wrap_socket(raw) as encrypted,
    ):
        shown = encrypted.getpeercert(binary_form=True)
    if shown is None:
        raise OSError("it shows no certificate")
    return ssl.DER_cert_to_PEM_cert(shown).encode()


if __name__ == "__main__":
    sys.exit(main())
