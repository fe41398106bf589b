"""Bridges what an API server older than the chart's own minimum lacks: a post-renderer for helm.

The chart needs Kubernetes 1.27. Where only an older server can be had (Debian's sources build
1.20), the tests send it the chart with these changes and no others; what is changed is checked
against current schemas in `test_profiles.py`.
"""

from __future__ import annotations

import sys
from typing import Any

import yaml

#: Current API version -> the one such a server has, by kind.
OLDER = {
    "HorizontalPodAutoscaler": "autoscaling/v2beta2",
    "PodDisruptionBudget": "policy/v1beta1",
}


def bridge(manifest: dict[str, Any]) -> dict[str, Any]:
    """Change `manifest` in place: older API versions, TCP probes instead of native gRPC ones, no
    grace period of a probe's own, and no fields that such a server lacks."""
    manifest["apiVersion"] = OLDER.get(manifest["kind"], manifest["apiVersion"])
    for field in ("minReadySeconds", "unhealthyPodEvictionPolicy"):
        if manifest["kind"] in ("StatefulSet", "PodDisruptionBudget"):
            manifest["spec"].pop(field, None)
    template = manifest.get("spec", {}).get("template", {})
    for container in template.get("spec", {}).get("containers", []):
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            container.get(name, {}).pop("terminationGracePeriodSeconds", None)
            grpc = container.get(name, {}).pop("grpc", None)
            if grpc is not None:
                container[name]["tcpSocket"] = {"port": grpc["port"]}
    return manifest


if __name__ == "__main__":
    manifests = [m for m in yaml.safe_load_all(sys.stdin) if m is not None]
    yaml.safe_dump_all([bridge(manifest) for manifest in manifests], sys.stdout)
