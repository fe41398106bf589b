"""What helm prints after an install: commands that name what is there, warnings of what lacks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.k8s.chart import CHART, NAMESPACE, PROFILES, RELEASE, Values, options, render, run_helm

#: helm prints notes only where it installs; as a manifest they can be had without a cluster.
AS_MANIFEST = """kind: Notes
text: {{ include (print .Template.BasePath "/NOTES.txt") . | quote }}
"""


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("chart") / CHART.name
    shutil.copytree(CHART, copy)
    (copy / "templates" / "notes.yaml").write_text(AS_MANIFEST, encoding="utf-8")
    return copy


def notes(chart: Path, values: Values | None = None, profile: str = "defaults") -> str:
    done = run_helm(
        "template",
        RELEASE,
        str(chart),
        f"--namespace={NAMESPACE}",
        "--show-only=templates/notes.yaml",
        *options(values, profile),
    )
    assert done.returncode == 0, done.stderr
    text: str = yaml.safe_load(done.stdout)["text"]
    return text


@pytest.mark.parametrize("profile", PROFILES)
def test_commands_name_what_is_there(chart: Path, profile: str) -> None:
    text, rendered = notes(chart, profile=profile), render(profile=profile)
    commands = re.findall(r"^  (?:kubectl|helm) (.*)$", text, re.MULTILINE)
    assert all(command.startswith(f"-n {NAMESPACE} ") for command in commands)

    (pod,) = re.findall(r" logs (\S+)-0 -f", text)
    assert pod in {worker["metadata"]["name"] for worker in rendered.of("StatefulSet")}
    services = {service["metadata"]["name"]: service for service in rendered.of("Service")}
    host, port = re.findall(rf" at (\S+)\.{NAMESPACE}\.svc:(\d+)", text)[0]
    assert int(port) in [one["port"] for one in services[host]["spec"]["ports"]]
    for name in re.findall(r"port-forward service/(\S+)", text):
        assert name == host
    assert rendered.one("Pod")["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert f"helm -n {NAMESPACE} test {RELEASE} --logs" in text


@pytest.mark.parametrize(
    ("without", "with_it", "line"),
    [
        ({}, {"gateway.audit.sqlite.persistent": False}, "gateway.audit.sqlite.persistent"),
        (
            {"worker.eviction.default": {"budget": 2048, "window": 64}},
            {},
            "worker.eviction.default",
        ),
        ({}, {"networkPolicy.enabled": False}, "worker.apiKeySecret.name"),
        (
            {"networkPolicy.enabled": False, "worker.apiKeySecret.name": "key"},
            {"networkPolicy.enabled": False},
            "worker.apiKeySecret.name",
        ),
        ({"helmTest.enabled": False}, {}, "helm -n"),
        ({"gateway.tls.enabled": True, "gateway.tls.existingSecret": "tls"}, {}, "port-forward"),
    ],
)
def test_line_is_there_when_it_applies(
    chart: Path, without: Values, with_it: Values, line: str
) -> None:
    assert line in notes(chart, with_it)
    assert line not in notes(chart, without)
