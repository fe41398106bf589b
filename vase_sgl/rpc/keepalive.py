"""gRPC's options that find out about a peer that vanished, for both sides."""

from __future__ import annotations


def keepalive(seconds: float, timeout_seconds: float) -> list[tuple[str, int]]:
    """Ping a peer that has been silent for `seconds`; without an answer for `timeout_seconds` the
    connection is lost."""
    timeout = int(timeout_seconds * 1000)
    return [
        ("grpc.keepalive_time_ms", int(seconds * 1000)),
        ("grpc.keepalive_timeout_ms", timeout),
        # A timeout of its own, a minute unless it is set, holds for every ping.
        ("grpc.http2.ping_timeout_ms", timeout),
        # After two pings without data in between gRPC sends none for a while.
        ("grpc.http2.max_pings_without_data", 0),
    ]
