"""Workers behind DNS names: one per address, looked up again and again."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from vase_sgl.gateway.workers import Worker

logger = logging.getLogger(__name__)

#: host -> its addresses. Raises `OSError` if the name cannot be resolved.
Resolve = Callable[[str], Awaitable[Sequence[str]]]


async def resolve(host: str) -> list[str]:
    """The IP addresses of a name, as the system resolves it. Raises `OSError`."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
    except UnicodeError as error:  # no name at all, such as a..b
        raise OSError(f"{host!r} is no name of a host: {error}") from error
    return sorted({str(address[0]) for *_, address in found})


async def discover(
    urls: Sequence[str],
    *,
    interval_seconds: float,
    connect: Callable[[str], Worker],
    resolve: Resolve,
) -> AsyncIterator[Sequence[Worker]]:
    """Yield every worker behind the names in `urls`, at once and after each interval.

    `connect` makes the worker of a URL; it is called once per address as long as that stays. A name
    that cannot be resolved keeps the addresses it had: a DNS outage takes no worker away.
    """
    known: dict[str, list[str]] = {url: [] for url in urls}
    workers: dict[str, Worker] = {}
    while True:
        for url in urls:
            parts = urlsplit(url)
            assert parts.hostname is not None
            try:
                addresses = await resolve(parts.hostname)
            except OSError as error:
                logger.warning("cannot resolve %s: %s", parts.hostname, error)
            else:
                known[url] = [_address_url(parts.scheme, a, parts.port) for a in addresses]
        found = {address for addresses in known.values() for address in addresses}
        workers = {url: workers.get(url) or connect(url) for url in sorted(found)}
        yield list(workers.values())
        await asyncio.sleep(interval_seconds)


def _address_url(scheme: str, address: str, port: int | None) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"{scheme}://{host}:{port}"
