"""The limit of open files: raised at the start, and no worker's fault once it is reached."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.gateway.running import run_gateway
from tests.gateway.scripted_worker import ScriptedWorker
from tests.gateway.test_serve_command import serve, target_of
from vase_sgl.client import NEVER, AsyncClient, RateLimited
from vase_sgl.gateway.breaker import BreakerState
from vase_sgl.gateway.config import GatewayConfig, load_config
from vase_sgl.gateway.errors import LimitExceeded
from vase_sgl.gateway.open_files import needed, out_of_files, raise_limit
from vase_sgl.gateway.worker_http import HttpWorker

_SOFT, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)


@contextmanager
def limit(soft: int) -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _HARD))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_SOFT, _HARD))


@contextmanager
def no_more_files() -> Iterator[None]:
    lowest_free = os.dup(0)
    os.close(lowest_free)
    with limit(min(lowest_free, 16)):
        yield


def config(**sections: object) -> GatewayConfig:
    return load_config(overrides={"worker": {"urls": ["http://w:1"]}, **sections})


async def test_a_gateway_out_of_files_blames_no_worker(tmp_path: Path) -> None:
    worker = {"health_interval_seconds": 60, "breaker": {"failures": 1}}
    async with run_gateway(tmp_path, worker=worker) as running:
        running.worker.token_seconds = 0.05
        fleet = running.gateway._fleet
        # A tenant that could not come back if its prompt were charged.
        key = running.add_tenant(
            "bob", roles=["generate", "audit"], limits={"tokens_per_minute": 10}
        )
        async with AsyncClient(running.target, key, retry=NEVER) as bob:
            await bob.capacity()
            # Two: the second has no connection to the worker that is left from other calls.
            streams = [running.client.generate("tell me", max_new_tokens=4000) for _ in range(2)]
            for stream in streams:
                await stream.started()
                await anext(aiter(stream))
            with no_more_files():
                with pytest.raises(RateLimited, match="limit of 16 open files"):
                    await bob.generate_once([7] * 20, max_new_tokens=2)
                await fleet.check_all()
                (status,) = fleet.statuses()
                assert status.ready and status.breaker is BreakerState.CLOSED
                assert len(running.worker.bodies) == 2
            for stream in streams:
                stream.cancel()
            assert len((await bob.generate_once([7] * 20, max_new_tokens=2)).token_ids) == 2
            # What reached no worker has no record, nor was the store asked for a file.
            assert [record.status async for record in bob.list_records()] == ["completed"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_connection_that_needs_a_file(host: str) -> None:
    """With a name it is the resolver that gets none, and says only that it failed."""
    async with ScriptedWorker() as worker:
        http = HttpWorker(worker.url.replace("127.0.0.1", host), stall_seconds=1)
        with no_more_files(), pytest.raises(LimitExceeded) as refused:
            await http.check_health()
        assert refused.value.reason == "files" and refused.value.retry_seconds
        await http.check_health()
        await http.close()


def test_what_else_fails_is_no_want_of_files() -> None:
    assert out_of_files(ConnectionRefusedError(111, "refused")) is None
    unknown = socket.gaierror(socket.EAI_NONAME, "no such name")
    of_uvloop = OSError(22, "Invalid argument")
    assert out_of_files(unknown) is out_of_files(of_uvloop) is None
    with no_more_files():
        assert out_of_files(unknown) is not None and out_of_files(of_uvloop) is not None
    machine = out_of_files(OSError(23, "Too many open files in system"))
    assert machine is not None and "of its machine" in str(machine)


def test_what_calls_need() -> None:
    assert needed(config()) == 2 * 1024 + 256
    assert needed(config(http={"port": 0})) == 4 * 1024 + 256
    assert needed(config(grpc={"max_concurrent_calls": 10})) == 2 * 10 + 256


def test_the_limit_is_raised_and_too_low_a_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with limit(300):
        raise_limit(config(grpc={"max_concurrent_calls": 10}))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == _HARD
    assert caplog.text == ""
    if _HARD != resource.RLIM_INFINITY:
        raise_limit(config(grpc={"max_concurrent_calls": _HARD}))
        assert f"may open {_HARD} files" in caplog.text
        assert f"can need {2 * _HARD + 256}" in caplog.text


async def test_serve_raises_its_limit(tmp_path: Path) -> None:
    async with ScriptedWorker() as worker:
        options = ("--worker-url", worker.url, "--grpc-port", "0", "--insecure-no-auth")
        with limit(min(_SOFT, 512)):
            async with serve(tmp_path, *options) as process:
                await target_of(process)
                assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (_HARD, _HARD)
