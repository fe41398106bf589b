"""Alerts, dashboard and scrape settings: every query is PromQL over metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.k8s import metrics
from tests.k8s.chart import POSTGRESQL, Rendered, Values, render

ALERT_TESTS = Path(__file__).parent / "alert_tests.yaml"
WATCHED: Values = {
    "monitoring.podMonitor.enabled": True,
    "monitoring.serviceMonitor.enabled": True,
    "monitoring.rules.enabled": True,
    "monitoring.dashboard.enabled": True,
    "worker.autoscaling.mode": "keda",
}
#: Every alert there is.
ALERTS = {
    "VaseSlotsExhausted",
    "VaseWorkerDown",
    "VaseNoWorkers",
    "VaseWorkersMissing",
    "VaseWorkerRestarts",
    "VaseRetractions",
    "VaseIntegrityErrors",
    "VaseQueueTimeHigh",
    "VaseBudgetWithoutEviction",
    "VaseGatewayDown",
    "VaseGatewaysMissing",
    "VaseGatewayWithoutWorkers",
    "VaseBreakersOpen",
    "VaseRequestsFailing",
    "VaseGatewayRejecting",
    "VaseKeysNotChecked",
    "VaseAuditWriteFailures",
    "VaseAuditCommitsSlow",
}

#: Functions over a range that are not of counters.
OF_GAUGES = {"changes", "max_over_time"}

promtool = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    promtool is None, reason="promtool is not on PATH (Debian: apt-get install prometheus)"
)


def rules(rendered: Rendered) -> Iterator[dict[str, Any]]:
    for group in rendered.one("PrometheusRule")["spec"]["groups"]:
        yield from group["rules"]


def dashboard(rendered: Rendered) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        rendered.one("ConfigMap", "-dashboard")["data"]["vase-sgl.json"]
    )
    return content


def panel_queries(rendered: Rendered) -> Iterator[tuple[str, str]]:
    for panel in dashboard(rendered)["panels"]:
        for target in panel.get("targets", []):
            # Grafana fills its variables in; any value does for reading the query.
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def queries() -> list[tuple[str, str]]:
    """Every query of the chart, with a name."""
    rendered = render(WATCHED)
    found = [(rule.get("alert", rule.get("record")), rule["expr"]) for rule in rules(rendered)]
    found += panel_queries(rendered)
    triggers = rendered.one("ScaledObject")["spec"]["triggers"]
    return found + [(t["name"], t["metadata"]["query"]) for t in triggers]


def selectors(expression: Any, counts: bool = True) -> Iterator[tuple[Any, bool]]:
    """Every series selector below an expression, and whether it has to be of a counter."""
    if isinstance(expression, promql_parser.MatrixSelector):
        yield expression.vector_selector, counts
    elif isinstance(expression, promql_parser.VectorSelector):
        yield expression, False
    else:
        for name in ("expr", "lhs", "rhs", "param"):
            child = getattr(expression, name, None)
            if child is not None:
                yield from selectors(child)
        for child in getattr(expression, "args", None) or ():
            yield from selectors(child, counts=expression.func.name not in OF_GAUGES)


@pytest.mark.parametrize(("name", "query"), queries(), ids=lambda v: str(v)[:40])
def test_query_is_promql_over_metrics_that_exist(name: str, query: str) -> None:
    found = list(selectors(promql_parser.parse(query)))
    assert found or query == "vector(0)"
    for selector, counts in found:
        kind = metrics.series().get(selector.name)
        assert kind is not None, f"{name}: no metric {selector.name}"
        if counts:
            assert kind in ("Counter", "Histogram"), f"{name}: rate of the gauge {selector.name}"


@pytest.mark.parametrize(("name", "query"), queries(), ids=lambda v: str(v)[:40])
def test_query_sees_its_own_release_only(name: str, query: str) -> None:
    for selector, _ in selectors(promql_parser.parse(query)):
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert {"namespace", "vase_release"} <= labels, f"{name}: {selector.name}"


def test_tenants_are_told_apart_by_counters() -> None:
    """Histograms have the label on demand only."""
    kinds = {
        metrics.series()[selector.name]
        for _, query in queries()
        if "vase_tenant" in query
        for selector, _ in selectors(promql_parser.parse(query))
    }
    assert kinds == {"Counter"}


def test_unknown_metric_would_be_found() -> None:
    (selector,) = (s for s, _ in selectors(promql_parser.parse("rate(vase:bogus_total[5m])")))
    assert selector.name not in metrics.series()
    assert metrics.series()["sglang:queue_time_seconds_bucket"] == "Histogram"
    assert "sglang:queue_time_seconds" not in metrics.series()
    assert len(metrics.sglang()) > 100


def test_gateway_metrics_are_named_in_one_file() -> None:
    assert set(metrics.gateway_names()) == set(metrics.GATEWAY_TYPES)
    rendered = render(WATCHED)
    texts = [yaml.safe_dump(rendered.one("PrometheusRule")), json.dumps(dashboard(rendered))]
    for text in texts:
        assert not re.search(r"@[a-z_]+@", text), "a name was not filled in"
    for name in metrics.gateway_names().values():
        assert any(name in text for text in texts), f"{name} is never used"


def test_gateway_metrics_are_those_the_gateway_declares() -> None:
    """Read from its source: instruments by name and unit, as OpenTelemetry writes them out."""
    spec = importlib.util.find_spec("vase_sgl.gateway.metrics")
    assert spec is not None and spec.origin is not None
    declared = metrics.declared_instruments(Path(spec.origin).read_text(encoding="utf-8"))
    for key, name in metrics.gateway_names().items():
        assert declared.get(name) == metrics.GATEWAY_TYPES[key], name


def test_declared_instruments_are_read() -> None:
    source = """
meter.create_counter("vase.requests", description="d")
meter.create_histogram("vase.queue.duration", unit="s", description="d")
meter.create_histogram("gen_ai.client.token.usage", unit="{token}")
meter.create_observable_gauge("vase.worker.ready", [observe])
gauge("vase.worker.in_flight", lambda w: w.in_flight, "Requests.")
"""
    assert metrics.declared_instruments(source) == {
        "vase_requests_total": "Counter",
        "vase_queue_duration_seconds": "Histogram",
        "gen_ai_client_token_usage": "Histogram",
        "vase_worker_ready": "Gauge",
        "vase_worker_in_flight": "Gauge",
    }


def test_alerts_explain_themselves() -> None:
    found = {rule["alert"]: rule for rule in rules(render(WATCHED)) if "alert" in rule}
    assert set(found) == ALERTS
    for rule in found.values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_thresholds_and_labels_come_from_values() -> None:
    changed = {
        **WATCHED,
        "monitoring.rules.queueSeconds": 12.5,
        "monitoring.rules.reservedSlotRatio": 0.9,
        "monitoring.rules.failedRatio": 0.1,
        "monitoring.rules.rejectedRatio": 0.2,
        "monitoring.rules.auditCommitSeconds": 3.5,
        "monitoring.rules.alertLabels": {"team": "serving"},
    }
    found = {rule["alert"]: rule for rule in rules(render(changed)) if "alert" in rule}
    assert found["VaseQueueTimeHigh"]["expr"].endswith("> 12.5")
    assert found["VaseSlotsExhausted"]["expr"].endswith("> 0.9")
    assert found["VaseRequestsFailing"]["expr"].endswith("> 0.1")
    assert found["VaseGatewayRejecting"]["expr"].endswith("> 0.2")
    assert found["VaseAuditCommitsSlow"]["expr"].endswith("> 3.5")
    assert all(rule["labels"]["team"] == "serving" for rule in found.values())
    assert all("severity" in rule["labels"] for rule in found.values())


SCALED: Values = {**POSTGRESQL, "gateway.autoscaling.enabled": True}


@pytest.mark.parametrize(
    ("values", "workers", "gateways"),
    [
        ({"worker.replicas": 3}, 3, 1),
        ({**POSTGRESQL, "gateway.replicas": 4}, 1, 4),
        ({"worker.autoscaling.mode": "hpa", "worker.autoscaling.minReplicas": 2}, 2, 1),
        ({**SCALED, "gateway.autoscaling.minReplicas": 5}, 1, 5),
        (
            {"worker.replicas": 3, "worker.multiNode.enabled": True, "worker.multiNode.nodes": 2}
            | {"worker.tensorParallelSize": 16},
            6,  # pods of three groups
            1,
        ),
    ],
    ids=["workers", "gateways", "scaled workers", "scaled gateways", "groups"],
)
def test_pods_are_missing_below_the_least_there_may_be(
    values: Values, workers: int, gateways: int
) -> None:
    rendered = render(
        {"monitoring.rules.enabled": True, "worker.startup.timeoutSeconds": 1200, **values}
    )
    found = {rule["alert"]: rule for rule in rules(rendered) if "alert" in rule}
    assert found["VaseWorkersMissing"]["expr"].endswith(f" < {workers}")
    assert found["VaseWorkersMissing"]["for"] == "1200s"
    assert found["VaseGatewaysMissing"]["expr"].endswith(f" < {gateways}")


def test_every_alert_is_tested_both_ways() -> None:
    """In alert_tests.yaml, which promtool runs where it is installed."""
    content = yaml.safe_load(ALERT_TESTS.read_text(encoding="utf-8"))
    fires, silent = set(), set()
    for test in content["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else silent).add(case["alertname"])
    assert fires == silent == ALERTS


@needs_promtool
@pytest.mark.parametrize(
    "values, tests",
    [
        ({}, "alert_tests.yaml"),
        ({"canary.enabled": True}, "alert_tests.yaml"),
        ({"canary.enabled": True, "canary.inRotation": False}, "alert_tests.yaml"),
        ({"canary.enabled": True, "canary.inRotation": False}, "alert_tests_idle_canary.yaml"),
    ],
)
def test_alerts_fire_and_stay_silent(values: Values, tests: str, tmp_path: Path) -> None:
    least: Values = {"worker.autoscaling.minReplicas": 2, "gateway.autoscaling.minReplicas": 2}
    rendered = render({**WATCHED, **SCALED, **least, **values})
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump(rendered.one("PrometheusRule")["spec"]), encoding="utf-8"
    )
    shutil.copy(ALERT_TESTS.parent / tests, tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", tests]):
        done = subprocess.run(
            [str(promtool), *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_reads_every_query(tmp_path: Path) -> None:
    recorded = [{"record": f"query_{i}", "expr": q} for i, (_, q) in enumerate(queries())]
    content = {"groups": [{"name": "queries", "rules": recorded}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = subprocess.run(
        [str(promtool), "check", "rules", "rules.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_is_laid_out_without_overlaps() -> None:
    panels = dashboard(render(WATCHED))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)


def test_dashboard_works_on_any_data_source() -> None:
    content = dashboard(render(WATCHED))
    assert [v["name"] for v in content["templating"]["list"]] == [
        "datasource",
        "namespace",
        "release",
    ]
    for panel in content["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]


def test_dashboard_is_found_by_its_label() -> None:
    rendered = render({**WATCHED, "monitoring.dashboard.labels": {"folder": "llm"}})
    labels = rendered.one("ConfigMap", "-dashboard")["metadata"]["labels"]
    assert labels["grafana_dashboard"] == "1" and labels["folder"] == "llm"


def test_scrapes_reach_the_pods() -> None:
    rendered = render({**WATCHED, "canary.enabled": True, "monitoring.interval": "5s"})
    monitor = rendered.one("PodMonitor")["spec"]
    for group in rendered.of("StatefulSet"):
        labels = group["spec"]["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in rendered.worker()["ports"]}
    assert endpoint["interval"] == "5s"
    assert "--enable-metrics" in rendered.worker()["args"]

    monitor = rendered.one("ServiceMonitor")["spec"]
    matching = [
        service
        for service in rendered.of("Service")
        if monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ]
    assert [s["metadata"]["name"] for s in matching] == ["r-vase-sgl-gateway-metrics"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in matching[0]["spec"]["ports"]}


def test_scrapes_carry_the_labels_the_queries_ask_for() -> None:
    rendered = render(WATCHED)
    for endpoint, component in (
        (rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"][0], "worker"),
        (rendered.one("ServiceMonitor")["spec"]["endpoints"][0], "gateway"),
    ):
        fixed = {r["targetLabel"]: r.get("replacement") for r in endpoint["relabelings"]}
        assert fixed["vase_release"] == "r" and fixed["component"] == component
    tracks = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["relabelings"]
    assert {
        "sourceLabels": ["__meta_kubernetes_pod_label_vase_sgl_track"],
        "targetLabel": "track",
    } in tracks


def test_prometheus_selects_by_labels() -> None:
    rendered = render({**WATCHED, "monitoring.labels": {"release": "prom"}})
    for kind in ("PodMonitor", "ServiceMonitor", "PrometheusRule"):
        assert rendered.one(kind)["metadata"]["labels"]["release"] == "prom"


@pytest.mark.parametrize(
    ("switch", "kind"),
    [
        ("podMonitor", "PodMonitor"),
        ("serviceMonitor", "ServiceMonitor"),
        ("rules", "PrometheusRule"),
    ],
)
def test_switches(switch: str, kind: str) -> None:
    assert not render().of(kind)
    assert render({f"monitoring.{switch}.enabled": True}).one(kind)
