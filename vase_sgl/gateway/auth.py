"""Who is calling: the API key of the call decides, never another header."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from vase_sgl.gateway import keys, tenants
from vase_sgl.gateway.errors import GatewayError, PermissionDenied, Unauthenticated
from vase_sgl.gateway.tenants import Role, Tenant, TenantFile, TenantFileError

logger = logging.getLogger(__name__)

#: Services anyone may call: probes and tools have no key.
OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
#: Verified keys remembered, so that argon2 runs once per key and file version.
_CACHE_SIZE = 4096
#: argon2 checks at once; each takes 19 MiB, and anyone can cause one.
_PARALLEL_CHECKS = 4

_tenant: contextvars.ContextVar[Tenant] = contextvars.ContextVar("vase_tenant")


def current_tenant(*roles: Role) -> Tenant:
    """The calling tenant. Raises `PermissionDenied` unless it has one of `roles` (none: any)."""
    tenant = _tenant.get()
    if roles and not tenant.has_role(*roles):
        wanted = " or ".join(f"`{role}`" for role in roles)
        raise PermissionDenied(
            f"tenant {tenant.name} lacks the role {wanted}; whoever runs the gateway can add it "
            "in the tenants file"
        )
    return tenant


class KeyAuthenticator:
    """Finds the tenant of an API key in a tenants file, which is read again when it changes.

    A file that cannot be read keeps the last good one in force, and says so in the log.
    """

    def __init__(self, path: Path) -> None:
        """Raises `TenantFileError` if the file is missing or wrong."""
        self._path = path
        self._stamp = _stamp(path)
        self._use(tenants.load(path))
        self._checks = asyncio.Semaphore(_PARALLEL_CHECKS)

    async def tenant_of(self, key: str) -> Tenant:
        """The tenant the key belongs to. Raises `Unauthenticated`."""
        self._reload_if_changed()
        digest = hashlib.sha256(key.encode()).digest()
        key_id = self._verified.get(digest)
        if key_id is not None:
            self._verified.move_to_end(digest)
            return self._by_key_id[key_id][0]
        key_id = keys.key_id_of(key)
        if key_id is None:
            raise Unauthenticated(
                "this is not an API key; one looks like vsk_<id>_<secret> and is made by "
                "`vase-sgl tenants add`"
            )
        known = self._by_key_id
        entry = known.get(key_id)
        async with self._checks:
            valid = await asyncio.to_thread(keys.verify, key, entry[1].hash if entry else None)
        if entry is None or not valid:
            raise Unauthenticated(
                "unknown or revoked API key; ask whoever runs the gateway for a new one "
                "(`vase-sgl tenants add`)"
            )
        if known is self._by_key_id:  # else the file changed meanwhile: do not remember
            self._verified[digest] = key_id
            if len(self._verified) > _CACHE_SIZE:
                self._verified.popitem(last=False)
        return entry[0]

    def _reload_if_changed(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._use(tenants.load(self._path))
        except TenantFileError as error:
            logger.error("the tenants loaded before stay in force: %s", error)
        else:
            logger.info("tenants file %s was read again", self._path)

    def _use(self, content: TenantFile) -> None:
        self._by_key_id = content.by_key_id()
        if not self._by_key_id:
            logger.warning("nobody can call: %s holds no API key", self._path)
        #: SHA-256 of a verified key -> key id, least recently used first.
        self._verified: collections.OrderedDict[bytes, str] = collections.OrderedDict()


class NoAuthenticator:
    """Takes every caller for the tenant `anonymous`. Only for `insecure_no_auth: true`."""

    def __init__(self) -> None:
        logger.warning(
            "INSECURE: authentication is off (insecure_no_auth); everyone who reaches this port "
            "may generate, replay and read all records as tenant `anonymous`"
        )
        # A constant secret: records of tenant `anonymous` stay reproducible over restarts.
        secret = tenants.MasterSecret(version=1, secret="A" * 43 + "=")
        self._tenant = Tenant(
            name="anonymous", roles=frozenset({Role.ADMIN}), master_secrets=(secret,)
        )

    async def tenant_of(self, key: str) -> Tenant:
        """The tenant `anonymous`, whatever the key."""
        return self._tenant


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic
    """Puts the caller's tenant into the call's context, or ends the call with UNAUTHENTICATED."""

    def __init__(self, authenticator: KeyAuthenticator | NoAuthenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if handler_call_details.method.startswith(OPEN_SERVICES):
            return await continuation(handler_call_details)
        handler = await continuation(handler_call_details)
        try:
            key = _bearer(handler_call_details, self._authenticator)
            tenant = await self._authenticator.tenant_of(key)
        except GatewayError as error:
            return _refusal(error, handler)
        # The handler runs in this same task, so it sees the variable and no other call does.
        _tenant.set(tenant)
        return handler


def _bearer(
    details: grpc.HandlerCallDetails, authenticator: KeyAuthenticator | NoAuthenticator
) -> str:
    if isinstance(authenticator, NoAuthenticator):
        return ""
    for name, value in details.invocation_metadata:
        if name == "authorization":
            scheme, _, key = (value if isinstance(value, str) else value.decode()).partition(" ")
            if scheme.lower() != "bearer" or not key.strip():
                raise Unauthenticated("the authorization metadata must read `Bearer <API key>`")
            return key.strip()
    raise Unauthenticated(
        "no API key; send the metadata `authorization: Bearer <API key>`, in the client with "
        "api_key=..., on the command line with --api-key or VASE_API_KEY"
    )


def _refusal(
    error: GatewayError, handler: grpc.RpcMethodHandler[Any, Any] | None
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind that ends the call with `error`."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(error.code, str(error))

    if handler is not None and handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
