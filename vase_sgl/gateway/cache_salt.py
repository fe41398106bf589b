"""Whose cached prompts a request may find: the salt under which workers keep a tenant's.

    salt = HKDF-SHA256(ikm, salt, info), 16 bytes, in hex
    ikm  = the tenant's master secret of the highest version (32 bytes)
    salt = b"vase-sgl prefix cache v1"
    info = the tenant's name (UTF-8)

How soon an answer begins shows whether a worker had its prompt. So what a tenant can find must be
its own: all gateways give a tenant one salt, and nobody else, who reaches a worker, can name it.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vase_sgl.gateway.tenants import Tenant

_SALT = b"vase-sgl prefix cache v1"


def cache_salt(tenant: Tenant) -> str:
    """The tenant's salt. A new version of its secret means another one, and an empty cache."""
    hkdf = HKDF(algorithm=SHA256(), length=16, salt=_SALT, info=tenant.name.encode())
    return hkdf.derive(tenant.master.value).hex()


class CacheSalts:
    """What each request goes to a worker with."""

    def __init__(self, *, shared: bool) -> None:
        """`shared`: tenants find each other's cached prompts."""
        self._shared = shared

    def of(self, tenant: Tenant) -> str | None:
        """The salt of the tenant's requests; None: all find what has none."""
        return None if self._shared else cache_salt(tenant)
