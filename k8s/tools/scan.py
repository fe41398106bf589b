"""Scan every profile of the chart, rendered, with checkov: `make chart-security`.

Checkov is installed once into a virtual environment of its own under .cache/, for its dependencies
are not the project's. What does not fit is left out with its reason: here, or as an annotation of
the resource (templates/_scans.tpl). Exit status 1 on a finding.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from fetch_helm import fetch

CHECKOV = "checkov==3.3.30"
ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "k8s" / "vase-sgl"
ENVIRONMENT = ROOT / ".cache" / "checkov"
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
    checkov = _install()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for profile, options in PROFILES.items():
            command = [helm, "template", "r", ".", *PINNED, *options]
            rendered = subprocess.run(command, cwd=CHART, capture_output=True, check=True)
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


def _install() -> Path:
    """The command `checkov`, installed on first use."""
    command = ENVIRONMENT / "bin" / "checkov"
    if not command.exists():
        print(f"installing {CHECKOV} into {ENVIRONMENT.relative_to(ROOT)}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", CHECKOV], check=True)
    return command


if __name__ == "__main__":
    sys.exit(main())
