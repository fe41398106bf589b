"""Scan every profile of the chart, rendered, with checkov: `make chart-security`.

Checkov is installed once into a virtual environment of its own under .cache/, for its dependencies
are not the project's. What does not fit is left out with its reason: here, or as an annotation of
the resource (templates/_scans.tpl). Exit status 1 on a finding.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from fetch_helm import fetch
from own_environment import ROOT, command

CHECKOV = "checkov==3.3.30"
CHART = ROOT / "k8s" / "vase-sgl"
PROFILES = {
    "cpu-demo": ["--values=values-cpu-demo.yaml"],
    "h100": ["--values=values-h100.yaml"],
    "multi-tenant": ["--values=values-h100.yaml", "--values=values-multi-tenant.yaml"],
}
#: As in a real installation, whose images are pinned.
PINNED = [f"--set={part}.image.digest=sha256:{'0' * 64}" for part in ("gateway", "worker")]
#: Checks that fit nowhere, and why.
SKIPPED = {"CKV_K8S_21": "manifests name no namespace: helm installs them into the release's"}


def main() -> int:
    helm = fetch() / "helm"
    checkov = command("checkov", CHECKOV)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for profile, options in PROFILES.items():
            template = [helm, "template", "r", ".", *PINNED, *options]
            rendered = subprocess.run(template, cwd=CHART, capture_output=True, check=True)
            file = Path(temporary) / f"{profile}.yaml"
            file.write_bytes(rendered.stdout)
            print(f"== {profile}", flush=True)
            scan = [checkov, "--file", file, "--framework", "kubernetes", "--compact", "--quiet"]
            scan += ["--skip-download"]
            scan += ["--skip-check", ",".join(SKIPPED)]
            failed |= subprocess.run(scan, check=False).returncode != 0
    for check, reason in SKIPPED.items():
        print(f"left out: {check}: {reason}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
