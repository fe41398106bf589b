"""A gateway in front of a scripted worker, over real sockets and a real SQLite file."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.client import NEVER, AsyncClient, Tls, Unavailable
from vase_sgl.gateway import tenants
from vase_sgl.gateway.audit import AuditStore
from vase_sgl.gateway.config import load_config
from vase_sgl.gateway.server import Gateway


@dataclasses.dataclass
class Running:
    """Handles on everything that runs. `client` is tenant `alice`, who may do all but `admin`."""

    worker: ScriptedWorker
    gateway: Gateway
    client: AsyncClient
    tenants_file: Path
    audit_url: str
    key: str

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.http_port}"

    def add_tenant(self, name: str, **fields: Any) -> str:
        """Add a tenant to the file of the running gateway; its API key."""
        return add_tenant(self.tenants_file, name, **fields)


def add_tenant(file: Path, name: str, **fields: Any) -> str:
    """Add a tenant to a file; its API key."""
    content = tenants.load(file) if file.exists() else tenants.TenantFile()
    tenant = tenants.Tenant.model_validate(
        {"name": name, "master_secrets": [tenants.new_master_secret()], **fields}
    )
    tenant, key = tenants.with_new_key(tenant)
    tenants.save(file, tenants.TenantFile(tenants=(*content.tenants, tenant)))
    return key


_empty_store: list[bytes] = []


async def empty_store() -> bytes:
    """A SQLite audit store with its tables: made once, since migrating takes a while."""
    if not _empty_store:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "audit.sqlite3"
            await (await AuditStore.open(f"sqlite+aiosqlite:///{file}")).close()
            _empty_store.append(file.read_bytes())
    return _empty_store[0]


@asynccontextmanager
async def run_gateway(
    folder: Path, client_tls: Tls | None = None, **config: Any
) -> AsyncIterator[Running]:
    """Start worker and gateway, wait until ready; `config` overrides configuration keys.

    Keys of `worker` are added to the scripted worker's own.
    """
    tenants_file = folder / "tenants.yaml"
    key = add_tenant(tenants_file, "alice", roles=["generate", "replay", "audit"])
    store = folder / "audit.sqlite3"
    if not store.exists():
        store.write_bytes(await empty_store())
    audit_url = f"sqlite+aiosqlite:///{store}"
    async with ScriptedWorker() as worker:
        settings = load_config(
            overrides={
                "listen": {"port": 0},
                "worker": {
                    "urls": [worker.url],
                    "health_interval_seconds": 0.1,
                    **config.pop("worker", {}),
                },
                "audit": {"url": audit_url},
                "tenants_file": tenants_file,
                "drain_seconds": 2,
                **config,
            }
        )
        gateway = await Gateway.start(settings, lambda seconds: None)
        client = AsyncClient(f"127.0.0.1:{gateway.port}", key, tls=client_tls, retry=NEVER)
        try:
            await until_ready(client)
            yield Running(worker, gateway, client, tenants_file, audit_url, key)
        finally:
            await client.close()
            await gateway.stop()


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def until_ready(client: AsyncClient) -> None:
    """Wait until the gateway has a worker."""
    async with asyncio.timeout(10):
        while True:
            try:
                await client.capacity()
            except Unavailable:
                await asyncio.sleep(0.02)
            else:
                return
