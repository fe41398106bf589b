"""Who is calling: the API key decides, without one the client certificate, never another header."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import dataclasses
import functools
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from google.protobuf.message import DecodeError

from vase_sgl.gateway import keys, telemetry, tenants
from vase_sgl.gateway.errors import (
    InvalidRequest,
    PermissionDenied,
    TooManyChecks,
    Unauthenticated,
    as_status,
)
from vase_sgl.gateway.tenants import Role, Tenant, TenantFile, TenantFileError

logger = logging.getLogger(__name__)

#: Services anyone may call: probes and tools have no key.
OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
#: Checked keys remembered and for how long, so that argon2 runs once a minute for each.
_REMEMBERED = 4096
_REMEMBER_SECONDS = 60.0
#: argon2 checks at once; each takes 19 MiB, and anyone can cause one.
_PARALLEL_CHECKS = 4
#: Checks that run or wait; more are refused.
_WAITING_CHECKS = 256

_tenant: contextvars.ContextVar[Tenant] = contextvars.ContextVar("vase_tenant")


def current_tenant(*roles: Role) -> Tenant:
    """The calling tenant. Raises `PermissionDenied` unless it has one of `roles` (none: any)."""
    tenant = _tenant.get()
    require_role(tenant, *roles)
    return tenant


def require_role(tenant: Tenant, *roles: Role) -> None:
    """Raise `PermissionDenied` unless the tenant has one of `roles` (none: any)."""
    if roles and not tenant.has_role(*roles):
        wanted = " or ".join(f"`{role}`" for role in roles)
        raise PermissionDenied(
            f"tenant {tenant.name} lacks the role {wanted}; whoever runs the gateway can add it "
            "in the tenants file"
        )


@dataclasses.dataclass(frozen=True)
class Credential:
    """What a call brings: an API key, the subject of its client certificate (RFC 4514), or both.

    The certificate was verified in the TLS handshake.
    """

    key: str | None = dataclasses.field(default=None, repr=False)
    subject: str | None = None


class KeyAuthenticator:
    """Finds the tenant of a credential in a tenants file, which is read again when it changes.

    So a key that was removed from the file is refused from the next call on. A file that cannot be
    read keeps the last good one in force, and says so in the log.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises `TenantFileError` if the file is missing or wrong.

        `on_refusal` is called for each credential that is refused.
        """
        self._on_refusal = on_refusal
        self._path = path
        self._clock = clock
        self._stamp = _stamp(path)
        #: Keys the digests of this process only: what leaks of them tells nothing about a key.
        self._digest_key = secrets.token_bytes(32)
        self._checks = asyncio.Semaphore(_PARALLEL_CHECKS)
        self._waiting_checks = 0
        self._use(tenants.load(path))

    async def tenant_of(self, credential: Credential) -> Tenant:
        """The tenant of a key, or without one of a certificate. Raises `Unauthenticated`."""
        self._reload_if_changed()
        try:
            return await self._find(credential)
        except Unauthenticated:
            self._on_refusal()
            raise

    async def _find(self, credential: Credential) -> Tenant:
        if credential.key is not None:
            return await self._tenant_of_key(credential.key)
        if credential.subject is None:
            raise Unauthenticated(
                "no API key; send the metadata `authorization: Bearer <API key>`, in the client "
                "with api_key=..., on the command line with --api-key or VASE_API_KEY"
            )
        tenant = self._by_subject.get(credential.subject)
        if tenant is None:
            raise Unauthenticated(
                f"no tenant has the certificate subject {credential.subject!r}; send an API key, "
                "or have the subject added in the tenants file"
            )
        return tenant

    async def _tenant_of_key(self, key: str) -> Tenant:
        digest = hashlib.blake2b(key.encode(), key=self._digest_key, digest_size=32).digest()
        entry = self._remembered(digest)
        if entry is None:
            entry = await self._check(key, digest)
        if not entry.valid:
            raise Unauthenticated(
                "unknown or revoked API key; ask whoever runs the gateway for a new one "
                "(`vase-sgl tenants add`)"
            )
        return self._by_key_id[entry.key_id][0]

    def _remembered(self, digest: bytes) -> _Checked | None:
        entry = self._checked.get(digest)
        if entry is None or entry.until < self._clock():
            return None
        self._checked.move_to_end(digest)
        return entry

    async def _check(self, key: str, digest: bytes) -> _Checked:
        """Verify with argon2, and remember the outcome for a while."""
        key_id = keys.key_id_of(key)
        if key_id is None:
            raise Unauthenticated(
                "this is not an API key; one looks like vsk_<id>_<secret> and is made by "
                "`vase-sgl tenants add`"
            )
        if self._waiting_checks >= _WAITING_CHECKS:
            raise TooManyChecks(
                "too many API keys are being checked at once; try again in a moment",
                retry_seconds=1.0,
            )
        self._waiting_checks += 1
        try:
            async with self._checks:
                known = self._by_key_id
                stored = known.get(key_id)
                valid = await asyncio.to_thread(
                    keys.verify, key, stored[1].hash if stored else None
                )
        finally:
            self._waiting_checks -= 1
        entry = _Checked(key_id, valid, self._clock() + _REMEMBER_SECONDS)
        if known is not self._by_key_id:  # the file changed meanwhile
            return await self._check(key, digest)
        self._checked[digest] = entry
        if len(self._checked) > _REMEMBERED:
            self._checked.popitem(last=False)
        return entry

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
        self._by_subject = content.by_subject()
        if not self._by_key_id and not self._by_subject:
            logger.warning("nobody can call: %s holds no API key", self._path)
        #: Keyed digest of a key -> outcome, least recently used first.
        self._checked: collections.OrderedDict[bytes, _Checked] = collections.OrderedDict()


@dataclasses.dataclass(frozen=True)
class _Checked:
    """The outcome of a check, good until a moment of the clock."""

    key_id: str
    valid: bool
    until: float


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

    async def tenant_of(self, credential: Credential) -> Tenant:
        """The tenant `anonymous`, whatever the credential."""
        return self._tenant


Authenticator = KeyAuthenticator | NoAuthenticator


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic
    """Puts the caller's tenant into the call's context, or ends the call with UNAUTHENTICATED."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        open_to_all = handler_call_details.method.startswith(OPEN_SERVICES)
        return handler if open_to_all or handler is None else self._guarded(handler)

    def _guarded(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """The same handler behind a check. Only there the certificate is known."""
        behaviour: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        assert behaviour is not None, "the service has no call with a stream of requests"

        async def guarded(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with as_status(context, "authentication"):
                credential = _credential(context)
                # The handler runs in this same task, so it sees the variable, and no other does.
                _tenant.set(await self._authenticator.tenant_of(credential))
                # Here and not by gRPC: nothing is parsed for strangers, and the error has a text.
                message = _parse(handler, request)
            with telemetry.caller(context.invocation_metadata() or ()):
                return await behaviour(message, context)

        make = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(guarded, None, handler.response_serializer)


def _parse(handler: grpc.RpcMethodHandler[Any, Any], request: bytes) -> Any:
    assert handler.request_deserializer is not None
    try:
        return handler.request_deserializer(request)
    except DecodeError as error:
        raise InvalidRequest(
            "the message cannot be decoded; it is no message of this call, or was damaged"
        ) from error


def _credential(context: grpc.aio.ServicerContext[Any, Any]) -> Credential:
    """What the call brings. Raises `Unauthenticated` for a malformed header."""
    key = None
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            key = bearer(value if isinstance(value, str) else value.decode("latin-1"))
    certificates = context.auth_context().get("x509_pem_cert", ())
    subject = next((_subject(bytes(pem)) for pem in certificates), None)
    return Credential(key, subject)


def bearer(header: str) -> str:
    """The key of an `authorization` header. Raises `Unauthenticated`."""
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("the authorization metadata must read `Bearer <API key>`")
    return key.strip()


@functools.lru_cache(maxsize=1024)
def _subject(pem: bytes) -> str:
    return x509.load_pem_x509_certificate(pem).subject.rfc4514_string()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
