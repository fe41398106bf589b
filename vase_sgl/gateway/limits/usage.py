"""The usage limits of a tenant, what over the limit means, and the store's interface.

Requests and tokens are token buckets that refill evenly. A request takes 1 from the first on
arrival. The second must not be empty on arrival and is charged when the request ends, with prompt
and output tokens as they were: it may fall below zero then, and the tenant waits until it is paid
off. So nothing is estimated and nothing has to be given back.

The `limits` library has no such debt (it counts hits in windows, all or nothing) and no leases, so
the few lines are here, once in Python and once in Lua.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from vase_sgl.gateway.errors import LimitExceeded

#: Seconds until a place among the concurrent requests is asked for again. Nobody knows when one
#: gets free.
CONCURRENCY_RETRY_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class UsageLimits:
    """What one tenant may use. None: unlimited.

    concurrent: requests at the gateway at once, waiting or running.
    """

    requests_per_second: float | None
    tokens_per_minute: int | None
    concurrent: int | None

    @property
    def unlimited(self) -> bool:
        """Whether there is nothing to count."""
        return self == UsageLimits(None, None, None)

    @property
    def burst(self) -> float:
        """Requests a rested tenant may send at once: what a second allows, at least one."""
        return max(self.requests_per_second or 0.0, 1.0)


class Usage(Protocol):
    """Counts what tenants use."""

    async def enter(self, tenant: str, limits: UsageLimits, request_id: str) -> None:
        """Take a request in. Raises `LimitExceeded`, and `LimitsUnavailable` if it cannot count."""

    async def leave(self, tenant: str, limits: UsageLimits, request_id: str, tokens: int) -> None:
        """The request is over and has used `tokens`. Never raises for a store that is away."""

    async def close(self) -> None:
        """Release connections."""


def over_requests(tenant: str, limits: UsageLimits, seconds: float) -> LimitExceeded:
    """The refusal of one request too many per second."""
    return LimitExceeded(
        f"tenant {tenant} may send {limits.requests_per_second:g} requests per second; "
        f"come back in {seconds:.2f} s",
        reason="requests",
        retry_seconds=seconds,
    )


def over_tokens(tenant: str, limits: UsageLimits, seconds: float) -> LimitExceeded:
    """The refusal of a tenant that has used up its tokens."""
    return LimitExceeded(
        f"tenant {tenant} has used its {limits.tokens_per_minute} tokens per minute; come back "
        f"in {seconds:.2f} s",
        reason="tokens",
        retry_seconds=seconds,
    )


def over_concurrency(tenant: str, limits: UsageLimits) -> LimitExceeded:
    """The refusal of one request too many at once."""
    return LimitExceeded(
        f"tenant {tenant} may have {limits.concurrent} requests at once; wait until one ends",
        reason="concurrency",
        retry_seconds=CONCURRENCY_RETRY_SECONDS,
    )
