"""Rendering the chart with the real helm."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "k8s" / "vase-sgl"
RELEASE, NAMESPACE = "r", "ns"

#: Profiles as they are installed: one lays itself over another.
PROFILES = {
    "defaults": (),
    "cpu-demo": ("values-cpu-demo.yaml",),
    "h100": ("values-h100.yaml",),
    "multi-tenant": ("values-h100.yaml", "values-multi-tenant.yaml"),
}

Manifest = dict[str, Any]
#: Values by dotted path, as in `{"gateway.tls.enabled": True}`.
Values = dict[str, Any]

#: Records in a database that gateways may reach.
POSTGRESQL: Values = {
    "gateway.audit.store": "postgresql",
    "networkPolicy.gatewayEgress": [{"ports": [{"port": 5432, "protocol": "TCP"}]}],
}


class RenderError(Exception):
    """helm refused. The text is what it said."""


def tool(name: str) -> ModuleType:
    """A script of k8s/tools as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "k8s" / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def helm() -> Path:
    """The pinned helm; fetched on first use."""
    folder: Path = tool("fetch_helm").fetch()
    return folder / "helm"


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, check=False)


def options(values: Values | None = None, profile: str = "defaults") -> list[str]:
    """helm's options for a profile with `values` laid over it."""
    files = [f"--values={CHART / name}" for name in PROFILES[profile]]
    return files + [f"--set-json={path}={json.dumps(v)}" for path, v in (values or {}).items()]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """The manifests of one rendering."""

    manifests: tuple[Manifest, ...]

    def of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Manifest:
        """The only manifest of this kind (and name, without the release's prefix)."""
        full = f"{RELEASE}-vase-sgl{name}" if name is not None else None
        found = [m for m in self.of(kind) if full in (None, m["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} {kind} {name or ''}"
        return found[0]

    def names(self, kind: str) -> set[str]:
        return {m["metadata"]["name"].removeprefix(f"{RELEASE}-vase-sgl") for m in self.of(kind)}

    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every pod spec with the name of what makes it."""
        for manifest in self.manifests:
            name, spec = manifest["metadata"]["name"], manifest.get("spec", {})
            match manifest["kind"]:
                case "Pod":
                    yield name, spec
                case "Deployment" | "StatefulSet" | "Job":
                    yield name, spec["template"]["spec"]
                case "LeaderWorkerSet":
                    yield name, spec["leaderWorkerTemplate"]["workerTemplate"]["spec"]

    def worker(self, name: str = "-worker") -> dict[str, Any]:
        """The worker's container."""
        return _only(dict(self.pods())[f"{RELEASE}-vase-sgl{name}"]["containers"])

    def worker_pod(self, name: str = "-worker") -> dict[str, Any]:
        return dict(self.pods())[f"{RELEASE}-vase-sgl{name}"]

    def gateway_pod(self) -> dict[str, Any]:
        return dict(self.pods())[f"{RELEASE}-vase-sgl-gateway"]

    def gateway(self) -> dict[str, Any]:
        return _only(self.gateway_pod()["containers"])

    def gateway_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(
            self.one("ConfigMap", "-gateway")["data"]["gateway.yaml"]
        )
        return config


def render(values: Values | None = None, profile: str = "defaults") -> Rendered:
    """What the chart makes of `values` over a profile. Raises `RenderError`."""
    return _render(tuple(options(values, profile)))


@functools.cache
def _render(arguments: tuple[str, ...]) -> Rendered:
    done = run_helm("template", RELEASE, str(CHART), f"--namespace={NAMESPACE}", *arguments)
    if done.returncode != 0:
        raise RenderError(done.stderr)
    manifests = yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)
    return Rendered(tuple(manifest for manifest in manifests if manifest is not None))


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    assert len(items) == 1
    return items[0]
