"""Who is calling: the API key decides, without one the client certificate, never another header."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from vase_sgl.gateway import keys, tenants
from vase_sgl.gateway.errors import KeyNotChecked, PermissionDenied, Unauthenticated
from vase_sgl.gateway.key_checks import KeyChecks
from vase_sgl.gateway.tenants import (
    Role,
    Tenant,
    TenantFile,
    TenantFileError,
    TenantFileUnreadable,
)

logger = logging.getLogger(__name__)

#: What `_stamp` sees of a file.
_Stamp = tuple[int, int, int, int]

_tenant: contextvars.ContextVar[Tenant] = contextvars.ContextVar("vase_tenant")


def set_current_tenant(tenant: Tenant) -> None:
    """Who the rest of the current call is for."""
    _tenant.set(tenant)


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
        on_refusal: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Raises `TenantFileError` if the file is missing or wrong.

        `on_refusal` is called, with the metric label of the reason, for each credential that is
        refused.
        """
        self._on_refusal = on_refusal
        self._path = path
        #: Of the content in force, or of a later one that was refused.
        self._stamp = _stamp(path)
        #: Why the file at a stamp is not in force, as it was logged.
        self._complaint: tuple[_Stamp | None, str] | None = None
        self._reloading = asyncio.Lock()
        self._checks = KeyChecks()
        self._use(tenants.load(path))

    async def tenant_of(self, credential: Credential) -> Tenant:
        """The tenant of a key, or without one of a certificate.

        Raises `Unauthenticated` and `KeyNotChecked`.
        """
        if _stamp(self._path) != self._stamp:
            await self._reload()
        try:
            return await self._find(credential)
        except Unauthenticated:
            self._on_refusal("unauthenticated")
            raise
        except KeyNotChecked:
            self._on_refusal("key_not_checked")
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
        key_id = keys.key_id_of(key)
        if key_id is None:
            raise Unauthenticated(
                "this is not an API key; one looks like vsk_<id>_<secret> and is made by "
                "`vase-sgl tenants add`"
            )
        while True:
            stored = self._hash_of(key_id)
            valid = await self._checks.matches(key, stored)
            if stored == self._hash_of(key_id):
                break  # else the file changed meanwhile
        if not valid:
            raise Unauthenticated(
                "unknown or revoked API key; ask whoever runs the gateway for a new one "
                "(`vase-sgl tenants add`)"
            )
        return self._by_key_id[key_id][0]

    def _hash_of(self, key_id: str) -> str | None:
        entry = self._by_key_id.get(key_id)
        return entry[1].hash if entry else None

    async def _reload(self) -> None:
        """Read the file unless a call before has done so meanwhile.

        In a thread: a file of a thousand tenants takes a second, and streams go on meanwhile.
        """
        async with self._reloading:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            try:
                self._use(await asyncio.to_thread(tenants.load, self._path))
            except TenantFileUnreadable as error:
                # Tried again with the next call: what lets it be read need not change its stamp.
                self._complain(stamp, error)
            except TenantFileError as error:
                self._stamp = stamp
                self._complain(stamp, error)
            else:
                self._stamp = stamp
                self._complaint = None
                logger.info("tenants file %s was read again", self._path)

    def _complain(self, stamp: _Stamp | None, error: TenantFileError) -> None:
        complaint = stamp, str(error)
        if complaint != self._complaint:
            logger.error("the tenants loaded before stay in force: %s", error)
        self._complaint = complaint

    def _use(self, content: TenantFile) -> None:
        self._by_key_id = content.by_key_id()
        self._by_subject = content.by_subject()
        if not self._by_key_id and not self._by_subject:
            logger.warning("nobody can call: %s holds no API key", self._path)
        self._checks.keep_only({key.hash for _, key in self._by_key_id.values()})


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


def bearer(header: str) -> str:
    """The key of an `authorization` header. Raises `Unauthenticated`."""
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("the authorization metadata must read `Bearer <API key>`")
    return key.strip()


def _stamp(path: Path) -> _Stamp | None:
    """What changes when the file does; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    # The change time too: anybody can set the other one back, and `cp -p` does.
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
