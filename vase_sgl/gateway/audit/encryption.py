"""Encryption of payloads: AES-256-GCM under keys with versions.

    payload = nonce (12 random bytes) || ciphertext || tag (16 bytes)
    associated data = b"vase-sgl audit v1" || 0x00 || tenant || 0x00 || record id

so that a payload moved to another record or tenant is refused. One key encrypts; the others still
decrypt. Nothing is ever encrypted anew: the chain covers the ciphertext.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vase_sgl.gateway.errors import FailedPrecondition

KEY_BYTES = 32
_NONCE_BYTES = 12


class KeyRing:
    """Keys by version; none: payloads are stored as they are."""

    def __init__(
        self, keys: Mapping[int, bytes] | None = None, *, active: int | None = None
    ) -> None:
        """active: version of the key that encrypts; None: the highest.

        Raises `ValueError` for a key that is not 32 bytes long.
        """
        for version, key in (keys or {}).items():
            if len(key) != KEY_BYTES:
                raise ValueError(f"key version {version} has {len(key)} bytes instead of 32")
        self._ciphers = {version: AESGCM(key) for version, key in (keys or {}).items()}
        #: Version of the key that encrypts; None: nothing is encrypted.
        self.active = max(self._ciphers, default=None) if active is None else active

    def encrypt(self, content: bytes, *, tenant: str, record_id: str) -> bytes:
        """The payload under the active key. Raises `ValueError` if there is none."""
        if self.active is None:
            raise ValueError("there is no key to encrypt with")
        nonce = os.urandom(_NONCE_BYTES)
        cipher = self._ciphers[self.active]
        return nonce + cipher.encrypt(nonce, content, _associated(tenant, record_id))

    def decrypt(self, payload: bytes, *, version: int, tenant: str, record_id: str) -> bytes:
        """The content. Raises `FailedPrecondition` if the key is missing or another one."""
        cipher = self._ciphers.get(version)
        if cipher is None:
            raise FailedPrecondition(
                f"the content of record {record_id} is encrypted with key version {version}, which "
                "this gateway does not have; add it to audit.encryption_keys"
            )
        nonce, sealed = payload[:_NONCE_BYTES], payload[_NONCE_BYTES:]
        try:
            return cipher.decrypt(nonce, sealed, _associated(tenant, record_id))
        except InvalidTag as error:
            raise FailedPrecondition(
                f"the content of record {record_id} cannot be decrypted: key version {version} in "
                "audit.encryption_keys is not the one it was encrypted with, or the content was "
                "changed (`vase-sgl audit verify` tells)"
            ) from error


def _associated(tenant: str, record_id: str) -> bytes:
    return b"vase-sgl audit v1\0" + tenant.encode() + b"\0" + record_id.encode()
