"""The script of `helm test`, as rendered, with the real command line against a real gateway."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.gateway.running import Running, run_gateway
from tests.gateway.test_transport import certificate
from tests.k8s.chart import Values, render
from tests.k8s.test_gateway_config import MUTUAL_TLS
from vase_sgl.client import Tls


async def run_script(
    running: Running, values: Values | None = None, files: dict[str, Path] | None = None
) -> tuple[int | None, str]:
    """Exit status and all output of the pod's script, pointed at the gateway.

    files: what is there instead of the Secrets' files, by their paths in the pod.
    """
    (container,) = render(values).one("Pod")["spec"]["containers"]
    given = {v["name"]: v["value"] for v in container["env"] if "value" in v}
    given |= {name: str(files[path]) for name, path in given.items() if path in (files or {})}
    assert given["VASE_TARGET"] == "r-vase-sgl-gateway.ns.svc:50051"
    environment = {
        **os.environ,
        **given,
        "VASE_TARGET": running.target,
        "VASE_API_KEY": running.key,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = await asyncio.create_subprocess_exec(
        *container["command"],
        *container["args"],
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_generates_and_replays(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as running:
        status, output = await run_script(running)
        assert status == 0, output
        assert "128 tokens" in output and "MATCH: 128 tokens" in output
        assert len(running.worker.bodies) == 2
        sent = running.worker.bodies[0]["sampling_params"]
        assert sent["custom_params"]["vase"]["budget"] == 64
        assert sent["custom_params"]["vase"]["window"] == 16


async def test_fails_when_the_replay_differs(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as running:

        async def diverge() -> None:
            while not [record async for record in running.client.list_records()]:
                await asyncio.sleep(0.01)
            running.worker.faults.other_token_at = 7

        spoiling = asyncio.create_task(diverge())
        status, output = await run_script(running)
        await spoiling
        assert status == 3, output
        assert "DIVERGED" in output


async def test_fails_when_nothing_is_evicted(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as running:
        status, output = await run_script(running, {"helmTest.maxNewTokens": 8})
        assert status != 0
        assert "nothing was evicted" in output


async def test_fails_without_a_worker(tmp_path: Path) -> None:
    async with run_gateway(tmp_path) as running:
        running.worker.faults.refuse_status = 503
        status, output = await run_script(running)
        assert status not in (0, None), output


def test_is_a_test_hook_and_can_be_left_out() -> None:
    annotations = render().one("Pod")["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "test"
    assert not render({"helmTest.enabled": False}).of("Pod")


def test_behind_tls_it_trusts_the_certificates_authority() -> None:
    values = {
        "gateway.tls.enabled": True,
        "gateway.tls.certManager.enabled": True,
        "gateway.tls.certManager.issuerRef.name": "ca",
    }
    spec = render(values).one("Pod")["spec"]
    variables = {v["name"]: v.get("value") for v in spec["containers"][0]["env"]}
    assert variables["VASE_CA_FILE"] == "/etc/vase-sgl/tls/ca.crt"
    (volume,) = (v for v in spec["volumes"] if v["name"] == "tls")
    assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]  # not the key


async def test_with_client_certificates_it_shows_that_of_the_probes(tmp_path: Path) -> None:
    spec = render(MUTUAL_TLS).one("Pod")["spec"]
    mounts = {m["name"]: m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
    (volume,) = (v for v in spec["volumes"] if v["name"] == "probe")
    assert volume["secret"]["secretName"] == "probe"
    cert, key = certificate(tmp_path)
    files = {
        f"{mounts['tls']}/tls.crt": cert,
        f"{mounts['probe']}/tls.crt": cert,
        f"{mounts['probe']}/tls.key": key,
    }
    known = Tls(*(file.read_bytes() for file in (cert, cert, key)))
    tls = {"certificate": cert, "key": key, "client_ca": cert}
    async with run_gateway(tmp_path, client_tls=known, tls=tls) as running:
        status, output = await run_script(running, MUTUAL_TLS, files)
        assert status == 0, output
        assert "MATCH: 128 tokens" in output


@pytest.mark.parametrize("name", ["apiKeySecret"])
def test_key_is_a_reference(name: str) -> None:
    (container,) = render({f"helmTest.{name}.name": "k"}).one("Pod")["spec"]["containers"]
    (key,) = (v for v in container["env"] if v["name"] == "VASE_API_KEY")
    assert key["valueFrom"]["secretKeyRef"] == {"name": "k", "key": "api-key"}
