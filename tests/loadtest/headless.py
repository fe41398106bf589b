"""Headless Locust in processes of its own: importing it here would patch this one for gevent."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import Running
from tests.gateway.test_audit_store import problems
from vase_sgl.gateway.audit import AuditStore

ROOT = Path(__file__).parents[2]

slow = pytest.mark.skipif("VASE_TEST_SLOW" not in os.environ, reason="set VASE_TEST_SLOW=1")


@dataclasses.dataclass
class Finished:
    """How a Locust process ended."""

    status: int
    stdout: str
    stderr: str


class Locust:
    """A running `python -m loadtest`; `async with`, killed at the end if it still runs."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._arguments = arguments
        self._environment = os.environ | environment
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Locust:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest", *self._arguments),
            cwd=ROOT,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def finished(self, seconds: float = 120) -> Finished:
        """Wait for its end."""
        async with asyncio.timeout(seconds):
            stdout, stderr = await self.process.communicate()
        assert self.process.returncode is not None
        return Finished(self.process.returncode, stdout.decode(), stderr.decode())


async def locust(*arguments: str, **environment: str) -> Finished:
    """Run Locust to its end."""
    async with Locust(*arguments, **environment) as running:
        return await running.finished()


def read(path: Path) -> dict[str, Any]:
    """A result."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


async def recorded(running: Running) -> dict[str, Counter[str]]:
    """Records in the audit store by tenant and status; each chain is whole, each id its own."""
    store = await AuditStore.open(running.audit_url)
    try:
        found: dict[str, Counter[str]] = {}
        assert set((await problems(running.audit_url)).values()) <= {None}
        for tenant, count in (await store.tenants()).items():
            stored = await store.latest(tenant, before=None, count=count + 1)
            assert len({entry.record_id for entry in stored}) == count
            found[tenant] = Counter(entry.status for entry in stored)
        return found
    finally:
        await store.close()


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
