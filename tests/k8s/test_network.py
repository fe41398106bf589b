"""Who reaches whom, evaluated over the rendered NetworkPolicies."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from tests.k8s.chart import ROOT, Rendered, Values, render
from tests.k8s.reachability import Peer, allowed

GRPC, METRICS, WORKER, DNS = 50051, 9464, 30000, 53
OUTSIDER = Peer(namespace="elsewhere")
NEIGHBOUR = Peer(labels={"app": "client"})
PROMETHEUS = Peer(labels={"app.kubernetes.io/name": "prometheus"}, namespace="monitoring")
GRAFANA = Peer(labels={"app.kubernetes.io/name": "grafana"}, namespace="monitoring")
RESOLVER = Peer(labels={"k8s-app": "kube-dns"}, namespace="kube-system")
INTERNET, METADATA, CLUSTER = (
    Peer(address="8.8.8.8"),
    Peer(address="169.254.169.254"),
    Peer(address="10.1.2.3"),
)


def pod(rendered: Rendered, component: str) -> Peer:
    """A pod of the release, with the labels its template gives it."""
    for manifest in rendered.manifests:
        labels = manifest["metadata"]["labels"]
        match manifest["kind"]:
            case "Deployment" | "StatefulSet" | "Job":
                labels = manifest["spec"]["template"]["metadata"]["labels"]
            case "LeaderWorkerSet":
                labels = manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]["metadata"][
                    "labels"
                ]
            case "Pod":
                pass
            case _:
                continue
        if labels["app.kubernetes.io/component"] == component:
            return Peer(labels=labels)
    raise AssertionError(component)


@pytest.fixture
def rendered() -> Rendered:
    return render()


def test_only_the_gateway_and_prometheus_reach_workers(rendered: Rendered) -> None:
    worker, gateway = pod(rendered, "worker"), pod(rendered, "gateway")
    assert allowed(rendered, gateway, worker, WORKER)
    assert allowed(rendered, PROMETHEUS, worker, WORKER)
    for other in (NEIGHBOUR, OUTSIDER, GRAFANA, worker, pod(rendered, "test")):
        assert not allowed(rendered, other, worker, WORKER), other
    assert not allowed(rendered, gateway, worker, 22)


def test_only_named_clients_reach_the_gateway(rendered: Rendered) -> None:
    gateway = pod(rendered, "gateway")
    assert allowed(rendered, NEIGHBOUR, gateway, GRPC)
    assert allowed(rendered, pod(rendered, "test"), gateway, GRPC)
    assert not allowed(rendered, OUTSIDER, gateway, GRPC)
    chosen = render(
        {"networkPolicy.clients": [{"namespaceSelector": {"matchLabels": {"llm": "yes"}}}]}
    )
    gateway = pod(chosen, "gateway")
    labelled = Peer(namespace="elsewhere", namespace_labels={"llm": "yes"})
    assert allowed(chosen, labelled, gateway, GRPC)
    assert not allowed(chosen, NEIGHBOUR, gateway, GRPC)
    assert not allowed(chosen, OUTSIDER, gateway, GRPC)


def test_no_clients_means_nobody() -> None:
    """An empty `from` would mean everybody."""
    closed = render({"networkPolicy.clients": [], "helmTest.enabled": False})
    for peer in (NEIGHBOUR, OUTSIDER):
        assert not allowed(closed, peer, pod(closed, "gateway"), GRPC)


def test_metrics_are_for_prometheus(rendered: Rendered) -> None:
    gateway = pod(rendered, "gateway")
    assert allowed(rendered, PROMETHEUS, gateway, METRICS)
    assert not allowed(rendered, PROMETHEUS, gateway, GRPC)
    for other in (NEIGHBOUR, OUTSIDER, GRAFANA):
        assert not allowed(rendered, other, gateway, METRICS)
    unwatched = render({"networkPolicy.monitoring.namespaceLabels": None})
    assert not allowed(unwatched, PROMETHEUS, pod(unwatched, "gateway"), METRICS)
    assert not allowed(unwatched, PROMETHEUS, pod(unwatched, "worker"), WORKER)


@pytest.mark.parametrize("component", ["gateway", "worker", "test"])
def test_everyone_resolves_names(rendered: Rendered, component: str) -> None:
    for protocol in ("UDP", "TCP"):
        assert allowed(rendered, pod(rendered, component), RESOLVER, DNS, protocol)
    assert not allowed(rendered, pod(rendered, component), RESOLVER, 80)


def test_dns_may_be_another_pod_another_port_or_an_address() -> None:
    """The documentation's example: OpenShift's, and NodeLocal DNSCache's."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(networkPolicy:.*?)```", text, re.DOTALL)
    egress = yaml.safe_load(example)["networkPolicy"]["dns"]["egress"]
    rendered = render({"networkPolicy.dns.egress": egress}, profile="multi-tenant")
    for component in ("gateway", "worker", "test", "migrate"):
        asking = pod(rendered, component)
        for protocol in ("UDP", "TCP"):
            assert allowed(rendered, asking, Peer(namespace="openshift-dns"), 5353, protocol)
            assert allowed(rendered, asking, Peer(address="169.254.20.10"), DNS, protocol)
            assert not allowed(rendered, asking, RESOLVER, DNS, protocol)


def test_nothing_else_leaves(rendered: Rendered) -> None:
    for component in ("gateway", "test"):
        for target in (INTERNET, METADATA, CLUSTER, OUTSIDER):
            assert not allowed(rendered, pod(rendered, component), target, 443)


def test_workers_reach_the_hub_only_to_download(rendered: Rendered) -> None:
    worker = pod(rendered, "worker")
    assert allowed(rendered, worker, INTERNET, 443)
    assert not allowed(rendered, worker, INTERNET, 80)
    for private in (METADATA, CLUSTER):
        assert not allowed(rendered, worker, private, 443)
    offline = render({"model.download": False, "model.path": "/models/q"})
    assert not allowed(offline, pod(offline, "worker"), INTERNET, 443)


def test_further_egress() -> None:
    rendered = render(profile="multi-tenant")
    database = Peer(namespace="databases")
    assert allowed(rendered, pod(rendered, "gateway"), database, 5432)
    assert allowed(rendered, pod(rendered, "gateway"), database, 6379)
    assert not allowed(rendered, pod(rendered, "gateway"), database, 22)
    assert not allowed(rendered, pod(rendered, "worker"), database, 5432)
    migration = pod(rendered, "migrate")
    assert allowed(rendered, migration, database, 5432)
    assert not allowed(rendered, migration, pod(rendered, "worker"), WORKER)


def test_the_first_migration_comes_before_all_other_policies() -> None:
    whole = render(profile="multi-tenant")
    before = tuple(
        manifest
        for manifest in whole.manifests
        if manifest["kind"] != "NetworkPolicy"
        or "pre-install" in manifest["metadata"].get("annotations", {}).get("helm.sh/hook", "")
    )
    first = dataclasses.replace(whole, manifests=before)
    migration, database = pod(first, "migrate"), Peer(namespace="databases")
    for rendered in (first, whole):
        assert allowed(rendered, migration, database, 5432)
        for protocol in ("UDP", "TCP"):
            assert allowed(rendered, migration, RESOLVER, DNS, protocol)
        assert not allowed(rendered, migration, INTERNET, 443)


def test_a_canary_can_be_called_directly_by_whom_is_named() -> None:
    values: Values = {"canary.enabled": True, "canary.inRotation": False}
    named: Values = {"canary.clients": [{"podSelector": {"matchLabels": NEIGHBOUR.labels}}]}
    for rendered, reached in ((render(values), False), (render({**values, **named}), True)):
        stable, canary = (
            Peer(labels=rendered.one("StatefulSet", n)["spec"]["template"]["metadata"]["labels"])
            for n in ("-worker", "-worker-canary")
        )
        assert allowed(rendered, NEIGHBOUR, canary, WORKER) == reached
        assert not allowed(rendered, NEIGHBOUR, stable, WORKER)
        assert not allowed(rendered, OUTSIDER, canary, WORKER)


def test_ranks_of_a_group_talk_freely() -> None:
    values: Values = {"worker.multiNode.enabled": True, "worker.tensorParallelSize": 2}
    rendered = render(values)
    worker = pod(rendered, "worker")
    for port in (20000, 45678):
        assert allowed(rendered, worker, worker, port)
        assert not allowed(rendered, NEIGHBOUR, worker, port)
        assert not allowed(rendered, pod(rendered, "gateway"), worker, port)
    assert not allowed(render(), pod(render(), "worker"), pod(render(), "worker"), 20000)


def test_policies_can_be_left_out() -> None:
    assert not render({"networkPolicy.enabled": False}).of("NetworkPolicy")
