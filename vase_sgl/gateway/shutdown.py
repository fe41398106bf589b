"""The moment at which a gateway that stops ends what still runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vase_sgl.gateway.errors import GatewayStopped


class Shutdown:
    """Ends runs with an error of their own, while their clients can still be told."""

    def __init__(self) -> None:
        self._over = False
        #: Runs that `now` has yet to end.
        self._running: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def ends(self, run: str) -> AsyncIterator[None]:
        """Let the body run until then. Raises `GatewayStopped`; `run` is what its text names."""
        try:
            async with asyncio.timeout(0 if self._over else None) as limit:
                if not self._over:
                    self._running.add(limit)
                try:
                    yield
                finally:
                    self._running.discard(limit)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise GatewayStopped(f"this gateway stopped before the end of {run}") from error

    def now(self) -> None:
        """End what runs, and from now on what begins."""
        self._over = True
        moment = asyncio.get_running_loop().time()
        while self._running:
            self._running.pop().reschedule(moment)
