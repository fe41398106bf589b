"""The documentation names values, profiles, alerts and files that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.gateway.audit_records import numbered
from tests.gateway.test_audit_store import problems
from tests.k8s.chart import CHART, NAMESPACE, RELEASE, ROOT, render, tool
from tests.k8s.manifests import check
from tests.k8s.test_monitoring import ALERTS
from vase_sgl.gateway.audit import AuditStore

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


def test_a_rotated_key_gets_into_every_secret_that_holds_it() -> None:
    install, rotate = (
        set(
            re.findall(
                r"create secret generic (\S+)", TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
            )
        )
        for title in ("Install", "Rotate secrets")
    )
    assert install and install <= rotate


async def test_the_backup_in_the_container_holds_what_is_in_the_wal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the image's working directory is the volume
    store = await AuditStore.open("sqlite+aiosqlite:///audit.sqlite3")
    await store.append(numbered(1))
    (script,) = re.findall(r'-- python3 -c "(.*?)"\n', TEXT, re.DOTALL)
    subprocess.run([sys.executable, "-c", script], check=True)
    await store.close()
    assert Path("backup.sqlite3").stat().st_mode & 0o777 == 0o600
    assert await problems("sqlite+aiosqlite:///backup.sqlite3") == {"alice": None}


def test_commands_on_tenants_name_the_file() -> None:
    """Without it they change the one of this machine, not the Secret's."""
    commands = re.findall(r"vase-sgl tenants \w+ [^`)\n]*", TEXT)
    assert len(commands) >= 4
    for command in commands:
        assert "--file tenants.yaml" in command, command


def test_an_upgrade_keeps_the_repositories_that_the_install_named() -> None:
    commands = {
        name: re.findall(rf"helm {name} (?:\\\n|.)*", TEXT) for name in ("install", "upgrade")
    }
    for command in commands["install"]:
        for part in ("gateway", "worker"):
            assert f"--set {part}.image.repository=" in command, command
    assert len(commands["upgrade"]) >= 5
    for command in commands["upgrade"]:
        assert "--reset-then-reuse-values" in command, command


def test_what_the_network_of_a_profile_needs_is_listed() -> None:
    profile = CHART / "values-multi-tenant.yaml"
    policy = yaml.safe_load(profile.read_text(encoding="utf-8"))["networkPolicy"]
    (row,) = (line for line in TEXT.splitlines() if line.startswith(f"| `{profile.name}`"))
    for client in policy["clients"]:
        for key, value in client["namespaceSelector"]["matchLabels"].items():
            assert f'`{key}: "{value}"`' in row
    for rule in policy["gatewayEgress"]:
        for peer in rule["to"]:
            (namespace,) = peer["namespaceSelector"]["matchLabels"].values()
            assert f"`{namespace}`" in row
        for port in rule["ports"]:
            assert str(port["port"]) in row


def test_every_alert_has_advice() -> None:
    assert set(re.findall(r"`(Vase[A-Za-z]+)`", TEXT)) == ALERTS


def test_the_example_certificate_names_the_workers_that_gateways_call() -> None:
    (example,) = (
        yaml.safe_load(block)
        for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
        if "kind: Certificate" in block
    )
    check(example | {"metadata": example["metadata"] | {"labels": {}}})
    secret = example["spec"]["secretName"]
    assert f"--set worker.tls.existingSecret={secret} " in TEXT
    names = [
        name.replace(".vase-sgl-", f".{RELEASE}-vase-sgl-").replace(".llm.", f".{NAMESPACE}.")
        for name in example["spec"]["dnsNames"]
    ]
    values = {"worker.tls.existingSecret": secret, "gateway.workerDiscovery": "list"}
    urls = render({**values, "canary.enabled": True}).gateway_config()["worker"]["urls"]
    assert len(urls) == 2
    for host in (urlsplit(url).hostname or "" for url in urls):
        assert any(fnmatch(host, name) for name in names), host


def test_every_profile_is_listed() -> None:
    profiles = {path.name for path in CHART.glob("values-*.yaml")}
    assert set(re.findall(r"`(values-[a-z0-9-]+\.yaml)`", TEXT)) == profiles
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(values-[a-z0-9-]+\.yaml)`", readme)) == profiles
