"""The gateway's Deployment, Service, probes, TLS and scaling: what each value changes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.chart import POSTGRESQL, Values, render
from tests.k8s.test_gateway_config import MUTUAL_TLS

CERT_MANAGER: Values = {
    "gateway.tls.enabled": True,
    "gateway.tls.certManager.enabled": True,
    "gateway.tls.certManager.issuerRef.name": "ca",
}


def probes(values: Values) -> dict[str, dict[str, Any]]:
    container = render(values).gateway()
    return {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}


def test_probes_are_native_grpc() -> None:
    found = probes({"gateway.service.port": 50052})
    assert found["readiness"]["grpc"] == {"port": 50052, "service": "readiness"}
    assert found["liveness"]["grpc"] == {"port": 50052, "service": "liveness"}
    assert found["startup"]["grpc"] == found["liveness"]["grpc"]


def test_behind_tls_the_image_asks() -> None:
    """The kubelet's gRPC probe cannot do TLS."""
    found = probes(CERT_MANAGER)
    for probe in found.values():
        assert "grpc" not in probe
        command = probe["exec"]["command"]
        assert command[:2] == ["vase-grpc-health", "--target=127.0.0.1:50051"]
        assert "--trust-any" in command
        assert "--server-name=r-vase-sgl-gateway.ns.svc" in command
        assert not any(option.startswith("--certificate") for option in command)
    assert "--service=readiness" in found["readiness"]["exec"]["command"]
    assert "--service=liveness" in found["liveness"]["exec"]["command"]


def test_with_client_certificates_probes_show_one() -> None:
    command = probes(MUTUAL_TLS)["readiness"]["exec"]["command"]
    assert "--certificate=/etc/vase-sgl/probe/tls.crt" in command
    assert "--key=/etc/vase-sgl/probe/tls.key" in command
    # Files of a Secret are renewed under a gateway that has read them; no probe may look at those.
    assert not [word for word in command if "/etc/vase-sgl/tls" in word]
    volumes = {v["name"]: v for v in render(MUTUAL_TLS).gateway_pod()["volumes"]}
    assert volumes["probe"]["secret"]["secretName"] == "probe"
    assert volumes["client-ca"]["secret"]["secretName"] == "ca"


def test_probes_end_within_their_time() -> None:
    command = probes(CERT_MANAGER)["liveness"]
    (timeout,) = (o for o in command["exec"]["command"] if o.startswith("--timeout="))
    assert float(timeout.partition("=")[2]) < command["timeoutSeconds"]


def test_draining_fits_into_the_grace_period() -> None:
    rendered = render({"gateway.drainSeconds": 120, "gateway.preStopSeconds": 9})
    assert rendered.gateway()["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "9"]
    assert rendered.gateway_pod()["terminationGracePeriodSeconds"] > 129
    assert rendered.gateway_config()["drain_seconds"] == 120


def test_a_hung_gateway_is_killed_without_a_drain() -> None:
    values: Values = {"gateway.preStopSeconds": 40, "gateway.drainSeconds": 900}
    found = probes(values)
    for name in ("startup", "liveness"):
        # Time for the preStop hook, and no more than a little beyond it.
        assert 40 < found[name]["terminationGracePeriodSeconds"] <= 70
    assert "terminationGracePeriodSeconds" not in found["readiness"]
    assert render(values).gateway_pod()["terminationGracePeriodSeconds"] >= 940


def test_gateways_that_are_scaled_let_answers_run_as_long_as_workers_do() -> None:
    rendered = render(profile="multi-tenant")
    drain = rendered.gateway_config()["drain_seconds"]
    # What a worker has beside: its hook, and half a minute to end.
    assert drain + 60 > rendered.worker_pod()["terminationGracePeriodSeconds"]
    assert rendered.gateway_pod()["terminationGracePeriodSeconds"] > drain


def test_one_sqlite_file_has_one_writer() -> None:
    assert render().one("Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    strategy = render(POSTGRESQL).one("Deployment")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_rollout_may_take_as_long_as_a_worker_loads() -> None:
    """A gateway is ready when a worker is; after ten minutes Kubernetes calls a rollout failed."""
    deployment = render({"worker.startup.timeoutSeconds": 3000}).one("Deployment")
    assert deployment["spec"]["progressDeadlineSeconds"] > 3000


def test_records_outlive_the_release() -> None:
    claim = render().one("PersistentVolumeClaim", "-audit")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


@pytest.mark.parametrize(
    ("values", "volume"),
    [
        ({}, {"persistentVolumeClaim": {"claimName": "r-vase-sgl-audit"}}),
        (
            {"gateway.audit.sqlite.existingClaim": "records"},
            {"persistentVolumeClaim": {"claimName": "records"}},
        ),
        ({"gateway.audit.sqlite.persistent": False}, {"emptyDir": {"sizeLimit": "1Gi"}}),
        (POSTGRESQL, {"emptyDir": {"sizeLimit": "1Gi"}}),
    ],
    ids=["made claim", "existing claim", "not kept", "postgresql"],
)
def test_audit_volume(values: Values, volume: dict[str, Any]) -> None:
    rendered = render(values)
    (state,) = (v for v in rendered.gateway_pod()["volumes"] if v["name"] == "state")
    assert state == {"name": "state", **volume}
    made = volume.get("persistentVolumeClaim") == {"claimName": "r-vase-sgl-audit"}
    assert ("-audit" in rendered.names("PersistentVolumeClaim")) == made


def test_secrets_are_variables() -> None:
    rendered = render({**POSTGRESQL, "gateway.redis.urlSecret.name": "redis"})
    variables = {v["name"]: v for v in rendered.gateway()["env"]}
    assert variables["VASE_AUDIT__URL"]["valueFrom"]["secretKeyRef"] == {
        "name": "vase-sgl-audit",
        "key": "url",
    }
    assert variables["VASE_LIMITS__REDIS_URL"]["valueFrom"]["secretKeyRef"] == {
        "name": "redis",
        "key": "url",
    }
    plain = [e for e in render().gateway()["env"] if e["name"].startswith("VASE_")]
    assert [(e["name"], "value" in e) for e in plain] == [("VASE_AUDIT__URL", True)]


def test_tables_are_brought_up_to_date_before_the_gateways() -> None:
    job = render(POSTGRESQL).one("Job", "-migrate")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["args"] == ["audit", "migrate"]
    assert container["image"] == render(POSTGRESQL).gateway()["image"]
    assert spec["serviceAccountName"] == "default"  # a hook runs before the release's own exist

    def secret(values: Values) -> dict[str, str]:
        (job,) = render({**POSTGRESQL, **values}).of("Job")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        (url,) = (v for v in container["env"] if v["name"] == "VASE_AUDIT__URL")
        found: dict[str, str] = url["valueFrom"]["secretKeyRef"]
        return found

    assert secret({}) == {"name": "vase-sgl-audit", "key": "url"}
    owner = {"gateway.audit.postgresql.migrate.urlSecret.name": "owner"}
    assert secret(owner) == {"name": "owner", "key": "url"}


def test_the_migration_runs_where_gateways_run_and_with_their_variables() -> None:
    values: Values = {
        **POSTGRESQL,
        "gateway.nodeSelector": {"pool": "cpu"},
        "gateway.tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "gateway.env": [{"name": "PGPASSWORD", "value": "x"}],
    }
    rendered = render(values)
    migration = rendered.one("Job", "-migrate")["spec"]["template"]["spec"]
    for spec in (migration, rendered.one("Pod", "-test")["spec"]):
        for key in ("nodeSelector", "tolerations"):
            assert spec[key] == rendered.gateway_pod()[key]
    assert {"name": "PGPASSWORD", "value": "x"} in migration["containers"][0]["env"]


def test_the_way_to_the_database_is_open_before_the_migration() -> None:
    """On an upgrade the Job meets the policies of the release before."""
    rendered = render(POSTGRESQL)
    policy = rendered.one("NetworkPolicy", "-migrate")["metadata"]["annotations"]
    job = rendered.one("Job", "-migrate")["metadata"]["annotations"]
    assert policy["helm.sh/hook"] == job["helm.sh/hook"]
    assert int(policy["helm.sh/hook-weight"]) < int(job.get("helm.sh/hook-weight", 0))


def test_no_migration_where_none_is_wanted() -> None:
    off = {"gateway.audit.postgresql.migrate.enabled": False}
    for rendered in (render(), render({**POSTGRESQL, **off})):
        assert not rendered.of("Job")
        assert "-migrate" not in rendered.names("NetworkPolicy")


def test_tenants_are_a_whole_volume() -> None:
    """With a subPath a changed Secret would not show, and a revoked key would stay valid."""
    rendered = render({"gateway.tenants.existingSecret": "who", "gateway.tenants.key": "t.yaml"})
    (mount,) = (m for m in rendered.gateway()["volumeMounts"] if m["name"] == "tenants")
    assert "subPath" not in mount and mount["readOnly"] is True
    (volume,) = (v for v in rendered.gateway_pod()["volumes"] if v["name"] == "tenants")
    assert volume["secret"] == {"secretName": "who", "defaultMode": 0o440}
    assert rendered.gateway_config()["tenants_file"] == "/etc/vase-sgl/tenants/t.yaml"


def test_service_leads_to_the_pods() -> None:
    rendered = render(
        {
            "gateway.http.enabled": True,
            "gateway.service.type": "LoadBalancer",
            "gateway.service.annotations": {"lb": "internal"},
        }
    )
    service = rendered.one("Service", "-gateway")
    labels = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["metadata"]["annotations"] == {"lb": "internal"}
    names = {port["name"] for port in rendered.gateway()["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {"grpc", "http"} <= names
    # Metrics are not for whoever may call.
    assert {
        p["targetPort"] for p in rendered.one("Service", "-gateway-metrics")["spec"]["ports"]
    } == {"metrics"}


@pytest.mark.parametrize("tls", [False, True])
def test_service_says_what_its_ports_speak(tls: bool) -> None:
    values = {"gateway.http.enabled": True, "gateway.tls.enabled": tls}
    rendered = render({**values, "gateway.tls.existingSecret": "tls"})
    ports = rendered.one("Service", "-gateway")["spec"]["ports"]
    spoken = {port["name"]: port["appProtocol"] for port in ports}
    assert spoken == (
        {"grpc": "https", "http": "https"} if tls else {"grpc": "grpc", "http": "http"}
    )


@pytest.mark.parametrize("door", ["http", "metrics"])
def test_doors_can_be_closed(door: str) -> None:
    def ports(enabled: bool) -> set[str]:
        rendered = render({f"gateway.{door}.enabled": enabled})
        section = {"http": "http", "metrics": "telemetry"}[door]
        assert (section in rendered.gateway_config()) == enabled
        return {port["name"] for port in rendered.gateway()["ports"]}

    assert ports(True) - ports(False) == {door}


def test_certificate_covers_the_service_and_the_probe() -> None:
    rendered = render({**CERT_MANAGER, "gateway.tls.certManager.dnsNames": ["api.example.com"]})
    spec = rendered.one("Certificate")["spec"]
    assert {
        "r-vase-sgl-gateway.ns.svc",
        "r-vase-sgl-gateway",
        "api.example.com",
    } <= set(spec["dnsNames"])
    (volume,) = (v for v in rendered.gateway_pod()["volumes"] if v["name"] == "tls")
    assert volume["secret"]["secretName"] == spec["secretName"] == "r-vase-sgl-gateway-tls"
    named = render({**CERT_MANAGER, "gateway.tls.serverName": "api.example.com"})
    assert "api.example.com" in named.one("Certificate")["spec"]["dnsNames"]
    existing = render({"gateway.tls.enabled": True, "gateway.tls.existingSecret": "tls"})
    assert not existing.of("Certificate") and not render().of("Certificate")


def test_autoscaling() -> None:
    values = {**POSTGRESQL, "gateway.autoscaling.enabled": True}
    rendered = render(values)
    scaler = rendered.one("HorizontalPodAutoscaler", "-gateway")["spec"]
    assert scaler["scaleTargetRef"]["name"] == rendered.one("Deployment")["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)
    assert "replicas" not in rendered.one("Deployment")["spec"]
    assert not render(POSTGRESQL).of("HorizontalPodAutoscaler")


def test_disruption_budget_needs_two_gateways() -> None:
    """With one gateway it would only block the drain of its node."""
    budget = "PodDisruptionBudget"
    assert "-gateway" not in render().names(budget)
    assert "-gateway" in render({**POSTGRESQL, "gateway.replicas": 2}).names(budget)
    off = {**POSTGRESQL, "gateway.replicas": 2, "gateway.podDisruptionBudget.enabled": False}
    assert "-gateway" not in render(off).names(budget)
