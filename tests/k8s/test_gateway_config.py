"""The gateway's own code reads what the chart writes for it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.k8s.chart import POSTGRESQL, PROFILES, Rendered, Values, render
from vase_sgl.cli import build_app
from vase_sgl.cli.serve import serve
from vase_sgl.gateway.config import ConfigError, GatewayConfig, load_config
from vase_sgl.gateway.health import GatewayHealth

MUTUAL_TLS: Values = {
    "gateway.tls.enabled": True,
    "gateway.tls.existingSecret": "tls",
    "gateway.tls.clientAuth.caSecret": "ca",
    "gateway.tls.clientAuth.probeSecret": "probe",
}

LIST: Values = {"gateway.workerDiscovery": "list"}

#: What the Secrets hold, by the variable that carries it.
URLS = {
    "VASE_AUDIT__URL": "postgresql+asyncpg://u:p@db/vase",
    "VASE_LIMITS__REDIS_URL": "redis://redis:6379/0",
}


def load(rendered: Rendered, folder: Path, monkeypatch: pytest.MonkeyPatch) -> GatewayConfig:
    """The configuration as the pod's gateway gets it: file and variables."""
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(rendered.gateway_config()), encoding="utf-8")
    for variable in rendered.gateway()["env"]:
        if variable["name"].startswith("VASE_"):
            monkeypatch.setenv(variable["name"], variable.get("value") or URLS[variable["name"]])
    return load_config(path)


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_loads(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(profile=profile)
    config = load(rendered, tmp_path, monkeypatch)
    container = rendered.gateway()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.listen.host == "0.0.0.0" and config.listen.port == ports["grpc"]
    assert config.worker.model_path is None
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(config.tenants_file.parent) in mounts
    assert container["args"][:2] == ["serve", "--config=/etc/vase-sgl/config/gateway.yaml"]


def test_list_names_every_worker_once() -> None:
    rendered = render({**LIST, "worker.replicas": 2, "canary.enabled": True})
    assert rendered.gateway_config()["worker"]["urls"] == [
        "http://r-vase-sgl-worker-0.r-vase-sgl-worker.ns.svc:30000",
        "http://r-vase-sgl-worker-1.r-vase-sgl-worker.ns.svc:30000",
        "http://r-vase-sgl-worker-canary-0.r-vase-sgl-worker-canary.ns.svc:30000",
    ]


def test_list_has_room_for_scaled_workers() -> None:
    scaled = render(
        {**LIST, "worker.autoscaling.mode": "keda", "worker.autoscaling.maxReplicas": 5}
    )
    assert len(scaled.gateway_config()["worker"]["urls"]) == 5


def test_dns_names_the_headless_services() -> None:
    rendered = render({"canary.enabled": True})
    worker = rendered.gateway_config()["worker"]
    assert worker == {
        "dns": [
            "http://r-vase-sgl-worker.ns.svc:30000",
            "http://r-vase-sgl-worker-canary.ns.svc:30000",
        ]
    }
    services = rendered.names("Service")
    assert {"-worker", "-worker-canary"} <= services


@pytest.mark.parametrize("discovery", ["list", "dns"])
def test_canary_out_of_rotation_gets_no_traffic(discovery: str) -> None:
    rendered = render(
        {
            "gateway.workerDiscovery": discovery,
            "canary.enabled": True,
            "canary.inRotation": False,
        }
    )
    assert "canary" not in str(rendered.gateway_config())
    assert "-worker-canary" in rendered.names("StatefulSet")


def test_eviction_drain_and_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        **MUTUAL_TLS,
        "gateway.defaultEviction": {"budget": 512, "window": 32},
        "gateway.drainSeconds": 90,
    }
    config = load(render(values), tmp_path, monkeypatch)
    assert config.default_eviction == {"budget": 512, "window": 32}
    assert config.drain_seconds == 90
    assert config.tls is not None
    mounts = {mount["mountPath"] for mount in render(values).gateway()["volumeMounts"]}
    for path in (config.tls.certificate, config.tls.key, config.tls.client_ca):
        assert path is not None and str(path.parent) in mounts


def test_sqlite_is_on_the_state_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render()
    config = load(rendered, tmp_path, monkeypatch)
    assert config.audit.url == "sqlite+aiosqlite:////var/lib/vase-sgl/audit.sqlite3"
    assert {"name": "state", "mountPath": "/var/lib/vase-sgl"} in rendered.gateway()["volumeMounts"]


@pytest.mark.parametrize(
    "own", [{}, {"audit": {"url": "sqlite+aiosqlite:////elsewhere/a.sqlite3"}}]
)
def test_in_the_container_the_command_line_finds_the_gateways_store(
    own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kubectl exec deployment/… -- vase-sgl audit verify`."""
    config = load(render({"gateway.config": own}), tmp_path, monkeypatch)
    file = config.audit.url.removeprefix("sqlite+aiosqlite:///")
    assert file == ("/elsewhere/a.sqlite3" if own else "/var/lib/vase-sgl/audit.sqlite3")
    result = CliRunner().invoke(build_app(), ["audit", "verify"])
    assert f"there is no audit store {file}" in result.stderr


def test_postgresql_comes_from_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(POSTGRESQL)
    assert "audit" not in rendered.gateway_config()
    config = load(rendered, tmp_path, monkeypatch)
    assert config.audit.url.startswith("postgresql+asyncpg://")


def test_encryption_keys_are_files_of_a_secret() -> None:
    rendered = render(
        {"gateway.audit.encryption.secret": "keys", "gateway.audit.encryption.versions": [1, 2]}
    )
    assert rendered.gateway_config()["audit"]["encryption_keys"] == [
        {"version": 1, "file": "/etc/vase-sgl/audit-keys/1"},
        {"version": 2, "file": "/etc/vase-sgl/audit-keys/2"},
    ]
    (volume,) = (v for v in rendered.gateway_pod()["volumes"] if v["name"] == "audit-keys")
    assert volume["secret"] == {"secretName": "keys", "defaultMode": 0o440}
    assert "encryption_keys" not in render().gateway_config()["audit"]


def test_own_configuration_is_laid_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"gateway.config": {"grpc": {"reflection": False}, "worker": {"stall_seconds": 60}}}
    config = load(render(values), tmp_path, monkeypatch)
    assert config.grpc.reflection is False and config.worker.stall_seconds == 60
    assert len((*config.worker.urls, *getattr(config.worker, "dns", ()))) == 1


def test_own_configuration_with_an_unknown_key_is_refused_by_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="bogus"):
        load(render({"gateway.config": {"bogus": 1}}), tmp_path, monkeypatch)


def test_pod_restarts_when_the_configuration_changes() -> None:
    def checksum(values: Values) -> str:
        template = render(values).one("Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum({}) == checksum({"gateway.resources.limits.cpu": "4"})
    assert checksum({}) != checksum({"gateway.drainSeconds": 61})
    # Looked up by name, workers come and go without a restart; a list has to be read again.
    assert checksum({}) == checksum({"worker.replicas": 2})
    assert checksum(LIST) != checksum({**LIST, "worker.replicas": 2})


def test_variables_are_keys_of_the_configuration() -> None:
    rendered = render({**POSTGRESQL, "gateway.redis.urlSecret.name": "redis"})
    given = {v["name"] for v in rendered.gateway()["env"] if v["name"].startswith("VASE_")}
    assert len(given) == 2
    assert {name for name in given if not _is_key(name)} == set()


def test_probes_ask_for_services_the_gateway_has() -> None:
    container = render().gateway()
    asked = {container[f"{p}Probe"]["grpc"]["service"] for p in ("readiness", "liveness")}
    assert asked - set(GatewayHealth("service")._server_status) == set()


def test_options_are_those_of_the_command() -> None:
    given = {argument.partition("=")[0] for argument in render().gateway()["args"][1:]}
    known = set(inspect.signature(serve).parameters)
    names = {option: option.removeprefix("--").replace("-", "_") for option in given}
    assert {option for option, name in names.items() if name not in known} == set()


def test_migration_is_a_command() -> None:
    (job,) = render(POSTGRESQL).of("Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    group, command = container["args"]
    (commands,) = (g.typer_instance for g in build_app().registered_groups if g.name == group)
    assert commands is not None
    names = [c.name or getattr(c.callback, "__name__", "") for c in commands.registered_commands]
    known = {(group, name) for name in names}
    assert (group, command) in known


def _is_key(variable: str) -> bool:
    """Whether an environment variable sets a key of the configuration."""
    section, _, key = variable.removeprefix("VASE_").lower().partition("__")
    field = GatewayConfig.model_fields.get(section)
    return field is not None and key in getattr(field.annotation, "model_fields", {})
