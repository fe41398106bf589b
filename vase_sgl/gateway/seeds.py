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
import enum
from collections.abc import Mapping
from typing import Any, Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vase_sgl.eviction.params import MAX_SEED
from vase_sgl.gateway.errors import InvalidRequest
from vase_sgl.gateway.tenants import SeedPolicy, Tenant

_SALT = b"vase-sgl seeds v1"


class SeedOrigin(enum.StrEnum):
    """What a request's seeds were derived from, beside the master secret."""

    REQUEST_SEED = "request-seed"
    REQUEST_ID = "request-id"
    TENANT = "tenant"


@dataclasses.dataclass(frozen=True)
class Seeds:
    """The seeds of one generation and where they come from.

    origin: None in records from before it was recorded. request_seed: with that origin only.
    """

    sampling: int
    eviction: int
    policy: SeedPolicy
    master_version: int
    origin: SeedOrigin | None
    request_seed: int | None


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
        origin = SeedOrigin.REQUEST_SEED
    elif policy in (SeedPolicy.FIXED, SeedPolicy.LOCKED):
        origin = SeedOrigin.TENANT
    else:
        origin = SeedOrigin.REQUEST_ID
    encoded = _encode(origin, request_id=request_id, request_seed=request_seed)
    master = tenant.master
    return Seeds(
        sampling=derive(master.value, "sampling", encoded, sample_index),
        eviction=derive(master.value, "eviction", encoded, sample_index),
        policy=policy,
        master_version=master.version,
        origin=origin,
        request_seed=request_seed,
    )


class SeedCheck(enum.Enum):
    """What `check_seeds` finds."""

    #: The seeds are what the tenant's secret gives.
    VERIFIED = "verified"
    #: They are not, or not those that a replay takes: the record or the secret was changed.
    MISMATCH = "mismatch"
    #: The tenant no longer has the version of the secret that the record names.
    VERSION_REMOVED = "version removed"
    #: The record is from before origins were recorded.
    ORIGIN_UNKNOWN = "origin unknown"


def check_seeds(
    tenant: Tenant,
    seeds: Seeds,
    *,
    sampling: Mapping[str, Any],
    eviction: Mapping[str, Any] | None,
    request_id: str,
    sample_index: int,
) -> SeedCheck:
    """Derive recorded seeds again. A replay does not need that: it takes those recorded.

    sampling, eviction: the recorded parameters, whose seeds are those that a replay takes.
    """
    taken = sampling.get("sampling_seed") == seeds.sampling and (
        eviction is None or eviction.get("seed") == seeds.eviction
    )
    if not taken:
        return SeedCheck.MISMATCH
    if seeds.origin is None:
        return SeedCheck.ORIGIN_UNKNOWN
    master = tenant.master_version(seeds.master_version)
    if master is None:
        return SeedCheck.VERSION_REMOVED
    encoded = _encode(seeds.origin, request_id=request_id, request_seed=seeds.request_seed)
    derived = (
        derive(master.value, "sampling", encoded, sample_index),
        derive(master.value, "eviction", encoded, sample_index),
    )
    same = derived == (seeds.sampling, seeds.eviction)
    return SeedCheck.VERIFIED if same else SeedCheck.MISMATCH


def _encode(origin: SeedOrigin, *, request_id: str, request_seed: int | None) -> bytes:
    match origin:
        case SeedOrigin.REQUEST_SEED:
            assert request_seed is not None
            return b"\x01" + request_seed.to_bytes(8, "big")
        case SeedOrigin.REQUEST_ID:
            encoded = request_id.encode()
            return b"\x02" + len(encoded).to_bytes(4, "big") + encoded
        case SeedOrigin.TENANT:
            return b"\x03"


def derive(
    master: bytes, label: Literal["sampling", "eviction"], origin: bytes, sample_index: int
) -> int:
    """One seed, 0 to 2^63 - 1, as the module's text defines it."""
    info = label.encode() + b"\x00" + origin + sample_index.to_bytes(4, "big")
    key = HKDF(algorithm=SHA256(), length=8, salt=_SALT, info=info).derive(master)
    return int.from_bytes(key, "big") & MAX_SEED
