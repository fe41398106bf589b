"""Who calls: API keys by tenant. Keys are neither logged nor sent between Locust's processes."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loadtest.problems import BadSetup, read_text, read_yaml

KEY_VARIABLE = "VASE_API_KEY"


class Tenant(BaseModel):
    """One caller. Its API key is in a file or a variable of the environment, or it has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Name in the report.
    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}$")
    #: Variable of the environment that holds the key.
    key_env: str | None = None
    #: File that holds the key and nothing else, such as a mounted Secret.
    key_file: Path | None = None
    #: Its share of the users, relative to the other tenants'.
    weight: int = Field(default=1, ge=1)
    #: noisy-neighbour: calls again at once when it is refused.
    noisy: bool = False

    @model_validator(mode="after")
    def _check(self) -> Tenant:
        if self.key_env is not None and self.key_file is not None:
            raise ValueError("give key_env or key_file, not both")
        return self

    def api_key(self) -> str | None:
        """The key, None for a tenant without one. Raises `BadSetup` if it is not there."""
        if self.key_file is not None:
            key = read_text(self.key_file, f"the key of tenant {self.name},").strip()
            if not key:
                raise BadSetup(f"the key of tenant {self.name}, {self.key_file}, is empty")
            return key
        if self.key_env is None:
            return None
        if not (key := os.environ.get(self.key_env, "").strip()):
            raise BadSetup(f"the key of tenant {self.name}: set the variable {self.key_env}")
        return key


class _TenantFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tenants: tuple[Tenant, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> _TenantFile:
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) != len(names):
            raise ValueError("every tenant needs a name of its own")
        return self


def load(path: Path | None) -> tuple[Tenant, ...]:
    """The tenants of a file; without one, a single tenant whose key is in `VASE_API_KEY`.

    Raises `BadSetup`. A missing `VASE_API_KEY` means calls without a key.
    """
    if path is not None:
        return read_yaml(path, "tenants file", _TenantFile).tenants
    return (Tenant(name="default", key_env=KEY_VARIABLE if KEY_VARIABLE in os.environ else None),)
