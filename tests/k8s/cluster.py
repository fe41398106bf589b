"""helm and kubectl against a real API server."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.chart import CHART, Manifest, helm
from tests.k8s.old_server import bridge

#: The first minor release with everything the chart uses.
MINIMUM = 27


class CommandFailed(Exception):
    """helm or kubectl failed. The text is what it said."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One namespace of the server that `kubeconfig` names."""

    kubeconfig: Path
    namespace: str
    folder: Path

    @functools.cached_property
    def minor(self) -> int:
        version = json.loads(self.kubectl("version", "--output=json"))
        return int(version["serverVersion"]["minor"].rstrip("+"))

    @functools.cached_property
    def kinds(self) -> set[str]:
        """Every kind that the server knows."""
        lines = self.kubectl("api-resources", "--no-headers").splitlines()
        return {line.split()[-1] for line in lines}

    @functools.cached_property
    def chart(self) -> Path:
        """The chart; for an old server without its claim of a minimum."""
        if self.minor >= MINIMUM:
            return CHART
        copy = self.folder / CHART.name
        subprocess.run(["cp", "-r", str(CHART), str(copy)], check=True)
        lines = (CHART / "Chart.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = "".join(line for line in lines if not line.startswith("kubeVersion:"))
        (copy / "Chart.yaml").write_text(kept, encoding="utf-8")
        return copy

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        tool = helm().parent / "kubectl"
        return self._run([str(tool), f"--namespace={self.namespace}", *arguments], stdin)

    def helm(self, command: str, *arguments: str) -> str:
        rendered = command in ("install", "upgrade", "template")
        if rendered and self.minor < MINIMUM:
            script = str(Path(__file__).parent / "old_server.py")
            arguments += (f"--post-renderer={sys.executable}", f"--post-renderer-args={script}")
        return self._run([str(helm()), f"--namespace={self.namespace}", command, *arguments])

    def bridged(self, manifests: tuple[Manifest, ...]) -> str:
        """Manifests as YAML, in a form that this server knows."""
        ready = json.loads(json.dumps(manifests))
        if self.minor < MINIMUM:
            ready = [bridge(manifest) for manifest in ready]
        return yaml.safe_dump_all(ready)

    def get(self, kinds: str, *arguments: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(
            self.kubectl("get", kinds, "--output=json", *arguments)
        )["items"]
        return items

    def names(self, kinds: str, selector: str) -> set[str]:
        return {
            f"{item['kind']}/{item['metadata']['name']}"
            for item in self.get(kinds, f"--selector={selector}")
        }

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"after {seconds:g} s still not: {what}")
            time.sleep(0.3)

    def _run(self, command: list[str], stdin: str | None = None) -> str:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )
        if done.returncode != 0:
            raise CommandFailed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout
