"""Whole load tests: Locust against a gateway over real sockets, checked against the audit store."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent import futures
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml

from tests.gateway.running import Running, run_gateway
from tests.gateway.test_transport import certificate
from tests.loadtest.headless import (
    ROOT,
    Locust,
    free_port,
    locust,
    read,
    recorded,
    slow,
)
from vase_sgl.client import Tls
from vase_sgl.rpc.v1.gateway_pb2 import DESCRIPTOR, GetCapacityRequest, GetCapacityResponse

FAST = ("--headless", "--only-summary", "--budget", "48", "--window", "16")


def slo(folder: Path, **content: Any) -> str:
    path = folder / "slo.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def tenants_file(folder: Path, *tenants: dict[str, Any]) -> str:
    path = folder / "load.yaml"
    path.write_text(yaml.safe_dump({"tenants": list(tenants)}))
    return str(path)


async def test_the_jobs_own_configuration_counts_what_the_gateway_recorded(
    running: Running, tmp_path: Path
) -> None:
    """The ConfigMap of the Kubernetes Job, shortened; its result comes on standard output."""
    config_map, _ = yaml.safe_load_all((ROOT / "loadtest/k8s/job.yaml").read_text())
    for name, content in config_map["data"].items():
        # How fast this machine is now is not the question.
        (tmp_path / name).write_text(content.replace("p95: 5000", "p95: 500000"))
    page = tmp_path / "report.html"
    run = await locust(
        *("--config", str(tmp_path / "loadtest.conf"), "--slo", str(tmp_path / "slo.yaml")),
        *("--host", running.target, "--run-time", "2s", "--users", "4", "--html", str(page)),
        VASE_API_KEY=running.key,
    )
    assert run.status == 0, run.stderr
    lines = run.stdout.splitlines()
    result = json.loads("\n".join(lines[lines.index("{") : lines.index("}") + 1]))
    found = result["all"]
    assert found["completed"] >= 4
    assert await recorded(running) == {"alice": {"completed": found["completed"]}}
    assert (found["failed"], found["rejected"], found["unfinished"]) == (0, 0, 0)
    assert found["output_tokens"] == 256 * found["completed"]
    assert found["prompt_tokens"] == 128 * found["completed"]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "queue_ms"):
        assert found[name]["count"] == found["completed"]
    assert 0 < found["ttft_ms"]["p50"] < found["e2e_ms"]["p50"]
    assert result["problems"] == [] and result["slo"]["passed"]
    assert result["gateway"]["fingerprint"]["model"] == "scripted"
    sent = [body["sampling_params"]["custom_params"]["vase"] for body in running.worker.bodies]
    assert {(vase["budget"], vase["window"]) for vase in sent} == {(128, 32)}
    assert all(kind in page.read_text() for kind in ("ttft", "tpot", "e2e", "queue"))
    assert running.key not in run.stdout + run.stderr


async def test_quiet_tenants_succeed_while_their_noisy_neighbour_is_refused(tmp_path: Path) -> None:
    """And the threshold that is missed is named, with exit status 3. All of it over mutual TLS."""
    cert, key = certificate(tmp_path)
    async with run_gateway(
        tmp_path,
        client_tls=Tls(cert.read_bytes(), cert.read_bytes(), key.read_bytes()),
        tls={"certificate": cert, "key": key, "client_ca": cert},
        worker={"max_in_flight": 4},
    ) as running:
        running.worker.token_seconds = 0.002
        noisy = running.add_tenant("bob", limits={"max_concurrent_requests": 1})
        result = tmp_path / "result.json"
        run = await locust(
            *(*FAST, "--host", running.target, "--scenario", "noisy-neighbour"),
            *("--users", "12", "--run-time", "2s", "--max-new-tokens", "30"),
            *("--prompt-tokens", "8", "--result", str(result)),
            *("--gateway-ca", str(cert), "--client-cert", str(cert), "--client-key", str(key)),
            "--tenants",
            tenants_file(
                tmp_path,
                {"name": "quiet", "key_env": "QUIET_KEY"},
                {"name": "noisy", "key_env": "NOISY_KEY", "weight": 5, "noisy": True},
            ),
            "--slo",
            slo(
                tmp_path,
                failed={"max": 0},
                tenants={"quiet": {"rejected": {"max": 0}}, "noisy": {"rejected": {"max": 0}}},
            ),
            QUIET_KEY=running.key,
            NOISY_KEY=noisy,
        )
        records = await recorded(running)
    found = read(result)
    quiet, loud = found["tenants"]["quiet"], found["tenants"]["noisy"]
    assert quiet["completed"] > 0 and loud["completed"] > 0
    assert (quiet["failed"], quiet["rejected"], quiet["unfinished"]) == (0, 0, 0)
    assert loud["rejected"] > 0 and loud["failed"] == loud["unfinished"] == 0
    assert found["all"]["failure_ratio"] == 0
    assert records == {
        "alice": {"completed": quiet["completed"]},
        "bob": {"completed": loud["completed"]},
    }
    assert run.status == 3, run.stderr
    missed = [line for line in run.stderr.splitlines() if "MISSED" in line]
    assert len(missed) == 1 and "rejected of tenant noisy" in missed[0]
    assert found["slo"]["passed"] is False


async def test_a_master_and_its_worker_lose_and_double_nothing(
    running: Running, tmp_path: Path
) -> None:
    """Calls still run for longer than the half second that Locust's master waits for reports.

    The clock of the worker is an hour ahead.
    """
    running.worker.token_seconds = 0.05
    port, result = str(free_port()), tmp_path / "result.json"
    shared = ("--headless", "--only-summary")
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nright = time.time\ntime.time = lambda: right() + 3600\n"
    )
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    begun = time.time()
    async with (
        Locust(
            *(*shared, "--worker", "--master-port", port),
            **{"VASE_API_KEY": running.key, "PYTHONPATH": path},
        ) as worker,
        Locust(
            *(*shared, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port),
            *("--expect-workers", "1", "--host", running.target, "--users", "4"),
            *("--scenario", "replay-mix", "--replay-share", "0.7", "--max-new-tokens", "24"),
            *("--budget", "48", "--window", "16", "--result", str(result)),
            VASE_API_KEY=running.key,
        ) as master,
    ):
        # The third call of one of the four users has begun.
        await until(lambda: len(running.worker.bodies) > 8)
        master.process.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(master.finished(), worker.finished())
    assert [end.status for end in ends] == [0, 0], ends
    document = read(result)
    found = document["all"]
    assert document["problems"] == []
    started = datetime.fromisoformat(document["started"]).timestamp()
    assert begun < started < started + document["seconds"] < time.time()
    assert await recorded(running) == {"alice": {"completed": found["completed"]}}
    replays = found["replays"]
    assert replays["MATCH"] > 0 and replays["DIVERGED"] == replays["INCOMPARABLE"] == 0
    assert found["replay_match_ratio"] == 1
    assert len(running.worker.bodies) == found["completed"] + replays["MATCH"]


async def test_a_replay_that_diverges_is_a_failure_of_the_test(
    running: Running, tmp_path: Path
) -> None:
    await running.client.generate_once("warm", max_new_tokens=1)
    result = tmp_path / "result.json"
    run = Locust(
        *(*FAST, "--host", running.target, "--result", str(result)),
        *("--scenario", "replay-mix", "--replay-share", "1", "--max-new-tokens", "30"),
        VASE_API_KEY=running.key,
    )
    async with run:
        await until(lambda: len(running.worker.bodies) > 3)
        running.worker.faults.other_token_at = 7
        sent = len(running.worker.bodies)
        await until(lambda: len(running.worker.bodies) > sent + 3)
        run.process.send_signal(signal.SIGTERM)
        ended = await run.finished()
    found = read(result)
    assert found["all"]["replays"]["MATCH"] > 0 and found["all"]["replays"]["DIVERGED"] > 0
    assert found["failures"] == {"default replay: DIVERGED": found["all"]["failed"]}
    assert ended.status == 1


async def test_calls_cut_by_sigterm_are_unfinished_here_and_aborted_there(
    running: Running, tmp_path: Path
) -> None:
    running.worker.token_seconds = 0.05
    result = tmp_path / "result.json"
    run = Locust(
        *(*FAST, "--host", running.target, "--users", "3", "--stop-timeout", "0"),
        *("--max-new-tokens", "1000", "--result", str(result)),
        VASE_API_KEY=running.key,
    )
    async with run:
        await until(lambda: running.worker.tokens_written > 3 and len(running.worker.running) == 3)
        run.process.send_signal(signal.SIGTERM)
        ended = await run.finished()
    assert ended.status == 1 and "no call was completed" in ended.stderr
    await running.worker.wait_for_abort_of(3)
    found = read(result)["all"]
    assert (found["completed"], found["unfinished"]) == (0, 3)
    assert 3 < found["output_tokens"] < 3000
    assert found["ttft_ms"]["count"] == 3 and found["tpot_ms"] is None
    assert await recorded(running) == {"alice": {"aborted": 3}}


async def test_a_gateway_that_stops_answering_misses_a_threshold(
    running: Running, tmp_path: Path
) -> None:
    """Nothing failed, and what was answered was fast."""
    result = tmp_path / "result.json"
    run = Locust(
        *(*FAST, "--host", running.target, "--users", "2", "--stop-timeout", "1"),
        *("--max-new-tokens", "20", "--result", str(result), "--slo"),
        slo(tmp_path, ttft_ms={"p99": 60000}, failed={"max": 0}, unfinished={"max": 0}),
        VASE_API_KEY=running.key,
    )
    async with run:
        await until(lambda: len(running.worker.bodies) > 4)
        running.worker.token_seconds = 1000
        await until(lambda: len(running.worker.running) == 2)
        run.process.send_signal(signal.SIGTERM)
        ended = await run.finished()
    found = read(result)
    assert ended.status == 3 and found["all"]["unfinished"] == 2
    assert sum(check.startswith("MISSED: unfinished") for check in found["slo"]["checks"]) == 1
    assert sum(check.startswith("kept") for check in found["slo"]["checks"]) == 2


async def test_calls_that_fail_after_their_first_token_count_in_ttft(
    running: Running, tmp_path: Path
) -> None:
    running.worker.faults.abort_after_tokens = 5
    running.worker.token_seconds = 0.02
    result = tmp_path / "result.json"
    run = await locust(
        *(*FAST, "--host", running.target, "--users", "2", "--run-time", "2s"),
        *("--max-new-tokens", "30", "--result", str(result)),
        VASE_API_KEY=running.key,
    )
    assert run.status == 1, run.stderr
    found = read(result)["all"]
    assert found["completed"] == 0 < found["failed"]
    assert found["ttft_ms"]["count"] == found["failed"]
    assert found["prompt_tokens"] == 0 and found["e2e_ms"] is None


async def test_a_conversation_that_fails_is_not_gone_on_with(
    running: Running, tmp_path: Path
) -> None:
    """Its answers are longer as text than the tokens asked for: every second turn is too long."""
    running.worker.opening = "and " * 100
    key = running.add_tenant("bob", limits={"max_prompt_tokens": 100})
    result = tmp_path / "result.json"
    run = await locust(
        *(*FAST, "--host", running.target, "--users", "1", "--run-time", "3s"),
        *("--scenario", "agent-loop", "--prompt-tokens", "8", "--max-new-tokens", "4"),
        *("--turns", "3", "--result", str(result)),
        VASE_API_KEY=key,
    )
    assert run.status == 1, run.stderr
    found = read(result)
    assert 2 <= found["all"]["completed"] <= found["all"]["failed"] + 1
    (failure,) = found["failures"]
    assert "above the ceiling of tenant bob, 100" in failure


async def test_a_gateway_that_is_gone_when_the_test_starts_is_no_success(tmp_path: Path) -> None:
    limits = {"context_length": 8192, "max_new_tokens": 4096, "max_prompt_tokens": 4096}
    answers = [GetCapacityResponse(policies=["full"], **limits)]

    def capacity(request: GetCapacityRequest, context: grpc.ServicerContext) -> GetCapacityResponse:
        if not answers:
            context.abort(grpc.StatusCode.UNAVAILABLE, "no worker is ready")
        return answers.pop()

    handler = grpc.unary_unary_rpc_method_handler(
        capacity,
        request_deserializer=GetCapacityRequest.FromString,
        response_serializer=GetCapacityResponse.SerializeToString,
    )
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service = DESCRIPTOR.services_by_name["VaseGateway"].full_name
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"GetCapacity": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        run = await locust(
            *("--headless", "--only-summary", "--host", f"127.0.0.1:{port}", "--run-time", "2s"),
            *("--slo", slo(tmp_path, completed={"min": 1})),
        )
    finally:
        server.stop(0)
    assert answers == []
    assert run.status == 2, run.stderr
    assert "no worker is ready" in run.stderr and "no call was sent" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--scenaro", "steady"), "unrecognized arguments"),
        (("--budget", "8"), "budget 8 must be greater than window"),
    ],
)
async def test_bad_options_end_before_the_first_call(
    running: Running, arguments: tuple[str, ...], complaint: str
) -> None:
    run = await locust("--headless", "--host", running.target, *arguments, VASE_API_KEY=running.key)
    assert run.status == 2
    assert complaint in run.stderr
    assert "Traceback" not in run.stderr
    assert running.worker.bodies == []


@slow
async def test_a_lost_worker_is_reported(running: Running, tmp_path: Path) -> None:
    port, result = str(free_port()), tmp_path / "result.json"
    shared = ("--headless", "--only-summary")
    connect = ("--worker", "--master-port", port)
    running.worker.token_seconds = 0.01
    async with (
        Locust(*shared, *connect, VASE_API_KEY=running.key) as lost,
        Locust(*shared, *connect, VASE_API_KEY=running.key) as other,
        Locust(
            *(*shared, "--master", "--master-bind-port", port, "--expect-workers", "2"),
            *("--host", running.target, "--users", "4", "--run-time", "15s"),
            *("--max-new-tokens", "30", "--result", str(result)),
            VASE_API_KEY=running.key,
        ) as master,
    ):
        await until(lambda: len(running.worker.bodies) > 8)
        lost.process.kill()
        ended, _ = await asyncio.gather(master.finished(), other.finished())
    assert ended.status == 1
    (problem,) = read(result)["problems"]
    assert "was lost: its last calls are not in the report" in problem
    (records,) = (await recorded(running)).values()
    assert 0 < read(result)["all"]["completed"] <= records["completed"]


@slow
async def test_the_web_page_runs_tests_and_refuses_bad_options(
    running: Running, tmp_path: Path
) -> None:
    port, result = free_port(), tmp_path / "result.json"
    page = f"http://127.0.0.1:{port}"
    form = {"user_count": "2", "spawn_rate": "2", "run_time": "2s", "scenario": "ramp"}
    async with (
        aiohttp.ClientSession() as browser,
        Locust(
            *("--web-host", "127.0.0.1", "--web-port", str(port), "--host", running.target),
            *("--result", str(result)),
            VASE_API_KEY=running.key,
        ) as web,
    ):

        async def state() -> str:
            async with browser.get(page + "/stats/requests") as answer:
                return str((await answer.json())["state"])

        async def swarm(**options: str) -> None:
            async with browser.post(page + "/swarm", data={**form, **options}) as answer:
                assert (await answer.json())["success"]

        async with asyncio.timeout(30):
            while True:
                try:
                    await state()
                    break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.1)
            await swarm(budget="48", window="16", max_new_tokens="20")
            while await state() != "stopped":
                await asyncio.sleep(0.1)
        sent = len(running.worker.bodies)
        await swarm(budget="48", window="64", max_new_tokens="20")
        await asyncio.sleep(2)
        web.process.send_signal(signal.SIGTERM)
        ended = await web.finished()
    assert "budget 48 must be greater than window 64" in ended.stderr
    assert sent == len(running.worker.bodies) > 4
    document = read(result)
    assert (document["options"]["window"], document["options"]["scenario"]) == (16, "ramp")
    assert await recorded(running) == {"alice": {"completed": document["all"]["completed"]}}


def test_this_process_is_not_patched() -> None:
    assert "gevent.monkey" not in sys.modules
    assert "locust" not in sys.modules


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)
