"""The chart on a real API server: VASE_TEST_KUBECONFIG=FILE, any server one may make namespaces on.

With VASE_TEST_ROLLOUT=1 pods are expected to become ready there (images can be pulled, or nodes
are faked) on nodes with eight GPUs in all, and rollouts are tested as well.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.chart import PROFILES, Manifest, Values, options, render
from tests.k8s.cluster import Cluster, CommandFailed
from tests.k8s.manifests import CUSTOM_KINDS

KUBECONFIG = os.environ.get("VASE_TEST_KUBECONFIG")
ROLLOUT = os.environ.get("VASE_TEST_ROLLOUT") == "1"

pytestmark = [
    pytest.mark.skipif(not KUBECONFIG, reason="set VASE_TEST_KUBECONFIG to a kubeconfig file"),
    pytest.mark.xdist_group("api-server"),
    pytest.mark.timeout(600),
]
needs_rollout = pytest.mark.skipif(not ROLLOUT, reason="set VASE_TEST_ROLLOUT=1: pods run there")

RELEASE = "r"
SELECTOR = f"app.kubernetes.io/instance={RELEASE}"
EVERYTHING = (
    "deployments,statefulsets,replicasets,pods,services,endpoints,configmaps,secrets,"
    "serviceaccounts,persistentvolumeclaims,networkpolicies,poddisruptionbudgets,"
    "horizontalpodautoscalers"
)
#: No claims: a bare API server has no volumes.
NO_CLAIMS: Values = {"model.cache.type": "emptyDir", "gateway.audit.sqlite.persistent": False}
#: H100 workers, on whatever GPU nodes there are.
ANY_GPU: Values = {
    **NO_CLAIMS,
    "worker.nodeSelector": None,
    "worker.resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
}


#: What makes manifests of a kind whose operator is not there, and the values without it.
WITHOUT: dict[str, Values] = {
    "PodMonitor": {"monitoring.podMonitor.enabled": False},
    "ServiceMonitor": {"monitoring.serviceMonitor.enabled": False},
    "PrometheusRule": {"monitoring.rules.enabled": False},
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A namespace of its own."""
    assert KUBECONFIG is not None
    cluster = Cluster(Path(KUBECONFIG), f"vase-test-{os.getpid()}-{time.monotonic_ns()}", tmp_path)
    cluster.kubectl("create", "namespace", cluster.namespace)
    yield cluster
    cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")


def known(cluster: Cluster, manifests: tuple[Manifest, ...]) -> tuple[Manifest, ...]:
    """The manifests but for custom resources whose operator is not installed: those are named."""
    unknown = {m["kind"] for m in manifests if m["kind"] in CUSTOM_KINDS - cluster.kinds}
    if unknown:
        warnings.warn(f"not installed, so left out: {', '.join(sorted(unknown))}", stacklevel=2)
    return tuple(m for m in manifests if m["kind"] not in unknown)


def install(cluster: Cluster, command: str, values: Values, profile: str = "h100") -> None:
    cluster.helm(command, RELEASE, str(cluster.chart), *arguments(cluster, values, profile))


def arguments(cluster: Cluster, values: Values, profile: str = "h100") -> list[str]:
    """helm's options, with what needs a missing operator switched off."""
    absent = {
        path: v
        for kind in WITHOUT
        if kind not in cluster.kinds
        for path, v in WITHOUT[kind].items()
    }
    return options({**absent, **values}, profile)


def ready_pods(cluster: Cluster, component: str) -> dict[str, str]:
    """Names and uids of the ready pods of a component."""
    pods = cluster.get("pods", f"--selector={SELECTOR},app.kubernetes.io/component={component}")
    return {
        pod["metadata"]["name"]: pod["metadata"]["uid"]
        for pod in pods
        if any(
            c["type"] == "Ready" and c["status"] == "True"
            for c in pod["status"].get("conditions", [])
        )
        and "deletionTimestamp" not in pod["metadata"]
    }


def wait_for_workers(cluster: Cluster, names: set[str]) -> None:
    cluster.wait(lambda: set(ready_pods(cluster, "worker")) == names, f"{names} are ready")


@pytest.mark.parametrize("profile", PROFILES)
def test_server_accepts_every_manifest(cluster: Cluster, profile: str) -> None:
    manifests = known(cluster, render(profile=profile).manifests)
    text = cluster.bridged(manifests)
    said = cluster.kubectl("apply", "--dry-run=server", "--filename=-", stdin=text)
    assert said.count("(server dry run)") == len(manifests)


def test_server_refuses_what_the_schemas_cannot_see(cluster: Cluster) -> None:
    deployment = copy.deepcopy(render().one("Deployment"))
    deployment["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] = "other"
    with pytest.raises(CommandFailed, match="selector"):
        cluster.kubectl(
            "apply", "--dry-run=server", "--filename=-", stdin=cluster.bridged((deployment,))
        )


@pytest.mark.parametrize("profile", PROFILES)
def test_apply_twice_changes_nothing(cluster: Cluster, profile: str) -> None:
    manifests = known(cluster, render(profile=profile).manifests)
    manifests = tuple(m for m in manifests if m["kind"] != "Pod")  # a hook, not applied
    text = cluster.bridged(manifests)
    assert cluster.kubectl("apply", "--filename=-", stdin=text).count("created") == len(manifests)
    again = cluster.kubectl("apply", "--filename=-", stdin=text)
    assert again.count("unchanged") == len(manifests), again
    cluster.kubectl("delete", "--filename=-", stdin=text)


def test_install_upgrade_rollback_uninstall(cluster: Cluster) -> None:
    install(cluster, "install", {})
    release = cluster.names(EVERYTHING, SELECTOR)
    assert {
        "StatefulSet/r-vase-sgl-worker",
        "Deployment/r-vase-sgl-gateway",
        "PersistentVolumeClaim/r-vase-sgl-audit",
        "PersistentVolumeClaim/r-vase-sgl-models",
    } <= release

    install(cluster, "upgrade", {"canary.enabled": True, "worker.replicas": 3})
    assert "StatefulSet/r-vase-sgl-worker-canary" in cluster.names("statefulsets", SELECTOR)
    assert _replicas(cluster) == 3

    cluster.helm("rollback", RELEASE, "1")
    assert "StatefulSet/r-vase-sgl-worker-canary" not in cluster.names("statefulsets", SELECTOR)
    assert _replicas(cluster) == 2

    cluster.helm("uninstall", RELEASE)
    kept = {"PersistentVolumeClaim/r-vase-sgl-audit"}  # records outlive the release
    cluster.wait(lambda: cluster.names(EVERYTHING, SELECTOR) == kept, "only the records are left")
    assert not cluster.get("secrets", "--selector=owner=helm")


def test_uninstall_leaves_nothing_behind(cluster: Cluster) -> None:
    before = _objects(cluster)
    install(cluster, "install", {"gateway.audit.sqlite.persistent": False, "canary.enabled": True})
    cluster.wait(lambda: len(_objects(cluster)) > len(before) + 10, "the release is there")
    cluster.helm("uninstall", RELEASE)
    cluster.wait(lambda: _objects(cluster) == before, "everything is gone")


@needs_rollout
def test_workers_roll_out_on_gpu_nodes_and_scale(cluster: Cluster) -> None:
    install(cluster, "install", ANY_GPU)
    cluster.kubectl("rollout", "status", "statefulset/r-vase-sgl-worker", "--timeout=60s")
    cluster.kubectl("rollout", "status", "deployment/r-vase-sgl-gateway", "--timeout=60s")
    wait_for_workers(cluster, {f"r-vase-sgl-worker-{i}" for i in range(2)})
    assert _addresses(cluster, "r-vase-sgl-worker") == {f"r-vase-sgl-worker-{i}" for i in range(2)}

    install(cluster, "upgrade", {**ANY_GPU, "worker.replicas": 8})
    wait_for_workers(cluster, {f"r-vase-sgl-worker-{i}" for i in range(8)})

    # No ninth GPU: the worker waits, and says why.
    install(cluster, "upgrade", {**ANY_GPU, "worker.replicas": 9})

    def reason() -> str:
        pods = cluster.get("pods", "--field-selector=status.phase=Pending")
        conditions = [c for pod in pods for c in pod["status"].get("conditions", [])]
        return " ".join(c.get("message", "") for c in conditions)

    cluster.wait(lambda: "Insufficient nvidia.com/gpu" in reason(), "the ninth worker waits")
    assert len(ready_pods(cluster, "worker")) == 8

    install(cluster, "upgrade", {**ANY_GPU, "worker.replicas": 1})
    wait_for_workers(cluster, {"r-vase-sgl-worker-0"})
    cluster.helm("uninstall", RELEASE)


@needs_rollout
def test_only_what_changed_restarts(cluster: Cluster) -> None:
    def uids() -> tuple[dict[str, str], dict[str, str]]:
        return ready_pods(cluster, "worker"), ready_pods(cluster, "gateway")

    def settled(workers: int) -> bool:
        found = uids()
        return len(found[0]) == workers and len(found[1]) == 1

    install(cluster, "install", ANY_GPU)
    cluster.wait(lambda: settled(2), "the release is ready")
    workers, gateways = uids()

    chart = cluster.folder / "newer"
    _bump(cluster, chart)
    cluster.helm("upgrade", RELEASE, str(chart), *arguments(cluster, ANY_GPU))
    cluster.wait(lambda: settled(2), "the newer chart is ready")
    assert uids() == (workers, gateways)

    install(cluster, "upgrade", {**ANY_GPU, "gateway.drainSeconds": 30})
    cluster.kubectl("rollout", "status", "deployment/r-vase-sgl-gateway", "--timeout=60s")
    cluster.wait(lambda: settled(2), "the gateway is back")
    assert uids()[0] == workers and uids()[1] != gateways
    gateways = uids()[1]

    install(
        cluster, "upgrade", {**ANY_GPU, "gateway.drainSeconds": 30, "worker.deterministic": False}
    )
    cluster.kubectl("rollout", "status", "statefulset/r-vase-sgl-worker", "--timeout=60s")
    cluster.wait(lambda: settled(2), "the workers are back")
    assert not set(uids()[0].values()) & set(workers.values())
    assert uids()[1] == gateways
    cluster.helm("uninstall", RELEASE)


@needs_rollout
def test_canary_rolls_out_beside_the_others(cluster: Cluster) -> None:
    install(cluster, "install", ANY_GPU)
    wait_for_workers(cluster, {"r-vase-sgl-worker-0", "r-vase-sgl-worker-1"})
    stable = ready_pods(cluster, "worker")
    install(cluster, "upgrade", {**ANY_GPU, "canary.enabled": True, "canary.image.tag": "next"})
    wait_for_workers(cluster, {*stable, "r-vase-sgl-worker-canary-0"})
    assert stable.items() <= ready_pods(cluster, "worker").items()
    assert _addresses(cluster, "r-vase-sgl-worker-canary") == {"r-vase-sgl-worker-canary-0"}
    assert _addresses(cluster, "r-vase-sgl-worker") == set(stable)
    cluster.helm("rollback", RELEASE, "1")
    wait_for_workers(cluster, set(stable))
    assert ready_pods(cluster, "worker") == stable
    cluster.helm("uninstall", RELEASE)


def _replicas(cluster: Cluster) -> int:
    workers = json.loads(
        cluster.kubectl("get", "statefulset", "r-vase-sgl-worker", "--output=json")
    )
    return int(workers["spec"]["replicas"])


def _addresses(cluster: Cluster, service: str) -> set[str]:
    """Names of the pods that a headless Service resolves to."""
    endpoints = json.loads(cluster.kubectl("get", "endpoints", service, "--output=json"))
    return {
        address["targetRef"]["name"]
        for subset in endpoints.get("subsets", [])
        for address in subset.get("addresses", [])
    }


def _objects(cluster: Cluster) -> set[tuple[str, str]]:
    """Every object in the namespace, of every kind; not what the server keeps for itself."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "--namespaced", "--output=name")
    wanted = [kind for kind in kinds.split() if not kind.startswith(("events", "endpointslices"))]
    return {
        (item["kind"], item["metadata"]["name"])
        for item in cluster.get(",".join(wanted))
        if item["kind"] not in ("Event", "ControllerRevision")
    }


def _bump(cluster: Cluster, target: Path) -> None:
    """A copy of the chart with the next version, and nothing else changed."""
    shutil.copytree(cluster.chart, target)
    file = target / "Chart.yaml"
    text = file.read_text(encoding="utf-8")
    newer = text.replace("\nversion: 0.1.0\n", "\nversion: 0.1.1\n")
    assert newer != text
    file.write_text(newer, encoding="utf-8")
