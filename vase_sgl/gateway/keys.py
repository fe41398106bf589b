"""API keys: `vsk_<key id>_<secret>`. Only an argon2id hash of the whole key is stored."""

from __future__ import annotations

import dataclasses
import re
import secrets

import argon2

#: OWASP's smallest argon2id setting. The secret has 256 random bits, so the hash need not slow
#: guessing down; it must only not be reversible.
_HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)

_KEY = re.compile(r"vsk_([0-9a-f]{12})_([0-9a-f]{64})")

#: Checked in place of an unknown key's hash, so that both take equally long.
_DECOY_HASH = _HASHER.hash(secrets.token_hex(32))


class NotChecked(Exception):
    """No hash could be computed: there was no memory, or the stored one is damaged."""


@dataclasses.dataclass(frozen=True)
class NewKey:
    """A key that was just made. `key` is shown once and never stored."""

    key: str
    key_id: str
    hash: str


def new_key() -> NewKey:
    """A key with a random id (48 bits) and secret (256 bits)."""
    key_id = secrets.token_hex(6)
    key = f"vsk_{key_id}_{secrets.token_hex(32)}"
    return NewKey(key, key_id, _HASHER.hash(key))


def key_id_of(key: str) -> str | None:
    """The id inside a key, or None if it does not have a key's form."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def verify(key: str, stored_hash: str | None) -> bool:
    """Whether `key` has this hash. Takes some 30 ms and 19 MiB, also when there is no hash.

    What it says holds for good. Raises `NotChecked` where nothing can be said.
    """
    try:
        _HASHER.verify(stored_hash or _DECOY_HASH, key)
    except (argon2.exceptions.VerifyMismatchError, argon2.exceptions.InvalidHashError):
        return False
    except argon2.exceptions.VerificationError as error:
        raise NotChecked(str(error)) from error
    return stored_hash is not None
