"""How long, and with how many calls, a caller may let the gateway wait for what it sends."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

#: Seconds left to a call that makes way for a later one: its message may be on its way.
_GRACE_SECONDS = 0.25


class Patience:
    """Waits for what calls have yet to send: for a while, and for few calls of each caller.

    Where one caller makes it wait for too many, the one that has waited longest makes way. So a
    caller crowds out only itself, and a call that is sent at once always gets through.
    """

    def __init__(self, *, seconds: float, max_calls: int) -> None:
        """max_calls: calls there may be at once; each caller may wait with a quarter of them."""
        self.seconds = seconds
        self._most = max(max_calls // 4, 1)
        #: By caller, the oldest first.
        self._waits: collections.defaultdict[str | None, dict[asyncio.Timeout, None]] = (
            collections.defaultdict(dict)
        )

    @asynccontextmanager
    async def wait(self, caller: str | None) -> AsyncIterator[None]:
        """Let the body wait for a call of that tenant; None: of any stranger.

        Raises `TimeoutError` when it takes too long or has to make way.
        """
        waits = self._waits[caller]
        if len(waits) >= self._most:
            self._hurry(waits)
        async with asyncio.timeout(self.seconds) as wait:
            waits[wait] = None
            try:
                yield
            finally:
                waits.pop(wait, None)

    def _hurry(self, waits: dict[asyncio.Timeout, None]) -> None:
        oldest = next(iter(waits))
        del waits[oldest]
        end = asyncio.get_running_loop().time() + _GRACE_SECONDS
        if not oldest.expired():
            oldest.reschedule(min(end, oldest.when() or end))
