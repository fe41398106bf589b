"""Standard gRPC health: SERVING while a worker is ready."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2

#: Seconds between telling watchers that the gateway stops and ending their streams.
_NOTICE_SECONDS = 0.1


class GatewayHealth(health.aio.HealthServicer):  # type: ignore[name-defined,misc]  # not in its stubs
    """Health of the gateway as a whole and of its service, NOT_SERVING at first.

    Ends its Watch streams when the gateway stops: no client ever ends one, so each would hold up
    the drain for all of its time.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self._names = (health.OVERALL_HEALTH, service)
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        self._server_status = dict.fromkeys(self._names, not_serving)
        self._watches: set[asyncio.Task[Any]] = set()

    async def announce(self, ready: bool) -> None:
        """Tell whether a worker is ready."""
        state = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.set(name, state.SERVING if ready else state.NOT_SERVING)

    async def shut_down(self) -> None:
        """NOT_SERVING for good; watchers are told, then their streams end."""
        await self.enter_graceful_shutdown()
        await asyncio.sleep(_NOTICE_SECONDS)
        for watch in self._watches:
            watch.cancel()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        # A task of its own: cancelling the call's would leave the stream open at the client.
        watch = asyncio.create_task(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.gather(watch, return_exceptions=True)
        finally:
            watch.cancel()
            self._watches.discard(watch)
