"""The gateway's configuration: one YAML file, overridden by VASE_* variables and flags.

Every key, its default and its unit is here. An environment variable is `VASE_` and the key's path
in capitals, joined by two underscores: `VASE_LISTEN__PORT=50052`. Unknown keys in the file are
errors. Relative paths are relative to the working directory.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from vase_sgl.eviction import EvictionLimits, EvictionParams
from vase_sgl.gateway.problems import describe


class ConfigError(Exception):
    """The configuration cannot be used. The text names the key and the cure."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Section):
    """Where clients connect."""

    #: Address to listen on. Beyond loopback, set `tls`.
    host: str = "127.0.0.1"
    #: TCP port; 0 takes a free one.
    port: int = Field(default=50051, ge=0, le=65535)


class Tls(_Section):
    """Encryption towards clients; PEM files."""

    certificate: Path
    key: Path
    #: Given: clients need a certificate signed by this authority, besides their API key.
    client_ca: Path | None = None


class Grpc(_Section):
    """Limits of the gRPC server."""

    #: Largest message taken from a client, in bytes.
    max_receive_bytes: int = Field(default=16 * 2**20, ge=1024)
    #: Largest message sent to a client, in bytes.
    max_send_bytes: int = Field(default=64 * 2**20, ge=1024)
    #: Calls at once; more are refused with RESOURCE_EXHAUSTED.
    max_concurrent_calls: int = Field(default=1024, ge=1)
    #: Seconds between pings that find out whether a silent client is still there.
    keepalive_seconds: float = Field(default=30.0, ge=1)
    #: Seconds a ping may stay unanswered before the connection is dropped.
    keepalive_timeout_seconds: float = Field(default=10.0, ge=1)
    #: Let tools such as grpcurl list services and messages.
    reflection: bool = True


class WorkerSection(_Section):
    """The model: an embedded worker (`model_path`) or remote ones (`urls`)."""

    #: Folder or name of the model to serve in a child process.
    model_path: str | None = None
    #: Further flags of the embedded `vase-sgl worker`: SGLang's own.
    args: tuple[str, ...] = ()
    #: Base URLs of running workers, used in turn. Not together with `model_path`.
    urls: tuple[str, ...] = ()
    #: Where the embedded worker's output goes.
    log_file: Path = Path(".vase-sgl/worker.log")
    #: Seconds the embedded worker may take to load the model.
    start_timeout_seconds: float = Field(default=900.0, gt=0)
    #: Seconds between SIGTERM and SIGKILL for the embedded worker.
    stop_grace_seconds: float = Field(default=10.0, ge=0)
    #: Seconds a worker may send nothing, queueing included, before a generation is given up.
    stall_seconds: float = Field(default=600.0, gt=0)
    #: Seconds between health checks of a worker.
    health_interval_seconds: float = Field(default=5.0, gt=0)

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not a URL; one looks like http://worker-0:30000")
        if len(set(urls)) != len(urls):
            raise ValueError("a worker is named twice")
        return urls


class AuditKey(_Section):
    """A key that encrypts recorded content: base64 of 32 bytes, in a file or a variable."""

    version: int = Field(ge=1)
    file: Path | None = None
    #: Name of an environment variable.
    env: str | None = None

    @model_validator(mode="after")
    def _check(self) -> AuditKey:
        if (self.file is None) == (self.env is None):
            raise ValueError("say where the key is: file or env, one of them")
        return self

    def read(self) -> bytes:
        """The key itself. Raises `ConfigError`."""
        where = f"audit.encryption_keys: key version {self.version}"
        try:
            text = self.file.read_text("ascii") if self.file else os.environ[str(self.env)]
            key = base64.b64decode(text.strip(), validate=True)
        except OSError as error:
            raise ConfigError(f"{where}: cannot read {self.file}: {error.strerror}") from error
        except KeyError as error:
            raise ConfigError(f"{where}: the variable {self.env} is not set") from error
        except ValueError as error:
            raise ConfigError(f"{where} is not base64") from error
        if len(key) != 32:
            raise ConfigError(
                f"{where} has {len(key)} bytes instead of 32; `openssl rand -base64 32` makes one"
            )
        return key


class Audit(_Section):
    """Where generations are recorded."""

    #: SQLAlchemy URL: sqlite+aiosqlite or postgresql+asyncpg. The default needs no server.
    url: str = "sqlite+aiosqlite:///.vase-sgl/audit.sqlite3"
    #: Bring the tables up to date at start. Not set: if it is SQLite, whose file is this gateway's
    #: own. A shared PostgreSQL waits for `vase-sgl audit migrate`: the gateway's role need not
    #: have the right, and an old gateway beside this one could no longer write.
    migrate_on_start: bool | None = None
    #: The highest version encrypts what is recorded from now on; the others only decrypt. None:
    #: content is stored as it is.
    encryption_keys: tuple[AuditKey, ...] = ()

    @field_validator("encryption_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[AuditKey, ...]) -> tuple[AuditKey, ...]:
        if len({key.version for key in keys}) != len(keys):
            raise ValueError("every key needs a version of its own")
        return keys


class ReplaySection(_Section):
    """How replays share the workers with generations. They count against no tenant's limits."""

    #: Replays that run at once; others wait.
    max_concurrent: int = Field(default=2, ge=1)
    #: Share of a worker's KV slots that a replay leaves free for generations, unless it is alone.
    spare_share: float = Field(default=0.25, ge=0, le=1)
    #: Seconds a replay may wait for its turn.
    max_wait_seconds: float = Field(default=300.0, gt=0)


class GatewayConfig(BaseSettings):
    """All of it. Made by `load_config`."""

    model_config = SettingsConfigDict(
        env_prefix="VASE_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    listen: Listen = Listen()
    tls: Tls | None = None
    grpc: Grpc = Grpc()
    worker: WorkerSection = WorkerSection()
    audit: Audit = Audit()
    replay: ReplaySection = ReplaySection()
    #: Who may call; written by `vase-sgl tenants add`.
    tenants_file: Path = Path(".vase-sgl/tenants.yaml")
    #: Turn authentication off: everyone is tenant `anonymous`. Never beyond your own machine.
    insecure_no_auth: bool = False
    #: Seconds running calls get to finish after SIGTERM.
    drain_seconds: float = Field(default=30.0, ge=0)
    #: Eviction of requests that bring none, e.g. {budget: 1024, window: 64}. A request's own
    #: eviction replaces all of it. None: full cache.
    default_eviction: dict[str, Any] | None = None

    @field_validator("default_eviction")
    @classmethod
    def _check_eviction(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            if "seed" in value:
                raise ValueError("seed cannot be set here: seeds are derived per request")
            # The worker's ceilings are not known yet; they are checked with each request.
            EvictionParams.parse(value, EvictionLimits(max_budget=2**20, max_window=4096))
        return value

    @model_validator(mode="after")
    def _check_worker(self) -> GatewayConfig:
        if self.worker.model_path is not None and self.worker.urls:
            raise ValueError("worker.model_path and worker.urls exclude each other; set one")
        if self.worker.model_path is None and not self.worker.urls:
            raise ValueError(
                "no worker: set worker.model_path (or --model-path) to serve a model here, or "
                "worker.urls to use running workers"
            )
        return self


def load_config(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> GatewayConfig:
    """The configuration: `overrides`, else the environment, else the file, else the defaults.

    Raises `ConfigError`.
    """
    content = _read(path) if path is not None else {}

    class Loaded(GatewayConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, content)

    try:
        return Loaded(**(overrides or {}))
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise ConfigError(where + describe(error, GatewayConfig)) from error
    except ValueError as error:  # an environment variable that is not JSON where JSON is due
        raise ConfigError(str(error)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, found a {type(content).__name__}")
    return content
