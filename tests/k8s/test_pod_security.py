"""Every pod of every profile keeps to Kubernetes' restricted profile, and to a little more."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.chart import PROFILES, Rendered, Values, render

CASES: list[tuple[str, Values]] = [
    *((profile, {}) for profile in PROFILES),
    ("multi-tenant", {"worker.multiNode.enabled": True, "worker.tensorParallelSize": 4}),
]


@pytest.fixture(params=CASES, ids=str)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    profile, values = request.param
    return render(values, profile)


def containers(rendered: Rendered) -> list[dict[str, Any]]:
    found = [c for _, pod in rendered.pods() for c in pod["containers"]]
    assert len(found) >= 3  # gateway, worker, test
    return found


def test_nothing_runs_as_root(rendered: Rendered) -> None:
    for _, pod in rendered.pods():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0 and security["runAsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "initContainers" not in pod
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_containers_cannot_gain_anything(rendered: Rendered) -> None:
    for container in containers(rendered):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_no_token_and_no_service_variables(rendered: Rendered) -> None:
    """A Service called vase-… would become a VASE_* variable, which the programs read."""
    for _, pod in rendered.pods():
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
    accounts = rendered.of("ServiceAccount")
    assert len(accounts) == 2
    assert all(account["automountServiceAccountToken"] is False for account in accounts)
    assert not [m for m in rendered.manifests if "rbac" in m["apiVersion"]]


def test_resources_are_bounded(rendered: Rendered) -> None:
    for container in containers(rendered):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][kind])
    for _, pod in rendered.pods():
        for volume in pod["volumes"]:
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"], volume["name"]


def test_secrets_come_by_reference_only(rendered: Rendered) -> None:
    assert not rendered.of("Secret")
    for container in containers(rendered):
        for variable in container["env"]:
            is_path = variable.get("value", "").startswith("sqlite+aiosqlite:////")
            if variable["name"].endswith(("KEY", "TOKEN", "URL", "PASSWORD")) and not is_path:
                assert set(variable["valueFrom"]) == {"secretKeyRef"}


def test_home_and_tmp_can_be_written(rendered: Rendered) -> None:
    for _, pod in rendered.pods():
        (container,) = pod["containers"]
        writable = {
            mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")
        }
        home = next(v["value"] for v in container["env"] if v["name"] == "HOME")
        assert {home, "/tmp"} <= writable


def test_every_mount_has_its_volume(rendered: Rendered) -> None:
    for _, pod in rendered.pods():
        (container,) = pod["containers"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
