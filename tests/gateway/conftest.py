"""A running gateway for each test, and databases for the audit store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
import uvloop

from tests.gateway.postgres import postgres_server
from tests.gateway.running import Running, run_gateway
from vase_sgl.gateway import worker_answers

_numbers = itertools.count()


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that `vase-sgl serve` runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with run_gateway(tmp_path) as running:
        yield running


@pytest.fixture
def long_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of 30 kB may be, so that few of them fill what lies between worker and client."""
    monkeypatch.setattr(worker_answers, "MAX_TOKEN_CHARS", 2**15)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server, without a database's name. Mark the test xdist_group("postgres"),
    or every test process starts a server of its own."""
    with postgres_server() as url:
        yield url


@pytest.fixture
async def postgres_url(postgres: str) -> str:
    """URL of an empty PostgreSQL database."""
    name = f"audit{next(_numbers)}"
    connection = await asyncpg.connect(postgres.replace("+asyncpg", "") + "/postgres")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return f"{postgres}/{name}"


@pytest.fixture(
    params=["sqlite", pytest.param("postgresql", marks=pytest.mark.xdist_group("postgres"))]
)
def audit_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty audit store, on each kind of database."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite+aiosqlite:///{tmp_path / 'deep' / 'audit.sqlite3'}"
