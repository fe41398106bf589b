"""Seeds of a request: derived from the tenant's master secret, never random.

    seed = first 8 bytes, big-endian, of HKDF-SHA256(ikm, salt, info), without the highest bit
    ikm  = the tenant's master secret (32 bytes)
    salt = b"vase-sgl seeds v1"
    info = label || 0x00 || origin || sample index (u32, big-endian)
    label  = b"sampling" or b"eviction"
    origin = 0x01 || request seed (u64, big-endian)                     the request's seed
           | 0x02 || length (u32, big-endian) || request id (UTF-8)     the request's id
           | 0x03                                                       the tenant's own seed

The encoding is unambiguous and part of the record format: changing it needs a new salt.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vase_sgl.gateway.errors import InvalidRequest
from vase_sgl.gateway.tenants import SeedPolicy, Tenant

MAX_SEED = 2**63 - 1
MAX_SAMPLE_INDEX = 2**31 - 1
_SALT = b"vase-sgl seeds v1"


@dataclasses.dataclass(frozen=True)
class Seeds:
    """The seeds of one generation and where they come from."""

    sampling: int
    eviction: int
    policy: SeedPolicy
    master_version: int


def seeds_for(
    tenant: Tenant, *, request_id: str, request_seed: int | None, sample_index: int
) -> Seeds:
    """The seeds of a request under the tenant's policy.

    Raises `InvalidRequest` for a seed that the policy refuses; none is ever ignored.
    """
    policy = tenant.seed_policy
    if request_seed is not None and policy in (SeedPolicy.DERIVED, SeedPolicy.LOCKED):
        raise InvalidRequest(
            f"seed: tenant {tenant.name} has the seed policy `{policy}`, which takes no seed from "
            "a request; leave seed out, or have the policy changed to `client` or `fixed`"
        )
    if request_seed is not None:
        origin = b"\x01" + request_seed.to_bytes(8, "big")
    elif policy in (SeedPolicy.FIXED, SeedPolicy.LOCKED):
        origin = b"\x03"
    else:
        encoded = request_id.encode()
        origin = b"\x02" + len(encoded).to_bytes(4, "big") + encoded
    master = tenant.master
    return Seeds(
        sampling=derive(master.value, "sampling", origin, sample_index),
        eviction=derive(master.value, "eviction", origin, sample_index),
        policy=policy,
        master_version=master.version,
    )


def derive(
    master: bytes, label: Literal["sampling", "eviction"], origin: bytes, sample_index: int
) -> int:
    """One seed, 0 to 2^63 - 1, as the module's text defines it."""
    info = label.encode() + b"\x00" + origin + sample_index.to_bytes(4, "big")
    key = HKDF(algorithm=SHA256(), length=8, salt=_SALT, info=info).derive(master)
    return int.from_bytes(key, "big") & MAX_SEED
