"""The gateway's configuration: one YAML file, overridden by VASE_* variables and flags.

Every key, its default and its unit is here. An environment variable is `VASE_` and the key's path
in capitals, joined by two underscores: `VASE_LISTEN__PORT=50052`. Unknown keys in the file are
errors, and so are variables of known keys with other underscores. Relative paths are relative to
the working directory.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from vase_sgl.eviction.params import WIDEST, EvictionParams
from vase_sgl.gateway.problems import describe
from vase_sgl.gateway.variables import Environment, check_variables
from vase_sgl.worker_key import check_key

#: Of environment variables, and between the parts of a key's path in their names.
_PREFIX, _DELIMITER = "VASE_", "__"


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

    #: The certificate and those that lead to its authority.
    certificate: Path
    #: Its private key. None: it is in `certificate` as well.
    key: Path | None = None
    #: Given: clients need a certificate signed by this authority. Its subject may name the tenant;
    #: otherwise an API key has to.
    client_ca: Path | None = None


class Http(_Section):
    """The OpenAI-compatible HTTP door. Host, `tls`, message sizes and ceilings are gRPC's own."""

    #: TCP port; 0 takes a free one. None: the door stays shut.
    port: int | None = Field(default=None, ge=0, le=65535)
    #: Output tokens, at most, of a chat that does not say how many. A completion has OpenAI's 16.
    default_max_tokens: int = Field(default=1024, ge=1)


class Grpc(_Section):
    """Limits of the gRPC server."""

    #: Largest message taken from a client, in bytes.
    max_receive_bytes: int = Field(default=4 * 2**20, ge=1024)
    #: Largest message sent to a client, in bytes.
    max_send_bytes: int = Field(default=64 * 2**20, ge=1024)
    #: Calls at once, and as many health checks; more are refused with RESOURCE_EXHAUSTED.
    max_concurrent_calls: int = Field(default=1024, ge=1)
    #: Seconds between pings that find out whether a silent client is still there.
    keepalive_seconds: float = Field(default=30.0, ge=1)
    #: Seconds a ping may stay unanswered before the connection is dropped.
    keepalive_timeout_seconds: float = Field(default=10.0, ge=1)
    #: Seconds between a client's own pings, at least; one that pings more often is cut off.
    min_ping_interval_seconds: float = Field(default=10.0, ge=0)
    #: Seconds a client may leave output unread, or a request unsent, before it is given up.
    client_stall_seconds: float = Field(default=60.0, gt=0)
    #: Let tools such as grpcurl list services and messages.
    reflection: bool = True


class BreakerSection(_Section):
    """When a worker that keeps failing gets no more requests, and when it is tried again."""

    #: Failures that open the breaker ...
    failures: int = Field(default=5, ge=1)
    #: ... within so many seconds.
    window_seconds: float = Field(default=60.0, gt=0)
    #: Seconds it stays open before single requests are let through.
    open_seconds: float = Field(default=30.0, gt=0)
    #: Successes of those that close it.
    successes: int = Field(default=2, ge=1)


class WorkerSection(_Section):
    """The model: an embedded worker (`model_path`) or remote ones (`urls`, `dns`).

    All remote workers serve the same model with the same flags.
    """

    #: Folder or name of the model to serve in a child process.
    model_path: str | None = None
    #: Further flags of the embedded `vase-sgl worker`: SGLang's own.
    args: tuple[str, ...] = ()
    #: Base URLs of running workers. Not together with `model_path`.
    urls: tuple[str, ...] = ()
    #: Base URLs whose host name stands for one worker per address, such as a headless Service.
    dns: tuple[str, ...] = ()
    #: The key that the workers ask for. They and this gateway read it from the variable
    #: VASE_WORKER__API_KEY. None: remote workers are open; an embedded one gets a key of its own.
    api_key: SecretStr | None = None
    #: PEM file of the authorities whose certificates `https://` workers show. None: the system's.
    ca_file: Path | None = None
    #: Seconds between look-ups of the names in `dns`.
    dns_interval_seconds: float = Field(default=10.0, gt=0)
    #: Requests one worker is given at once. None: what it reports as its own maximum.
    max_in_flight: int | None = Field(default=None, ge=1)
    #: Other workers that are tried when one fails before its first token.
    retries: int = Field(default=2, ge=0)
    #: Prompts with the same first tokens go to the same worker while it has room; shorter prompts
    #: go anywhere. 0: off, as it should be while workers keep no prefix cache.
    affinity_tokens: int = Field(default=0, ge=0)
    #: Let tenants find each other's prompts in the workers' prefix cache. One that all send is then
    #: computed once, and by how soon an answer begins a tenant learns what others have sent.
    share_prefix_cache: bool = False
    breaker: BreakerSection = BreakerSection()
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

    @field_validator("args")
    @classmethod
    def _check_args(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        if any(arg == "--api-key" or arg.startswith("--api-key=") for arg in args):
            raise ValueError("--api-key would be seen by all users of the machine; set api_key")
        for arg in args:
            if arg.partition("=")[0] in ("--host", "--port"):
                raise ValueError(
                    f"{arg}: an embedded worker is on a free port of this machine, for the gateway "
                    "alone; for one that others reach start `vase-sgl worker` and name it in urls"
                )
        return args

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None:
            check_key(key.get_secret_value())
        return key

    @field_validator("urls", "dns")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
                raise ValueError(f"{url!r} is not a URL; one looks like http://worker-0:30000")
        if len(set(urls)) != len(urls):
            raise ValueError("a worker is named twice")
        return urls

    @field_validator("dns")
    @classmethod
    def _check_names(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if url.startswith("https://"):
                raise ValueError(
                    f"{url!r}: a certificate names no addresses; use http:// or list the workers "
                    "in worker.urls"
                )
            if urlsplit(url).port is None:
                raise ValueError(f"{url!r} has no port; one looks like http://workers:30000")
        return urls


class Queue(_Section):
    """The line in front of the workers. Tenants take turns in it."""

    #: Requests that may wait in all, from arrival on; as many as calls while nobody is in line.
    #: None: half of `grpc.max_concurrent_calls`.
    max_waiting: int | None = Field(default=None, ge=1)
    #: Requests of one tenant that may wait.
    max_waiting_per_tenant: int = Field(default=256, ge=1)
    #: Seconds one may wait.
    max_wait_seconds: float = Field(default=30.0, gt=0)


class UsageSection(_Section):
    """Where the usage of tenants is counted. The limits themselves are in the tenants file."""

    #: Redis, or anything that speaks its protocol, shared by all gateways. None: each gateway
    #: counts for itself.
    redis_url: str | None = None
    #: Prefix of the keys in Redis; gateways with the same one share their limits.
    redis_prefix: str = Field(default="vase", min_length=1)
    #: What happens to requests while Redis is away: `refuse` them as UNAVAILABLE, or `allow` them
    #: unchecked.
    on_redis_failure: Literal["refuse", "allow"] = "refuse"


class TelemetrySection(_Section):
    """Where spans and metrics go."""

    #: OTLP collector (gRPC), such as http://collector:4317; https:// is encrypted. None: to the
    #: providers that the environment of the process has set up, if it has any.
    otlp_endpoint: str | None = None
    #: Seconds between exports to it.
    export_interval_seconds: float = Field(default=10.0, gt=0)
    #: Port of the /metrics page for Prometheus, on the host of `listen`; 0: any. None: off.
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    #: Label the histograms of times and tokens by tenant, as the counters are. For up to some
    #: hundred tenants: of more, each scrape of /metrics takes the streams' time for seconds.
    tenant_histograms: bool = False
    #: The resource attribute `service.name`.
    service_name: str = Field(default="vase-sgl-gateway", min_length=1)

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not a URL; one looks like http://collector:4317")
        return url


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
    #: One encrypts what is recorded from now on; the others only decrypt. None: content is stored
    #: as it is.
    encryption_keys: tuple[AuditKey, ...] = ()
    #: Version of that one. Not set: the highest. With several gateways the old one, until all of
    #: them have the new one: the others could not read what it encrypted.
    active_key: int | None = None

    @field_validator("encryption_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[AuditKey, ...]) -> tuple[AuditKey, ...]:
        if len({key.version for key in keys}) != len(keys):
            raise ValueError("every key needs a version of its own")
        return keys

    @model_validator(mode="after")
    def _check_active(self) -> Audit:
        versions = [key.version for key in self.encryption_keys]
        if self.active_key is not None and self.active_key not in versions:
            raise ValueError(
                f"active_key: there is no version {self.active_key} in encryption_keys; add it, or "
                "leave active_key out for the highest"
            )
        return self


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
        env_prefix=_PREFIX, env_nested_delimiter=_DELIMITER, extra="forbid", frozen=True
    )

    listen: Listen = Listen()
    tls: Tls | None = None
    grpc: Grpc = Grpc()
    http: Http = Http()
    worker: WorkerSection = WorkerSection()
    queue: Queue = Queue()
    limits: UsageSection = UsageSection()
    telemetry: TelemetrySection = TelemetrySection()
    audit: Audit = Audit()
    replay: ReplaySection = ReplaySection()
    #: Who may call; written by `vase-sgl tenants add`.
    tenants_file: Path = Path(".vase-sgl/tenants.yaml")
    #: Turn authentication off: everyone is tenant `anonymous`. Never beyond your own machine.
    insecure_no_auth: bool = False
    #: Let tenants with the role `inspect` have files written on the workers' disks that hold the
    #: token ids of their requests and what was kept of them.
    allow_inspect: bool = False
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
            if "inspect" in value:
                raise ValueError("inspect cannot be set here: it is for single requests")
            # The worker's ceilings are not known yet; they are checked with each request.
            EvictionParams.parse(value, WIDEST)
        return value

    @model_validator(mode="after")
    def _check_worker(self) -> GatewayConfig:
        remote = self.worker.urls or self.worker.dns
        if self.worker.model_path is not None and remote:
            raise ValueError(
                "worker.model_path and worker.urls or worker.dns exclude each other; set one"
            )
        if self.worker.model_path is None and not remote:
            raise ValueError(
                "no worker: set worker.model_path (or --model-path) to serve a model here, or "
                "worker.urls or worker.dns to use running workers"
            )
        encrypted = any(url.startswith("https://") for url in self.worker.urls)
        if self.worker.ca_file is not None and not encrypted:
            raise ValueError(
                "worker.ca_file: no worker's URL begins with https://, so all would be reached in "
                "clear text; change worker.urls, or leave worker.ca_file out"
            )
        return self

    @property
    def max_waiting(self) -> int:
        """Requests that may wait. By default half of the calls are left to all that does not."""
        return self.queue.max_waiting or max(self.grpc.max_concurrent_calls // 2, 1)


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
            file_settings = InitSettingsSource(settings_cls, content)
            return init_settings, Environment(settings_cls), file_settings

    try:
        check_variables(GatewayConfig, _PREFIX, _DELIMITER)
        return Loaded(**(overrides or {}))
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise ConfigError(where + describe(error, GatewayConfig)) from error
    except ValueError as error:  # an environment variable
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
