"""Validation of rendered manifests: Kubernetes' own schemas, and ours for custom resources."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from tests.k8s.chart import Manifest

#: Current release, and the oldest the chart claims.
NEWEST, OLDEST = "1.37", "1.27"
SCHEMAS = Path(__file__).parent / "schemas"
CUSTOM_KINDS = {path.stem for path in SCHEMAS.glob("*.json")}


def check(manifest: Manifest, version: str = NEWEST) -> None:
    """Raise a validation error unless the manifest fits its schema, unknown fields included."""
    _check(json.dumps(manifest), version)


@functools.cache  # most manifests are the same in most renderings
def _check(text: str, version: str) -> None:
    manifest = json.loads(text)
    if manifest["kind"] not in CUSTOM_KINDS:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.validate(manifest, _schema(manifest["kind"]))
    if manifest["kind"] == "LeaderWorkerSet":
        template = manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod | {"metadata": {"name": "x"}}, version, strict=True)


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    return schema
