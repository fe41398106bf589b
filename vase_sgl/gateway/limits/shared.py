"""Usage counted in Redis: one account per tenant for all gateways.

Each step is one Lua script, so it is atomic, and it uses Redis's clock, so the gateways' own need
not agree. A request that runs holds a lease, renewed while its gateway lives: what a gateway that
dies held is free again after `LEASE_SECONDS`. A renewal makes a lease that is not there, so that a
Redis which lost its data counts what runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from typing import Any, Literal

import redis.asyncio
from redis.asyncio import BlockingConnectionPool
from redis.exceptions import ReadOnlyError, RedisError
from redis.maint_notifications import MaintNotificationsConfig

from vase_sgl.gateway.errors import LimitsUnavailable
from vase_sgl.gateway.limits.usage import (
    UsageLimits,
    over_concurrency,
    over_requests,
    over_tokens,
)

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
#: Seconds one command may take, or wait for a connection, before Redis counts as away.
TIMEOUT_SECONDS = 1.0
_CONNECTIONS = 64
#: Leases of one tenant to remove that are remembered while Redis is away; others lapse.
_REMEMBERED = 4096

OnFailure = Literal["refuse", "allow"]

# KEYS: hash of levels, sorted set of leases (score: when it ends, in seconds).
# ARGV: request id, requests/s, burst, tokens/min, concurrent (0: unlimited each), lease seconds,
#       tokens to charge.
_COMMON = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local function level(name, rate, capacity)
  local old = redis.call('HMGET', KEYS[1], name, name .. '_at')
  if not old[1] then return capacity end
  local since = now - tonumber(old[2])
  if since < 0 then -- the clock was set back: it would rise again only when that time has come
    redis.call('HSET', KEYS[1], name .. '_at', string.format('%.6f', now))
    since = 0
  end
  return math.min(capacity, tonumber(old[1]) + since * rate)
end
local function store(name, value, rate, capacity)
  redis.call('HSET', KEYS[1], name, string.format('%.6f', value),
             name .. '_at', string.format('%.6f', now))
  local full = math.ceil((capacity - value) / rate) + 60
  if redis.call('TTL', KEYS[1]) < full then redis.call('EXPIRE', KEYS[1], full) end
end
local rps, burst, tpm = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local concurrent, lease = tonumber(ARGV[5]), tonumber(ARGV[6])
"""

_ENTER = (
    _COMMON
    + """
if concurrent > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  if redis.call('ZCARD', KEYS[2]) >= concurrent then return {'concurrency', '0'} end
end
if tpm > 0 then
  local left = level('tokens', tpm / 60, tpm)
  if left < 1 then return {'tokens', tostring((1 - left) * 60 / tpm)} end
end
if rps > 0 then
  local left = level('requests', rps, burst)
  if left < 1 then return {'requests', tostring((1 - left) / rps)} end
  store('requests', left - 1, rps, burst)
end
if concurrent > 0 then
  redis.call('ZADD', KEYS[2], now + lease, ARGV[1])
  redis.call('EXPIRE', KEYS[2], math.ceil(lease) + 60)
end
return {'', '0'}
"""
)

_LEAVE = (
    _COMMON
    + """
redis.call('ZREM', KEYS[2], ARGV[1])
if tpm > 0 then
  store('tokens', level('tokens', tpm / 60, tpm) - tonumber(ARGV[7]), tpm / 60, tpm)
end
return 0
"""
)

_RENEW = """
local time = redis.call('TIME')
local ends = tonumber(time[1]) + tonumber(ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], ends, ARGV[i]) end
redis.call('EXPIRE', KEYS[1], math.ceil(tonumber(ARGV[1])) + 60)
return 0
"""


class SharedUsageError(Exception):
    """Redis cannot be used at start-up. The text says what to do."""


class _Client(redis.asyncio.Redis):
    """Leaves a server that has become a replica: it answers for good, and can write nothing."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except ReadOnlyError:
            # Those in use find out by themselves, or lead to the new primary.
            await self.connection_pool.disconnect(inuse_connections=False)
            raise


class SharedUsage:
    """`Usage` in Redis. Made by `connect`."""

    def __init__(self, client: redis.asyncio.Redis, *, prefix: str, on_failure: OnFailure) -> None:
        self._client = client
        self._prefix = prefix
        self._on_failure = on_failure
        self._enter = client.register_script(_ENTER)
        self._leave = client.register_script(_LEAVE)
        self._renew = client.register_script(_RENEW)
        #: Lease ids held here, by tenant.
        self._held: dict[str, set[str]] = {}
        #: Lease ids that Redis may have though nobody holds them, by tenant, and who removes them.
        self._stray: dict[str, set[str]] = {}
        self._removing: set[asyncio.Task[None]] = set()
        #: Beside cancelling: Redis's client may take a cancellation for an error of its own.
        self._closing = False
        self._renewing = asyncio.create_task(self._renew_forever(), name="vase-leases")

    @classmethod
    async def connect(cls, url: str, *, prefix: str, on_failure: OnFailure) -> SharedUsage:
        """Raises `SharedUsageError` if Redis does not answer."""
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=TIMEOUT_SECONDS,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                # With them, redis-py uses idle connections again that the server has closed.
                maint_notifications_config=MaintNotificationsConfig(enabled=False),
            )
        except ValueError as error:
            raise SharedUsageError(
                f"limits.redis_url cannot be used: {error}; one looks like redis://host:6379/0"
            ) from error
        client = _Client.from_pool(pool)  # and is to close it
        try:
            await client.ping()
        except (RedisError, OSError) as error:
            await client.aclose()
            raise SharedUsageError(
                f"limits.redis_url is set, but Redis does not answer: {error}; start it, or leave "
                "limits.redis_url out to count in each gateway alone"
            ) from error
        return cls(client, prefix=prefix, on_failure=on_failure)

    async def enter(self, tenant: str, limits: UsageLimits, request_id: str) -> None:
        try:
            answer = await self._run(self._enter, tenant, limits, request_id, 0)
        except (RedisError, OSError) as error:
            if self._on_failure == "allow":
                logger.error("limits of tenant %s are not checked: %s", tenant, error)
                self._hold(tenant, limits, request_id)  # counted once Redis is back
                return
            logger.error("a request of tenant %s is refused: %s", tenant, error)
            if limits.concurrent is not None:
                self._remove(tenant, {request_id})  # Redis may let it in yet, when it wakes
            raise LimitsUnavailable(
                "the limits cannot be checked just now; try again in a moment",
                retry_seconds=TIMEOUT_SECONDS,
            ) from error
        reason, seconds = (part.decode() for part in answer)
        match reason:
            case "":
                self._hold(tenant, limits, request_id)
            case "concurrency":
                raise over_concurrency(tenant, limits)
            case "tokens":
                raise over_tokens(tenant, limits, float(seconds))
            case _:
                raise over_requests(tenant, limits, float(seconds))

    async def leave(self, tenant: str, limits: UsageLimits, request_id: str, tokens: int) -> None:
        held = self._held.get(tenant)
        if held is not None:
            held.discard(request_id)
            if not held:
                del self._held[tenant]
        try:
            await self._run(self._leave, tenant, limits, request_id, tokens)
        except (RedisError, OSError) as error:
            logger.error("%d tokens of tenant %s are not charged: %s", tokens, tenant, error)
            if limits.concurrent is not None:
                self._remove(tenant, {request_id})

    async def close(self) -> None:
        self._closing = True
        tasks = (self._renewing, *self._removing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _hold(self, tenant: str, limits: UsageLimits, request_id: str) -> None:
        """Have the request's lease renewed, or made, until it leaves."""
        if limits.concurrent is not None:
            self._held.setdefault(tenant, set()).add(request_id)

    async def _run(
        self, script: Any, tenant: str, limits: UsageLimits, request_id: str, tokens: int
    ) -> Any:
        return await script(
            keys=self._keys(tenant),
            args=[
                request_id,
                limits.requests_per_second or 0,
                limits.burst,
                limits.tokens_per_minute or 0,
                limits.concurrent or 0,
                LEASE_SECONDS,
                tokens,
            ],
        )

    def _keys(self, tenant: str) -> list[str]:
        # The braces keep a tenant's keys on one node of a Redis cluster.
        return [f"{self._prefix}:{{{tenant}}}:levels", f"{self._prefix}:{{{tenant}}}:leases"]

    async def _renew_forever(self) -> None:
        while not self._closing:
            await asyncio.sleep(LEASE_SECONDS / 3)
            for tenant in list(self._held):
                await self._renew_leases(tenant)

    async def _renew_leases(self, tenant: str) -> None:
        renewed = set(self._held.get(tenant, ()))
        if not renewed:
            return
        with contextlib.suppress(RedisError, OSError):  # the next request reports it
            await self._renew(keys=[self._keys(tenant)[1]], args=[LEASE_SECONDS, *renewed])
        # Of a request that left meanwhile Redis may have got the end first.
        self._remove(tenant, renewed - self._held.get(tenant, set()))

    def _remove(self, tenant: str, leases: set[str]) -> None:
        """Remove leases that nobody holds, in the background, as soon as Redis answers."""
        if not leases:
            return
        if tenant not in self._stray:
            self._stray[tenant] = set()
            task = asyncio.create_task(
                self._remove_stray(tenant),
                name="vase-stray-leases",
                context=contextvars.Context(),  # not that of the request which happens to be first
            )
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)
        if len(self._stray[tenant]) < _REMEMBERED:
            self._stray[tenant] |= leases

    async def _remove_stray(self, tenant: str) -> None:
        stray = self._stray[tenant]
        try:
            while stray and not self._closing:
                removed = list(stray)
                try:
                    await self._client.zrem(self._keys(tenant)[1], *removed)
                except (RedisError, OSError):
                    await asyncio.sleep(TIMEOUT_SECONDS)
                else:
                    stray.difference_update(removed)
        finally:
            del self._stray[tenant]
