"""Autoscaling of workers: none, KEDA on Prometheus queries, or an HPA on a custom metric."""

from __future__ import annotations

from typing import Any

import promql_parser
import pytest

from tests.k8s.chart import Rendered, Values, render

KEDA: Values = {"worker.autoscaling.mode": "keda"}
HPA: Values = {"worker.autoscaling.mode": "hpa"}


def triggers(rendered: Rendered) -> dict[str, dict[str, Any]]:
    found = rendered.one("ScaledObject")["spec"]["triggers"]
    return {trigger["name"]: trigger for trigger in found}


def test_off_by_default() -> None:
    rendered = render({"worker.replicas": 3})
    assert rendered.one("StatefulSet")["spec"]["replicas"] == 3
    assert not rendered.of("ScaledObject") and not rendered.of("HorizontalPodAutoscaler")


@pytest.mark.parametrize("values", [KEDA, HPA], ids=["keda", "hpa"])
def test_the_scaler_owns_the_number_of_workers(values: Values) -> None:
    rendered = render({**values, "worker.replicas": 3})
    assert "replicas" not in rendered.one("StatefulSet")["spec"]


def test_keda_scales_on_reserved_slots_and_queue_time() -> None:
    rendered = render(
        {
            **KEDA,
            "worker.autoscaling.reservedSlotRatio": 0.7,
            "worker.autoscaling.queueSeconds": 3,
        }
    )
    found = triggers(rendered)
    assert set(found) == {"reserved-slots", "queue-time"}
    assert found["reserved-slots"]["metadata"]["threshold"] == "0.7"
    assert found["queue-time"]["metadata"]["threshold"] == "3"
    # A sum over workers, divided among them, is a share per worker.
    assert found["reserved-slots"]["metricType"] == "AverageValue"
    for trigger in found.values():
        query = trigger["metadata"]["query"]
        promql_parser.parse(query)
        assert 'vase_release="r"' in query and 'namespace="ns"' in query
        assert "authenticationRef" not in trigger


def test_keda_takes_no_worker_away_when_none_is_scraped() -> None:
    """KEDA takes an empty answer for 0 unless it is told that it is an error."""
    assert triggers(render(KEDA))["reserved-slots"]["metadata"]["ignoreNullValues"] == "false"


def test_keda_counts_workers_that_it_scales_and_the_gateways_queue() -> None:
    """Canaries are not scaled; and SGLang's own queue is empty, for gateways hold requests back."""
    found = triggers(render(KEDA))
    assert 'track="stable"' in found["reserved-slots"]["metadata"]["query"]
    assert "rate(vase_queue_duration_seconds_bucket{" in found["queue-time"]["metadata"]["query"]
    assert set(triggers(render({**KEDA, "gateway.metrics.enabled": False}))) == {"reserved-slots"}


def test_keda_can_authenticate() -> None:
    identity: Values = {**KEDA, "worker.autoscaling.keda.authenticationRef": "prometheus"}
    secret = {**identity, "worker.autoscaling.keda.authModes": "tls,basic"}
    for values, modes in ((identity, None), (secret, "tls,basic")):
        for trigger in triggers(render(values)).values():
            assert trigger["authenticationRef"] == {"name": "prometheus"}
            # Without it KEDA's Prometheus scaler sends none of the credentials.
            assert trigger["metadata"].get("authModes") == modes


def test_hpa_asks_for_the_same_share() -> None:
    scaler = render({**HPA, "worker.autoscaling.reservedSlotRatio": 0.75}).one(
        "HorizontalPodAutoscaler", "-worker"
    )["spec"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "vase_reserved_slot_ratio"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "750m"}


@pytest.mark.parametrize(
    ("values", "target"),
    [({}, "StatefulSet"), ({"worker.multiNode.enabled": True}, "LeaderWorkerSet")],
    ids=["one node", "multi-node"],
)
def test_the_scaler_points_at_the_workers(values: Values, target: str) -> None:
    size = {"worker.tensorParallelSize": 2}
    keda = render({**KEDA, **size, **values}).one("ScaledObject")["spec"]["scaleTargetRef"]
    hpa = render({**HPA, **size, **values}).one("HorizontalPodAutoscaler", "-worker")
    workers = render({**size, **values}).one(target)
    expected = {
        "apiVersion": workers["apiVersion"],
        "kind": target,
        "name": workers["metadata"]["name"],
    }
    assert keda == hpa["spec"]["scaleTargetRef"] == expected


def test_workers_leave_slowly() -> None:
    rendered = render({**KEDA, "worker.autoscaling.scaleDownStabilizationSeconds": 1200})
    behavior = rendered.one("ScaledObject")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    down = behavior["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] == 1200
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]
