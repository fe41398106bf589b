"""Standard gRPC health: is the process alive, and would a request find a worker?

liveness: SERVING from the start until the process ends, while it drains too. A probe that fails
means that the process hangs.
readiness, the service's full name and the empty name: SERVING while a worker is ready;
NOT_SERVING for good from the moment the gateway stops.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

LIVENESS = "liveness"
READINESS = "readiness"

#: Seconds between telling watchers that the gateway stops and ending their streams.
_NOTICE_SECONDS = 0.1
#: Watch streams at once, at most. They need no API key, and each takes one of the calls there may
#: be: a quarter of these is the other bound.
MAX_WATCHES = 64


class GatewayHealth(health.aio.HealthServicer):  # type: ignore[name-defined,misc]  # not in its stubs
    """Health of the gateway, not ready at first.

    Ends its Watch streams when the gateway stops: no client ever ends one, so each would hold up
    the drain for all of its time.
    """

    def __init__(self, service: str, max_watches: int = MAX_WATCHES) -> None:
        super().__init__()
        self._max_watches = max_watches
        states = health_pb2.HealthCheckResponse
        self._names = (health.OVERALL_HEALTH, service, READINESS)
        self._server_status = dict.fromkeys(self._names, states.NOT_SERVING)
        self._server_status[LIVENESS] = states.SERVING
        #: Set and replaced with every announcement.
        self._changed = asyncio.Event()
        self._stopping = False
        self._watches: set[asyncio.Task[Any]] = set()

    async def announce(self, ready: bool) -> None:
        """Tell whether a worker is ready. Ignored once the gateway stops."""
        if not self._stopping:
            self._announce(ready)

    async def shut_down(self) -> None:
        """Not ready for good; watchers are told, then their streams end."""
        self._stopping = True
        self._announce(False)
        await asyncio.sleep(_NOTICE_SECONDS)
        for watch in self._watches:
            watch.cancel()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        if len(self._watches) >= self._max_watches:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._max_watches} clients watch this gateway's health already; use Check",
            )
        # A task of its own: cancelling the call's would leave the stream open at the client.
        watch = asyncio.create_task(self._tell(request.service, context))
        self._watches.add(watch)
        try:
            await asyncio.gather(watch, return_exceptions=True)
        finally:
            watch.cancel()
            self._watches.discard(watch)

    async def _tell(self, service: str, context: Any) -> None:
        """Write the state of a service and its changes.

        The base class holds a lock meanwhile, so that a client that does not read would hold up
        every announcement.
        """
        answer, told = health_pb2.HealthCheckResponse, None
        while True:
            status = self._server_status.get(service, answer.SERVICE_UNKNOWN)
            if status == told:
                await self._changed.wait()
            else:
                await context.write(answer(status=status))
                told = status

    def _announce(self, ready: bool) -> None:
        states = health_pb2.HealthCheckResponse
        for name in self._names:
            self._server_status[name] = states.SERVING if ready else states.NOT_SERVING
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
