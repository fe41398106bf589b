"""Every metric that alerts, dashboard and scaling may name, with its type.

SGLang's are read from its source, as installed. The worker's own are read from the table of
docs/engine.md, which a test of the engine compares with what it declares; the gateway's are listed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

import yaml

from tests.k8s.chart import CHART

#: Of the gateway, by the names of k8s/vase-sgl/files/gateway-metrics.yaml.
GATEWAY_TYPES = {
    "requests": "Counter",
    "rejections": "Counter",
    "requests_open": "Gauge",
    "retries": "Counter",
    "queue_waiting": "Gauge",
    "queue_seconds": "Histogram",
    "ttft_seconds": "Histogram",
    "tpot_seconds": "Histogram",
    "tenant_tokens": "Counter",
    "worker_ready": "Gauge",
    "worker_breaker": "Gauge",
    "audit_write_failures": "Counter",
    "audit_commit_seconds": "Histogram",
}

#: Made by the rules themselves.
RECORDED = {"vase:reserved_slot_ratio": "Gauge"}

#: Prometheus's own.
BUILT_IN = {"up": "Gauge"}

_SUFFIXES = {"Histogram": ("_bucket", "_sum", "_count"), "Summary": ("_sum", "_count")}


@functools.cache
def worker() -> dict[str, str]:
    """Series of the worker beside SGLang's own, with their type."""
    table = (CHART.parents[1] / "docs" / "engine.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`vase:[^|]*) \| (\w+) \|", table, flags=re.MULTILINE)
    return {
        name: kind.capitalize() for names, kind in rows for name in re.findall(r"vase:\w+", names)
    }


@functools.cache
def gateway_names() -> dict[str, str]:
    """The chart's own list: name in its files -> name of the metric."""
    names: dict[str, str] = yaml.safe_load(
        (CHART / "files" / "gateway-metrics.yaml").read_text(encoding="utf-8")
    )
    return names


@functools.cache
def sglang() -> dict[str, str]:
    """Metrics that SGLang declares, with their types: `Counter(name="sglang:...")` and the like."""
    package = importlib.util.find_spec("sglang")  # not imported: that takes seconds
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent / "srt" / "observability" / "metrics_collector.py"
    found = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "name" and isinstance(value, ast.Constant):
                    found[str(value.value)] = node.func.id
    return found


@functools.cache
def types() -> dict[str, str]:
    """Metric -> Counter, Gauge, Histogram or Summary."""
    gateway = {name: GATEWAY_TYPES[key] for key, name in gateway_names().items()}
    return {**sglang(), **worker(), **gateway, **RECORDED, **BUILT_IN}


@functools.cache
def series() -> dict[str, str]:
    """What may stand in a query -> type of its metric: a histogram only by its parts."""
    return {
        f"{name}{suffix}": kind
        for name, kind in types().items()
        for suffix in _SUFFIXES.get(kind, ("",))
    }


def declared_instruments(source: str) -> dict[str, str]:
    """OpenTelemetry instruments that a module creates, by their name on a Prometheus page.

    `create_counter("a.b")` is `a_b_total`, a unit of seconds is appended, one in braces is not.
    """
    kinds = {
        "create_counter": "Counter",
        "create_observable_counter": "Counter",
        "create_histogram": "Histogram",
        "create_observable_gauge": "Gauge",
        "gauge": "Gauge",
    }
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = node.func
        function = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        first = node.args[0]
        if function not in kinds or not isinstance(first, ast.Constant):
            continue
        unit = next((ast.literal_eval(k.value) for k in node.keywords if k.arg == "unit"), "")
        suffix = {"s": "_seconds"}.get(unit, "")
        suffix += "_total" if kinds[function] == "Counter" else ""
        found[str(first.value).replace(".", "_") + suffix] = kinds[function]
    return found
