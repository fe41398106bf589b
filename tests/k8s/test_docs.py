"""The documentation names values, profiles, alerts and files that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.k8s.chart import CHART, ROOT, tool
from tests.k8s.test_monitoring import ALERTS

TEXT = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
VALUES = {
    value.path for value in tool("values_table").read_values((CHART / "values.yaml").read_text())
}
SECTIONS = {path.split(".")[0] for path in VALUES}


def named_values() -> Iterator[str]:
    for name in re.findall(r"`([a-zA-Z]+(?:\.[a-zA-Z]+)+)[`=]", TEXT):
        if name.split(".")[0] in SECTIONS:
            yield name
    yield from re.findall(r"--set ([a-zA-Z.]+)=", TEXT)


@pytest.mark.parametrize("name", sorted(set(named_values())))
def test_value_exists(name: str) -> None:
    assert name in VALUES or any(path.startswith(f"{name}.") for path in VALUES)


def test_every_alert_has_advice() -> None:
    assert set(re.findall(r"`(Vase[A-Za-z]+)`", TEXT)) == ALERTS


def test_every_profile_is_listed() -> None:
    profiles = {path.name for path in CHART.glob("values-*.yaml")}
    assert set(re.findall(r"`(values-[a-z0-9-]+\.yaml)`", TEXT)) == profiles
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(values-[a-z0-9-]+\.yaml)`", readme)) == profiles


@pytest.mark.parametrize("name", ["docs/kubernetes.md", "k8s/vase-sgl/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
