"""docs/audit.md and docs/replay.md: their code and vectors are run."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from tests.gateway.audit_records import execute, numbered
from tests.gateway.test_audit_chain import cut_files, exported, without_beginning
from tests.gateway.test_audit_store import problems
from tests.gateway.test_seeds import MASTER, tenant
from vase_sgl.cli import build_app
from vase_sgl.gateway.audit import AuditStore, KeyRing, pruning, reading
from vase_sgl.gateway.seeds import SeedOrigin, Seeds, seeds_for

DOCS = Path(__file__).parents[2] / "docs"


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", (DOCS / "audit.md").read_text(), re.DOTALL)
    return str(found)


async def test_the_documented_verifier_finds_what_ours_finds(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'a.sqlite3'}"
    store = await AuditStore.open(url, keys=KeyRing({1: b"k" * 32}))
    for number in range(6):
        await store.append(numbered(number, tenant=("alice", "bob")[number % 2]))
    await store.close()
    unpruned = await exported(url)
    async with reading.opened(url) as engine:
        await pruning.prune(engine, "alice", before_unix_micros=2**60, by="me")
    store = await AuditStore.open(url)
    await store.append(numbered(7))
    await store.close()
    script, file = tmp_path / "verify.py", tmp_path / "export.jsonl"
    script.write_text(block("python"))

    def check(lines: list[str]) -> subprocess.CompletedProcess[str]:
        file.write_text("".join(f"{line}\n" for line in lines))
        command = [sys.executable, str(script), str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    lines = await exported(url)
    whole = check(lines)
    assert whole.returncode == 0, whole.stderr
    assert re.fullmatch(
        r"alice whole, head 4:[0-9a-f]{64}\nbob whole, head 3:[0-9a-f]{64}\n", whole.stdout
    )
    records = [n for n, line in enumerate(lines) if '"kind":"record"' in line]
    for broken in (
        lines[: records[1]] + lines[records[1] + 1 :],
        [*lines[: records[-1]], lines[records[-1]].replace("random", "rendom"), *lines[-2:]],
        [line.replace('"payload":"', '"payload":"AAAA') for line in lines],
        *cut_files(lines),
        without_beginning(unpruned, 2),
    ):
        assert check(broken).returncode == 1


async def test_the_documented_backup_holds_what_a_copy_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url, copy, backup = (
        f"sqlite+aiosqlite:///{name}.sqlite3" for name in ("audit", "copy", "audit-backup")
    )
    await (await AuditStore.open(url)).close()
    store = await AuditStore.open(url)
    await store.append(numbered(1))
    shutil.copy("audit.sqlite3", "copy.sqlite3")
    text = (DOCS / "audit.md").read_text()
    (statement,) = re.findall(r'^sqlite3 .*"(VACUUM .*?)"', text, re.MULTILINE)
    with closing(sqlite3.connect("audit.sqlite3")) as connection:
        connection.execute(statement)
    await store.append(numbered(2))
    await store.close()

    assert await problems(copy) == {}
    verified = await asyncio.to_thread(
        CliRunner().invoke, build_app(), ["audit", "verify", "--url", copy]
    )
    assert verified.exit_code == 1 and "holds no record, so nothing was" in verified.stderr

    content = Path("audit-backup.sqlite3").read_bytes()
    assert await problems(backup) == {"alice": None}
    async with reading.opened(backup) as engine, reading.snapshot(engine) as connection:
        await pruning.due(connection, "alice", 2**60)
    assert len(await exported(backup)) == 4
    assert Path("audit-backup.sqlite3").read_bytes() == content  # a checksum of it still fits
    restored = await AuditStore.open(backup)
    assert await restored.append(numbered(3)) == 2
    await restored.close()
    assert await problems(backup) == {"alice": None}
    with pytest.raises(DBAPIError, match="append-only"):
        await execute(backup, "DELETE FROM records")


@pytest.mark.xdist_group("postgres")
async def test_the_documented_roles_can_do_their_work_and_no_more(
    postgres: str, postgres_url: str
) -> None:
    await (await AuditStore.open(postgres_url, migrate=True)).close()
    owner = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
    await owner.execute(block("sql"))
    await owner.close()
    gateway, auditor, pruner = (
        postgres_url.replace("postgres@", f"vase_{role}@")
        for role in ("gateway", "auditor", "pruner")
    )
    store = await AuditStore.open(gateway)
    await asyncio.gather(*(store.append(numbered(n, created_unix_micros=n)) for n in range(1, 5)))
    assert await problems(auditor) == {"alice": None}
    async with reading.opened(pruner) as engine:
        assert (await pruning.prune(engine, "alice", before_unix_micros=3, by="p")).records == 2
    assert await store.append(numbered(9)) == 5
    await store.close()
    assert await problems(auditor) == {"alice": None}
    for url, statement in (
        (gateway, "DELETE FROM records"),
        (gateway, "UPDATE records SET entry = ''"),
        (gateway, "INSERT INTO checkpoints VALUES ('alice', 2, 5, '', '')"),
        (gateway, "DROP TABLE records"),
        (gateway, "ALTER TABLE records DISABLE TRIGGER ALL"),
        (auditor, "INSERT INTO chains VALUES ('eve', 0, '')"),
        (pruner, "UPDATE chains SET sequence = 99"),
        (pruner, "TRUNCATE records"),
    ):
        with pytest.raises(DBAPIError, match=r"permission denied|must be owner"):
            await execute(url, statement)
    with pytest.raises(DBAPIError, match="append-only"):
        await execute(pruner, "DELETE FROM records")


def test_the_documented_seed_vectors() -> None:
    text = (DOCS / "replay.md").read_text()
    rows = re.findall(r"^\| (sampling|eviction) \| (.+?) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for label, origin, index, expected in rows:
        if origin.startswith("request seed"):
            found = derived("client", seed=int(origin.split()[-1]), index=int(index))
        elif origin.startswith("request id"):
            found = derived("derived", request_id=origin.split("`")[1], index=int(index))
        else:
            found = derived("locked", index=int(index))
            assert found.origin is SeedOrigin.TENANT
        assert getattr(found, label) == int(expected)


def derived(
    policy: str, *, seed: int | None = None, request_id: str = "x", index: int = 0
) -> Seeds:
    return seeds_for(
        tenant(policy, MASTER), request_id=request_id, request_seed=seed, sample_index=index
    )
