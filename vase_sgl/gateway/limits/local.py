"""Usage counted in this process: exact for one gateway, per replica for several."""

from __future__ import annotations

import time
from collections.abc import Callable

from vase_sgl.gateway.limits.usage import (
    UsageLimits,
    over_concurrency,
    over_requests,
    over_tokens,
)


class _Bucket:
    """A level that rises evenly to its capacity. Starts full."""

    def __init__(self) -> None:
        self._level = float("inf")
        self._seen = 0.0

    def refill(self, rate: float, capacity: float, now: float) -> float:
        """The level at `now`."""
        risen = self._level + max(now - self._seen, 0.0) * rate
        self._level, self._seen = min(risen, capacity), now
        return self._level

    def take(self, amount: float) -> None:
        self._level -= amount


class _State:
    def __init__(self) -> None:
        self.requests = _Bucket()
        self.tokens = _Bucket()
        self.running: set[str] = set()


class LocalUsage:
    """`Usage` in memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}

    async def enter(self, tenant: str, limits: UsageLimits, request_id: str) -> None:
        state, now = self._states.setdefault(tenant, _State()), self._clock()
        if limits.concurrent is not None and len(state.running) >= limits.concurrent:
            raise over_concurrency(tenant, limits)
        if limits.tokens_per_minute is not None:
            rate = limits.tokens_per_minute / 60
            level = state.tokens.refill(rate, limits.tokens_per_minute, now)
            if level < 1:
                raise over_tokens(tenant, limits, (1 - level) / rate)
        if limits.requests_per_second is not None:
            level = state.requests.refill(limits.requests_per_second, limits.burst, now)
            if level < 1:
                raise over_requests(tenant, limits, (1 - level) / limits.requests_per_second)
            state.requests.take(1)
        state.running.add(request_id)

    async def leave(self, tenant: str, limits: UsageLimits, request_id: str, tokens: int) -> None:
        state = self._states.setdefault(tenant, _State())
        state.running.discard(request_id)
        if limits.tokens_per_minute is not None:
            state.tokens.refill(
                limits.tokens_per_minute / 60, limits.tokens_per_minute, self._clock()
            )
            state.tokens.take(tokens)

    async def close(self) -> None:
        """Nothing to release."""
