"""Records to store, and hands on a store's database that the code itself does not have."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from vase_sgl.gateway.audit import Record, RecordStatus, Timings
from vase_sgl.gateway.seeds import SeedOrigin, Seeds
from vase_sgl.gateway.tenants import Retention, SeedPolicy
from vase_sgl.gateway.workers import CacheStats

RECORD = Record(
    record_id="0" * 32,
    tenant="alice",
    created_unix_micros=1_700_000_000_000_001,
    status=RecordStatus.COMPLETED,
    failure="",
    input_kind="text",
    prompt_token_ids=(1, 2, 2**31 - 1),
    sampling={"max_new_tokens": 5, "temperature": 0.1, "stop": ["é"], "sampling_seed": 2**63 - 1},
    eviction={"budget": 32, "window": 8, "policy": "random", "prompt": "evict", "seed": 2**63 - 1},
    seeds=Seeds(2**63 - 1, 0, SeedPolicy.CLIENT, 1, SeedOrigin.REQUEST_SEED, 2**63 - 1),
    sample_index=0,
    output_token_ids=(3, 4),
    text="né \x00\U0001f600",
    finish_reason="length",
    cache=CacheStats(5, 5, 1, 8, 40, "ff" * 8),
    round_digests=("ff" * 8,),
    fingerprint={"model": "m"},
    timings=Timings(0.1, None, 1 / 3),
    retention=Retention.FULL,
    prompt_tokens=3,
    completion_tokens=2,
)


def numbered(number: int, **fields: Any) -> Record:
    """A record with an id of its own."""
    return dataclasses.replace(RECORD, record_id=f"{number:032x}", **fields)


TRIGGERS = (
    *(("records", name) for name in ("records_are_final", "records_stay", "records_are_new")),
    *(("checkpoints", f"checkpoints_{name}") for name in ("are_final", "stay", "are_new")),
    *(("chains", f"chains_{name}") for name in ("grow", "stay", "are_new")),
)


async def execute(url: str, *statements: str) -> None:
    """Run SQL on a store as anyone could who has the database's password."""
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement))
    finally:
        await engine.dispose()


async def tamper(url: str, *statements: str) -> None:
    """Run SQL on a store as its owner, who can drop the triggers that keep it append-only."""
    on = (lambda table: f" ON {table}") if url.startswith("postgresql") else (lambda table: "")
    drops = [f"DROP TRIGGER IF EXISTS {name}{on(table)}" for table, name in TRIGGERS]
    await execute(url, *drops, *statements)
