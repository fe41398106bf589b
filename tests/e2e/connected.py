"""A gateway in front of real workers, and a client of it that may generate and replay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.e2e.worker_process import WorkerProcess
from tests.gateway.running import add_tenant, until_ready
from vase_sgl.client import AsyncClient
from vase_sgl.gateway.config import load_config
from vase_sgl.gateway.server import Gateway


@asynccontextmanager
async def started(
    workers: list[WorkerProcess], folder: Path, **options: Any
) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway, with its OpenAI-compatible door, and a tenant's key.

    `folder` gets the tenants and the records; `options` are keys of `worker`.
    """
    tenants_file = folder / "tenants.yaml"
    key = add_tenant(tenants_file, "alice", roles=["generate", "replay"])
    config = load_config(
        overrides={
            "listen": {"port": 0},
            "http": {"port": 0},
            "worker": {"urls": [worker.url for worker in workers], **options},
            "audit": {"url": f"sqlite+aiosqlite:///{folder / 'audit.sqlite3'}"},
            "tenants_file": tenants_file,
        }
    )
    gateway = await Gateway.start(config, lambda seconds: None)
    try:
        yield gateway, key
    finally:
        await gateway.stop()


@asynccontextmanager
async def connected(worker: WorkerProcess, folder: Path) -> AsyncIterator[AsyncClient]:
    """`folder` gets the tenants and the records."""
    async with (
        started([worker], folder) as (gateway, key),
        AsyncClient(f"127.0.0.1:{gateway.port}", key) as client,
    ):
        await until_ready(client)
        yield client
