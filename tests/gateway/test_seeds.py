"""Seed derivation: pinned vectors, an independent HKDF, and the four policies."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vase_sgl.eviction.params import MAX_SEED
from vase_sgl.gateway.errors import InvalidRequest
from vase_sgl.gateway.seeds import SeedCheck, Seeds, check_seeds, derive, seeds_for
from vase_sgl.gateway.tenants import MasterSecret, SeedPolicy, Tenant

MASTER = bytes(range(32))


def tenant(policy: str, *secrets: bytes) -> Tenant:
    masters = [
        MasterSecret(version=n, secret=base64.b64encode(s).decode())
        for n, s in enumerate(secrets or (MASTER,), start=1)
    ]
    return Tenant(name="t", seed_policy=SeedPolicy(policy), master_secrets=tuple(masters))


def seeds(policy: str, *secrets: bytes, seed: int | None = None, index: int = 0) -> Seeds:
    return seeds_for(
        tenant(policy, *secrets), request_id="ab" * 16, request_seed=seed, sample_index=index
    )


def reference(label: str, origin: bytes, index: int) -> int:
    """RFC 5869 by hand."""
    extracted = hmac.digest(b"vase-sgl seeds v1", MASTER, hashlib.sha256)
    info = label.encode() + b"\0" + origin + index.to_bytes(4, "big")
    block = hmac.digest(extracted, info + b"\x01", hashlib.sha256)
    return int.from_bytes(block[:8], "big") & MAX_SEED


VECTORS = [
    ("sampling", b"\x01" + (7).to_bytes(8, "big"), 0, 6960102702886099694),
    ("eviction", b"\x01" + (7).to_bytes(8, "big"), 0, 4677064469032506764),
    ("sampling", b"\x01" + (7).to_bytes(8, "big"), 1, 823699773778506139),
    ("sampling", b"\x02" + (32).to_bytes(4, "big") + b"ab" * 16, 0, 813571893095096296),
    ("eviction", b"\x03", 0, 7269469559477965570),
]


@pytest.mark.parametrize(("label", "origin", "index", "expected"), VECTORS)
def test_pinned_vectors(label: str, origin: bytes, index: int, expected: int) -> None:
    assert derive(MASTER, label, origin, index) == expected  # type: ignore[arg-type]
    assert reference(label, origin, index) == expected


@given(seed=st.integers(0, MAX_SEED), index=st.integers(0, 2**31 - 1))
def test_the_encoding_is_the_documented_one(seed: int, index: int) -> None:
    found = seeds("client", seed=seed, index=index)
    origin = b"\x01" + seed.to_bytes(8, "big")
    assert found.sampling == reference("sampling", origin, index) <= MAX_SEED
    assert found.eviction == reference("eviction", origin, index) <= MAX_SEED


def test_client_takes_the_seed_of_the_request_or_its_id() -> None:
    assert seeds("client", seed=7).sampling == VECTORS[0][3]
    assert seeds("client").sampling == VECTORS[3][3] == seeds("derived").sampling


def test_fixed_is_the_tenants_own_seed_unless_the_request_brings_one() -> None:
    assert seeds("fixed").eviction == VECTORS[4][3] == seeds("locked").eviction
    assert seeds("fixed", seed=7).sampling == VECTORS[0][3]


@pytest.mark.parametrize("policy", ["derived", "locked"])
def test_a_seed_is_refused_not_ignored(policy: str) -> None:
    with pytest.raises(InvalidRequest, match=f"seed policy `{policy}`.*leave seed out"):
        seeds(policy, seed=7)


def test_the_newest_master_secret_counts_and_is_named() -> None:
    rotated = seeds("fixed", MASTER, b"\xff" * 32)
    assert rotated.master_version == 2 and rotated.sampling != seeds("fixed").sampling


@pytest.mark.parametrize("policy", ["client", "derived", "fixed", "locked"])
def test_samples_of_one_request_have_seeds_of_their_own(policy: str) -> None:
    found = [seeds(policy, index=n) for n in range(100)]
    assert len({s.sampling for s in found}) == len({s.eviction for s in found}) == 100
    assert not {s.sampling for s in found} & {s.eviction for s in found}


@pytest.mark.parametrize(
    ("policy", "seed", "origin"),
    [
        ("client", 7, "request-seed"),
        ("client", None, "request-id"),
        ("derived", None, "request-id"),
        ("fixed", 7, "request-seed"),
        ("fixed", None, "tenant"),
        ("locked", None, "tenant"),
    ],
)
def test_recorded_seeds_can_be_checked(policy: str, seed: int | None, origin: str) -> None:
    found = seeds(policy, seed=seed, index=3)
    assert (found.origin, found.request_seed) == (origin, seed)

    def check(seeds: Seeds, index: int = 3, *secrets: bytes) -> SeedCheck:
        return check_seeds(
            tenant(policy, *secrets),
            seeds,
            sampling={"sampling_seed": seeds.sampling},
            eviction={"seed": seeds.eviction},
            request_id="ab" * 16,
            sample_index=index,
        )

    assert check(found) is SeedCheck.VERIFIED
    assert check(found, 3, MASTER, b"2" * 32) is SeedCheck.VERIFIED  # rotated since
    assert check(found, 4) is SeedCheck.MISMATCH
    assert check(dataclasses.replace(found, eviction=1)) is SeedCheck.MISMATCH
    assert check(found, 3, b"3" * 32) is SeedCheck.MISMATCH  # another secret, same version
    assert check(dataclasses.replace(found, master_version=2)) is SeedCheck.VERSION_REMOVED
    assert check(dataclasses.replace(found, origin=None)) is SeedCheck.ORIGIN_UNKNOWN


@pytest.mark.parametrize("origin", ["recorded", None])
@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ({}, SeedCheck.VERIFIED),
        ({"eviction": None}, SeedCheck.VERIFIED),
        ({"sampling": {"sampling_seed": 5}}, SeedCheck.MISMATCH),
        ({"sampling": {}}, SeedCheck.MISMATCH),
        ({"eviction": {"seed": 5}}, SeedCheck.MISMATCH),
        ({"eviction": {}}, SeedCheck.MISMATCH),
    ],
)
def test_seeds_that_a_replay_does_not_take_are_not_verified(
    origin: str | None, taken: dict[str, Any], expected: SeedCheck
) -> None:
    """Whether or not their origin was recorded."""
    found = seeds("client", seed=7)
    if origin is None:
        found = dataclasses.replace(found, origin=None)
        if expected is SeedCheck.VERIFIED:
            expected = SeedCheck.ORIGIN_UNKNOWN
    parameters = {
        "sampling": {"sampling_seed": found.sampling},
        "eviction": {"seed": found.eviction},
        **taken,
    }
    check = check_seeds(tenant("client"), found, request_id="ab" * 16, sample_index=0, **parameters)
    assert check is expected
