"""Every profile renders, lints, and fits the schemas of the Kubernetes versions it claims."""

from __future__ import annotations

import copy

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.chart import CHART, PROFILES, Values, options, render, run_helm
from tests.k8s.manifests import CUSTOM_KINDS, NEWEST, OLDEST, check

#: Every switch that adds a manifest or another form of one, at least once.
VARIANTS: dict[str, Values] = {
    "multi-node": {
        "worker.multiNode.enabled": True,
        "worker.tensorParallelSize": 16,
        "canary.enabled": True,
    },
    "hpa": {"worker.autoscaling.mode": "hpa"},
    "keda-authenticated": {
        "worker.autoscaling.mode": "keda",
        "worker.autoscaling.keda.authenticationRef": "prometheus",
        "worker.autoscaling.keda.authModes": "bearer",
    },
    "mutual-tls": {
        "gateway.tls.enabled": True,
        "gateway.tls.existingSecret": "tls",
        "gateway.tls.clientAuth.caSecret": "ca",
        "gateway.tls.clientAuth.probeSecret": "probe",
    },
    "host-path": {
        "model.cache.type": "hostPath",
        "model.download": False,
        "model.path": "/models/qwen",
    },
    "image-volume": {
        "model.cache.type": "image",
        "model.cache.image.reference": "registry.example.com/models/qwen3-8b:1",
        "model.download": False,
        "model.path": "/models",
    },
    "everything-watched": {
        "monitoring.podMonitor.enabled": True,
        "monitoring.serviceMonitor.enabled": True,
        "monitoring.rules.enabled": True,
        "monitoring.dashboard.enabled": True,
    },
    "worker-tls": {
        "worker.tls.existingSecret": "worker-tls",
        "gateway.workerDiscovery": "list",
        "monitoring.podMonitor.enabled": True,
    },
    "closed": {"networkPolicy.clients": [], "helmTest.enabled": False},
    "pull-secret-and-labels": {
        "imagePullSecrets": ["pull"],
        "commonLabels": {"team": "serving"},
        "worker.podAnnotations": {"a": "b"},
        "worker.runtimeClassName": "nvidia",
        "worker.priorityClassName": "high",
        "worker.env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "worker.volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
        "worker.volumeMounts": [{"name": "ca", "mountPath": "/etc/ca"}],
        "worker.affinity": {"nodeAffinity": {}},
        "gateway.podAnnotations": {"a": "b"},
        "gateway.env": [{"name": "OTEL_SERVICE_NAME", "value": "vase"}],
        "model.tokenSecret.name": "hub",
        "worker.apiKeySecret.name": "worker-key",
    },
}


@pytest.mark.parametrize("profile", PROFILES)
def test_lint(profile: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), *options(profile=profile))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", [NEWEST, OLDEST])
@pytest.mark.parametrize("profile", PROFILES)
def test_profile_fits_kubernetes(profile: str, version: str) -> None:
    manifests = render(profile=profile).manifests
    assert len(manifests) > 10
    for manifest in manifests:
        check(manifest, version)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_fits_kubernetes(variant: str) -> None:
    for manifest in render(VARIANTS[variant]).manifests:
        check(manifest)


@pytest.mark.parametrize("profile", PROFILES)
def test_pods_run_on_nodes_without_zones(profile: str) -> None:
    """As those of most clusters of one's own: a node without the label fits no such constraint."""
    for name, pod in render(profile=profile).pods():
        for spread in pod.get("topologySpreadConstraints", []):
            needed = spread["whenUnsatisfiable"] == "DoNotSchedule"
            assert not needed or spread["topologyKey"] == "kubernetes.io/hostname", name


def test_every_custom_kind_is_checked() -> None:
    seen = {
        manifest["kind"]
        for rendered in (render(profile="multi-tenant"), *map(render, VARIANTS.values()))
        for manifest in rendered.manifests
    }
    assert seen >= CUSTOM_KINDS


def test_the_check_finds_mistakes() -> None:
    rendered = render(profile="multi-tenant")
    deployment = copy.deepcopy(rendered.one("Deployment"))
    deployment["spec"]["replicaz"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replicaz"):
        check(deployment)
    certificate = copy.deepcopy(rendered.one("Certificate"))
    certificate["spec"]["dnsName"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="dnsName"):
        check(certificate)


@pytest.mark.parametrize("profile", PROFILES)
def test_names_are_unique_and_labelled(profile: str) -> None:
    manifests = render(profile=profile).manifests
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    for manifest in manifests:
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "r"
        assert labels["app.kubernetes.io/component"]


def test_long_release_names_are_cut() -> None:
    done = run_helm("template", "r" * 53, str(CHART), *options({"canary.enabled": True}))
    assert done.returncode == 0
    for manifest in yaml.safe_load_all(done.stdout):
        # A pod's name becomes a label with a hash appended.
        assert len(manifest["metadata"]["name"]) <= 57


def test_chart_refuses_old_kubernetes() -> None:
    done = run_helm("template", "r", str(CHART), "--kube-version=1.26.0")
    assert done.returncode != 0
    assert "1.27" in done.stderr
