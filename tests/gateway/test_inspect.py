"""`inspect` through the gateway: who may, what the worker gets, and what a record knows of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client.test_commands import run
from tests.gateway.running import Running, run_gateway
from vase_sgl.client import NEVER, AsyncClient, InvalidRequest, PermissionError_
from vase_sgl.gateway.tenants import Role, Tenant

EVICT: dict[str, Any] = {"budget": 32, "window": 8, "max_new_tokens": 40, "inspect": True}


def vase_of(running: Running) -> dict[str, Any]:
    """What the worker got last."""
    vase: dict[str, Any] = running.worker.bodies[-1]["sampling_params"]["custom_params"]["vase"]
    return vase


async def inspector(running: Running) -> AsyncClient:
    """A tenant with the role."""
    key = running.add_tenant("inspector", roles=["generate", "replay", "inspect"])
    return AsyncClient(running.target, key, retry=NEVER)


async def test_the_worker_is_told_and_the_record_is_not(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, allow_inspect=True) as running, await inspector(running) as c:
        answer = await c.generate_once("tell me", **EVICT)
        assert vase_of(running)["inspect"] is True
        record = await c.get_record(answer.request_id)
        assert "inspect" not in str(record)
        assert (await c.replay(answer.request_id).verdict()).outcome == "MATCH"
        assert "inspect" not in vase_of(running)
        await c.generate_once("tell me", **EVICT | {"inspect": False})
        assert "inspect" not in vase_of(running)


def test_the_documented_roles_can_replay_what_they_inspect() -> None:
    """`vase-sgl generate` offers it; `--role` replaces the default roles."""
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`vase-sgl tenants add NAME (.*?)[`:]", page)
    default = Tenant.model_fields["roles"].default
    assert set(re.findall(r"--role (\w+)", command)) == {*default, Role.INSPECT}


async def test_who_may_not_is_told_why(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, allow_inspect=True) as running, await inspector(running) as c:
        with pytest.raises(PermissionError_, match="tenant alice lacks the role `inspect`"):
            await running.client.generate_once("a", **EVICT)
        with pytest.raises(InvalidRequest, match="without eviction everything is kept; set a b"):
            await c.generate_once("a", inspect=True)
        running.worker.can_inspect = False
        await running.gateway._fleet.check_all()
        with pytest.raises(InvalidRequest, match="start them with --vase-inspect-dir DIR, or"):
            await c.generate_once("a", **EVICT)
        assert running.worker.bodies == []


async def test_by_default_nobody_may(running: Running) -> None:
    async with await inspector(running) as client:
        with pytest.raises(PermissionError_, match="this gateway does not allow it; leave it out"):
            await client.generate_once("a", **EVICT)
    assert running.worker.bodies == []


async def test_over_http(tmp_path: Path) -> None:
    async with (
        run_gateway(tmp_path, allow_inspect=True, http={"port": 0}) as running,
        httpx.AsyncClient(base_url=running.http_url) as http,
    ):
        running.worker.default_eviction = {"budget": 32, "window": 8}
        await running.gateway._fleet.check_all()
        key = running.add_tenant("inspector", roles=["generate", "inspect"])

        async def complete(vase: object) -> httpx.Response:
            body = {"model": "scripted", "prompt": "a", "vase": vase}
            return await http.post(
                "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
            )

        for vase in ({"budget": 40, "window": 8, "inspect": True}, {"inspect": True}):
            assert (await complete(vase)).status_code == 200
            assert vase_of(running)["inspect"] is True
            assert vase_of(running)["budget"] == vase.get("budget", 32)
        answer = await complete({"budget": 40, "inspect": 1})
        assert answer.status_code == 400
        assert "vase.inspect: must be true or false" in answer.text


async def test_generate_inspect_names_the_next_command(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, allow_inspect=True) as running:
        key = running.add_tenant("inspector", roles=["generate", "inspect"])
        flags = ("--budget", "32", "--window", "8", "-n", "40", "--inspect", "--api-key", key)
        _, errors = await run(running, "generate", "tell me", *flags)
        request_id = running.worker.bodies[-1]["rid"]
        assert f"vase-sgl inspect {request_id} --dir DIR" in errors
