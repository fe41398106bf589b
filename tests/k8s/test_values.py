"""Values: unknown keys and wrong types are errors, mixes that cannot work are refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.k8s.chart import CHART, RenderError, Values, render, tool
from vase_sgl.eviction import EvictionParams
from vase_sgl.eviction.policies import POLICIES

SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

#: Passed on as they are: what is in them, the API server or the gateway checks.
OPEN = {"worker.affinity", "gateway.affinity", "gateway.config"}


def _mappings(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Paths of all mappings in the default values, with a dot at the end."""
    yield prefix
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _mappings(value, f"{prefix}{key}.")


def _is_free(path: str) -> bool:
    """A map with keys of the user's choosing (labels), or an object that is passed on."""
    node = SCHEMA
    for key in path.rstrip(".").split("."):
        node = _resolved(node["properties"][key]) if key else node
    return node.get("additionalProperties") is not False


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    return SCHEMA["definitions"][reference.rpartition("/")[2]] if reference else node


CLOSED = [path for path in _mappings(DEFAULTS) if not _is_free(path)]


def test_only_known_places_are_open() -> None:
    def objects(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        node = _resolved(node)
        if node.get("type") == "object":
            yield path, node
            for key, child in node.get("properties", {}).items():
                yield from objects(child, f"{path}.{key}".lstrip("."))

    free = {
        path
        for path, node in objects(SCHEMA, "")
        if node.get("additionalProperties", True) is True and path != "global"
    }
    assert free == OPEN


def test_schema_and_values_name_the_same_keys() -> None:
    def compare(node: dict[str, Any], values: dict[str, Any], path: str) -> None:
        properties = _resolved(node).get("properties")
        if properties is None or (not values and path):
            return
        assert set(properties) - {"global"} == set(values), path
        for key, value in values.items():
            if isinstance(value, dict):
                compare(properties[key], value, f"{path}.{key}")

    compare(SCHEMA, DEFAULTS, "")


def test_unknown_key_is_refused_everywhere() -> None:
    """In one rendering: helm names every place."""
    assert len(CLOSED) > 50
    with pytest.raises(RenderError) as refused:
        render({f"{path}bogus": 1 for path in CLOSED})
    named = re.findall(r"- (\S+): Additional property bogus is not allowed", str(refused.value))
    assert sorted(named) == sorted(path.rstrip(".") or "(root)" for path in CLOSED)


def test_every_field_of_an_eviction_policy_can_be_set() -> None:
    fields = {
        f.name
        for policy in (EvictionParams, *POLICIES.values())
        for f in dataclasses.fields(policy)
    }
    per_request = {"seed", "inspect"}
    assert set(SCHEMA["definitions"]["eviction"]["properties"]) == fields - per_request


WRONG: list[tuple[Values, str]] = [
    ({"commonLabels": {"app.kubernetes.io/component": "x"}}, "app.kubernetes.io/component"),
    ({"commonLabels": {"vase-sgl/track": "x"}}, "vase-sgl/track"),
    ({"worker.replicas": "two"}, "replicas"),
    ({"worker.replicas": -1}, "replicas"),
    ({"worker.port": 99999}, "port"),
    ({"security.runAsUser": 0}, "runAsUser"),
    ({"worker.gpu.enabled": "yes"}, "enabled"),
    ({"worker.memFractionStatic": 1.5}, "memFractionStatic"),
    ({"worker.shmSize": "16 GB"}, "shmSize"),
    ({"worker.eviction.default": {"budgett": 1}}, "budgett"),
    ({"worker.image.digest": "sha256:abc"}, "digest"),
    ({"worker.autoscaling.mode": "auto"}, "mode"),
    ({"worker.autoscaling.keda.authModes": "bearer, token"}, "authModes"),
    ({"worker.liveness.periodSeconds": 5}, "periodSeconds"),
    ({"worker.tolerations": [{"keyy": "x"}]}, "keyy"),
    ({"model.path": ""}, "path"),
    ({"model.cache.type": "nfs"}, "type"),
    ({"model.cache.mountPath": "models"}, "mountPath"),
    ({"gateway.audit.store": "mysql"}, "store"),
    ({"gateway.logLevel": "loud"}, "logLevel"),
    ({"gateway.service.type": "ExternalName"}, "type"),
    ({"gateway.tenants.existingSecret": ""}, "existingSecret"),
    ({"networkPolicy.clients": [{}]}, "clients"),
    ({"networkPolicy.clients": [{"podSelectr": {}}]}, "podSelectr"),
    ({"monitoring.interval": "fast"}, "interval"),
    ({"canary.image.digest": "abc"}, "digest"),
]


@pytest.mark.parametrize(("values", "key"), WRONG, ids=[json.dumps(v) for v, _ in WRONG])
def test_wrong_value_is_refused(values: Values, key: str) -> None:
    with pytest.raises(RenderError, match=key):
        render(values)


IMPOSSIBLE: list[tuple[Values, str]] = [
    ({"worker.autoscaling.keda.authModes": "bearer"}, "authModes needs authenticationRef"),
    ({"gateway.replicas": 2}, "gateway.audit.store=postgresql"),
    ({"gateway.autoscaling.enabled": True}, "gateway.audit.store=postgresql"),
    ({"gateway.audit.store": "postgresql"}, "networkPolicy.gatewayEgress"),
    ({"gateway.redis.urlSecret.name": "redis"}, "networkPolicy.gatewayEgress"),
    ({"canary.enabled": True, "canary.modelPath": "other/model"}, "canary.inRotation=false"),
    (
        {"canary.enabled": True, "canary.evictionDefault": {"budget": 1024}},
        "canary.inRotation=false",
    ),
    ({"gateway.tls.enabled": True}, "gateway.tls.existingSecret"),
    ({"gateway.tls.certManager.enabled": True}, "gateway.tls.enabled"),
    (
        {"gateway.tls.enabled": True, "gateway.tls.certManager.enabled": True},
        "issuerRef.name",
    ),
    (
        {
            "gateway.tls.enabled": True,
            "gateway.tls.existingSecret": "x",
            "gateway.tls.certManager.enabled": True,
        },
        "exclude each other",
    ),
    ({"gateway.tls.clientAuth.caSecret": "ca"}, "probeSecret"),
    ({"model.cache.type": "image"}, "model.cache.image.reference"),
    (
        {"model.cache.type": "image", "model.cache.image.reference": "x"},
        "model.download=false",
    ),
    ({"worker.multiNode.enabled": True, "worker.tensorParallelSize": 3}, "multiple of"),
    ({"worker.replicas": 0, "gateway.workerDiscovery": "list"}, "workerDiscovery=dns"),
    ({"worker.tls.existingSecret": "tls"}, "gateway.workerDiscovery=list"),
    (
        {
            "worker.tls.existingSecret": "tls",
            "gateway.workerDiscovery": "list",
            "worker.multiNode.enabled": True,
            "worker.tensorParallelSize": 16,
        },
        "probes in clear text",
    ),
    (
        {
            "worker.multiNode.enabled": True,
            "worker.tensorParallelSize": 2,
            "worker.updatePartition": 1,
        },
        "canary",
    ),
    (
        {"worker.autoscaling.mode": "keda", "worker.autoscaling.minReplicas": 9},
        "above maxReplicas",
    ),
    (
        {
            "gateway.autoscaling.enabled": True,
            "gateway.audit.store": "postgresql",
            "gateway.autoscaling.minReplicas": 9,
        },
        "above maxReplicas",
    ),
    (
        {"monitoring.serviceMonitor.enabled": True, "gateway.metrics.enabled": False},
        "gateway.metrics.enabled",
    ),
    ({"helmTest.window": 64}, "helmTest.window"),
]


@pytest.mark.parametrize(("values", "cure"), IMPOSSIBLE, ids=[c for _, c in IMPOSSIBLE])
def test_impossible_mix_is_refused_with_a_cure(values: Values, cure: str) -> None:
    with pytest.raises(RenderError, match=cure):
        render(values)


def test_table_of_values_is_fresh() -> None:
    assert tool("values_table").main(["--check"]) == 0


def test_table_of_values_names_every_value() -> None:
    table = tool("values_table")
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    values = {value.path: value for value in table.read_values(text)}
    assert values["worker.replicas"].default == 1
    assert values["worker.tolerations"].default[0]["key"] == "nvidia.com/gpu"
    without = text.replace("  # -- Worker pods", "  # Worker pods")
    with pytest.raises(table.UndocumentedValue, match=r"worker\.replicas"):
        table.read_values(without)


def test_stale_table_is_found() -> None:
    table = tool("values_table")
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    fresh = table.updated(readme, table.read_values(text))
    stale = table.updated(readme, table.read_values(text.replace("port: 30000", "port: 30001")))
    assert fresh == readme != stale
