"""Tenants: who may do what, with which seeds and within which limits. One YAML file.

The file holds key hashes and master secrets, so it is made with mode 0600. It is replaced
atomically: a reader sees the old file or the new one.
"""

from __future__ import annotations

import base64
import collections
import datetime
import enum
import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import yaml
from cryptography import x509
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vase_sgl.eviction.policies import POLICIES
from vase_sgl.gateway.keys import new_key
from vase_sgl.gateway.limits.usage import UsageLimits
from vase_sgl.gateway.problems import describe


class TenantFileError(Exception):
    """The tenants file cannot be used. The text names the place and the cure."""


class TenantFileUnreadable(TenantFileError):
    """It is not there or cannot be read: nothing is known about its content."""


class Role(enum.StrEnum):
    """What a tenant may do. `admin` includes the others."""

    GENERATE = "generate"
    REPLAY = "replay"
    AUDIT = "audit"
    #: Have what requests keep written to the workers' disks; beside `generate`.
    INSPECT = "inspect"
    ADMIN = "admin"


class SeedPolicy(enum.StrEnum):
    """Where a request's seeds come from."""

    #: The request's seed; without one, the request id.
    CLIENT = "client"
    #: The request id. A seed in the request is refused.
    DERIVED = "derived"
    #: The tenant's own seed, unless the request brings one.
    FIXED = "fixed"
    #: The tenant's own seed. A seed in the request is refused.
    LOCKED = "locked"


class Retention(enum.StrEnum):
    """What the audit store keeps of a prompt and its answer."""

    #: Token ids, text and stop strings; needed for a replay.
    FULL = "full"
    #: Salted digests of them.
    HASH = "hash"


def _known_policies(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise ValueError(f"unknown policy {', '.join(unknown)}; choose from {', '.join(POLICIES)}")
    return names


def _usable_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name):
        raise ValueError("must be lower-case letters, digits and dashes, 63 at most, no dash first")
    return name


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Model):
    """Ceilings of one tenant's requests. They only ever lower the server's own."""

    #: KV entries per layer and KV head.
    max_budget: int = Field(default=16384, ge=2)
    max_new_tokens: int = Field(default=32768, ge=1)
    max_prompt_tokens: int = Field(default=131072, ge=1)
    #: Policies the tenant may use; a request without eviction counts as `full`.
    policies: Annotated[tuple[str, ...], AfterValidator(_known_policies)] = tuple(POLICIES)
    #: Requests per second, evenly; a rested tenant may send one second's worth at once. None: any.
    requests_per_second: float | None = Field(default=None, gt=0, le=1e6)
    #: Prompt and output tokens per minute. Checked on arrival against what is left, charged at the
    #: end of a request. None: any.
    tokens_per_minute: int | None = Field(default=None, ge=1, le=10**12)
    #: Requests at the gateway at once, waiting or running. None: any.
    max_concurrent_requests: int | None = Field(default=None, ge=1)

    @property
    def usage(self) -> UsageLimits:
        """The limits that are counted over time."""
        return UsageLimits(
            self.requests_per_second, self.tokens_per_minute, self.max_concurrent_requests
        )


class MasterSecret(_Model):
    """What a tenant's seeds are derived from. Rotate by adding a higher version."""

    version: int = Field(ge=1)
    #: 32 bytes, base64.
    secret: str = Field(repr=False)

    @model_validator(mode="after")
    def _check(self) -> MasterSecret:
        if len(self.value) != 32:
            raise ValueError("a master secret has 32 bytes, base64 encoded")
        return self

    @property
    def value(self) -> bytes:
        """The secret itself. Raises `ValueError` if it is not base64."""
        return base64.b64decode(self.secret, validate=True)


class StoredKey(_Model):
    """An API key as stored."""

    id: str
    hash: str = Field(repr=False)
    created: datetime.datetime


def _normal_subjects(subjects: tuple[str, ...]) -> tuple[str, ...]:
    """As certificates are read: one spelling of each."""
    try:
        return tuple(x509.Name.from_rfc4514_string(s).rfc4514_string() for s in subjects)
    except ValueError as error:
        raise ValueError(
            "a certificate subject is written as in RFC 4514: CN=alice,O=Example, no blanks after "
            "commas"
        ) from error


class Tenant(_Model):
    """One tenant."""

    name: Annotated[str, AfterValidator(_usable_name)]
    roles: frozenset[Role] = frozenset({Role.GENERATE, Role.REPLAY})
    seed_policy: SeedPolicy = SeedPolicy.CLIENT
    limits: Limits = Limits()
    #: Of new records; those that are stored stay as they are.
    retention: Retention = Retention.FULL
    master_secrets: tuple[MasterSecret, ...] = Field(min_length=1, repr=False)
    keys: tuple[StoredKey, ...] = ()
    #: Subjects of client certificates (RFC 4514, `CN=alice,O=Example`) that stand for a key. Only
    #: used where the gateway asks for certificates, `tls.client_ca`.
    certificate_subjects: Annotated[tuple[str, ...], AfterValidator(_normal_subjects)] = ()

    @model_validator(mode="after")
    def _check(self) -> Tenant:
        versions = [secret.version for secret in self.master_secrets]
        if len(set(versions)) != len(versions):
            raise ValueError("every master secret needs a version of its own")
        return self

    @property
    def master(self) -> MasterSecret:
        """The master secret new seeds are derived from: the one with the highest version."""
        return max(self.master_secrets, key=lambda secret: secret.version)

    def master_version(self, version: int) -> MasterSecret | None:
        """The master secret of this version; None if it was removed."""
        return next((s for s in self.master_secrets if s.version == version), None)

    def has_role(self, *roles: Role) -> bool:
        """Whether the tenant has one of `roles`, or is `admin`."""
        return Role.ADMIN in self.roles or not self.roles.isdisjoint(roles)


class TenantFile(_Model):
    """The content of a tenants file."""

    version: int = Field(default=1, ge=1, le=1)
    tenants: tuple[Tenant, ...] = ()
    #: Names of removed tenants. Records belong to a name: another tenant with it would get theirs.
    removed: tuple[Annotated[str, AfterValidator(_usable_name)], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> TenantFile:
        for kind, ids in (
            ("tenant name", [tenant.name for tenant in self.tenants]),
            ("key id", [key.id for tenant in self.tenants for key in tenant.keys]),
            ("certificate subject", [s for t in self.tenants for s in t.certificate_subjects]),
        ):
            twice = sorted(i for i, times in collections.Counter(ids).items() if times > 1)
            if twice:
                raise ValueError(f"{kind} {', '.join(twice)} is there more than once")
        again = sorted({tenant.name for tenant in self.tenants}.intersection(self.removed))
        if again:
            raise ValueError(
                f"tenant name {', '.join(again)} is under `removed` too: whoever has it gets the "
                "removed tenant's records; take it out there if that is meant"
            )
        return self

    def by_key_id(self) -> dict[str, tuple[Tenant, StoredKey]]:
        """Every key with its tenant, by key id."""
        return {key.id: (tenant, key) for tenant in self.tenants for key in tenant.keys}

    def by_subject(self) -> dict[str, Tenant]:
        """Every certificate subject with its tenant."""
        return {s: tenant for tenant in self.tenants for s in tenant.certificate_subjects}


def new_master_secret(version: int = 1) -> MasterSecret:
    """A random master secret."""
    return MasterSecret(version=version, secret=base64.b64encode(secrets.token_bytes(32)).decode())


def load(path: Path) -> TenantFile:
    """Read a tenants file. Raises `TenantFileError`, and of it `TenantFileUnreadable`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        loaded = TenantFile.model_validate({} if content is None else content)
    except FileNotFoundError as error:
        raise TenantFileUnreadable(
            f"there is no tenants file {path}; make one with "
            f"`vase-sgl tenants add NAME --file {path}`"
        ) from error
    except OSError as error:
        raise TenantFileUnreadable(f"cannot read tenants file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TenantFileError(
            f"{path} is not text in UTF-8, from byte {error.start} on; save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise TenantFileError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        raise TenantFileError(f"{path}: {describe(error)}") from error
    except ValueError as error:  # of a date or number that YAML knows and Python does not
        raise TenantFileError(f"{path} holds a value that cannot be: {error}") from error
    if "tenants" not in loaded.model_fields_set:
        # So it is while somebody writes it in place, or after that on a full disk.
        raise TenantFileError(
            f"{path} has no list of tenants, as if it were cut off; an empty one is `tenants: []`"
        )
    return loaded


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other editors of the file out from its `load` to its `save`. Raises `TenantFileError`.

    By a file beside it, which stays. Whoever only reads need not wait, for `save` is atomic.
    """
    path = _behind_links(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise TenantFileError(f"cannot write tenants file {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def save(path: Path, content: TenantFile) -> None:
    """Replace the file atomically, or the one a symbolic link leads to. Raises `TenantFileError`.

    A new file is readable by its owner only; another one keeps its owner and mode, so that the
    gateway can still read what root wrote. Where that is not permitted, it is like a new one.

    Only what was set is written: a default would be the one of this version from then on, and a
    field that an older version lacks makes it refuse the file.
    """
    set_alone = content.model_dump(mode="json", exclude_unset=True)
    values = {"version": content.version, "tenants": [], **set_alone}
    path = _behind_links(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp makes the file with mode 0600.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                yaml.safe_dump(values, file, sort_keys=False)
                file.flush()
                _take_over_access(path, file.fileno())
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise TenantFileError(f"cannot write tenants file {path}: {error.strerror}") from error


def _behind_links(path: Path) -> Path:
    """The file itself. Were a link replaced, who reads the file by another name would go on with
    the old content, revoked keys included."""
    return Path(os.path.realpath(path))


def _take_over_access(path: Path, descriptor: int) -> None:
    """Give a new file the owner and mode of the one at `path`, if there is one and we may."""
    try:
        old = path.stat()
        os.fchown(descriptor, old.st_uid, old.st_gid)
        # Only now: the mode may let a group read, and it must be that group.
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    except OSError:  # not there, not permitted, or an owner that is none in this namespace
        pass


def with_new_key(tenant: Tenant) -> tuple[Tenant, str]:
    """The tenant with one more key, and that key, which is to be shown once."""
    made = new_key()
    stored = StoredKey(id=made.key_id, hash=made.hash, created=datetime.datetime.now(datetime.UTC))
    return tenant.model_copy(update={"keys": (*tenant.keys, stored)}), made.key
