"""SDK -> gRPC -> gateway -> HTTP -> SGLang, with a real model and a real socket at every step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.connected import connected
from tests.e2e.worker_process import WorkerProcess
from vase_sgl.client import AsyncClient, DeadlineExceeded, InvalidRequest, Message

pytestmark = pytest.mark.xdist_group("worker")  # shares one worker process

PROMPT = [Message(role="user", content="Tell me about the sea.")]


@pytest.fixture
async def client(worker: WorkerProcess, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    async with connected(worker, tmp_path) as found:
        yield found


async def test_stream_record_and_replay(client: AsyncClient) -> None:
    stream = client.generate(
        PROMPT,
        max_new_tokens=48,
        budget=40,
        window=8,
        policy="vase-attnv",
        seed=4,
        temperature=0.8,
        ignore_eos=True,
    )
    tokens, physical, rounds = [], [], []
    async for chunk in stream:
        tokens += chunk.token_ids
        assert chunk.cache is not None
        physical.append(chunk.cache.physical_length)
        rounds.append(chunk.cache.rounds)
    result = stream.result
    assert len(tokens) == 48 == result.usage.completion_tokens
    assert max(physical) <= 48
    assert max(rounds) >= 4 and rounds == sorted(rounds)
    assert result.cache is not None and result.cache.reserved_slots == 48
    assert len(result.round_digests) == result.cache.rounds
    assert result.full_kv_slots >= 48 + result.usage.prompt_tokens - 1

    record = await client.get_record(stream.request_id)
    assert list(record.output_token_ids) == tokens
    assert record.round_digests == result.round_digests
    assert record.fingerprint["sglang"] == "0.5.23"

    verdict = await client.replay(record.record_id).verdict()
    assert verdict.outcome == "MATCH"
    assert verdict.tokens_compared == 48
    assert verdict.rounds_compared == len(result.round_digests)


async def test_cancelling_frees_the_slots(client: AsyncClient, worker: WorkerProcess) -> None:
    stream = client.generate(
        PROMPT, max_new_tokens=5000, budget=48, window=16, ignore_eos=True, temperature=0
    )
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 10:
            break
    stream.cancel()
    await asyncio.to_thread(worker.wait_until_idle)  # the gateway runs in this loop


async def test_a_deadline_frees_the_slots(client: AsyncClient, worker: WorkerProcess) -> None:
    stream = client.generate(
        PROMPT,
        max_new_tokens=5000,
        budget=48,
        window=16,
        ignore_eos=True,
        temperature=0,
        timeout=2,
    )
    with pytest.raises(DeadlineExceeded):
        async for _ in stream:
            pass
    await asyncio.to_thread(worker.wait_until_idle)  # the gateway runs in this loop


async def test_the_workers_ceiling_reaches_the_client(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="budget"):
        await client.generate_once(PROMPT, max_new_tokens=5, budget=50000, window=16)
    with pytest.raises(InvalidRequest, match="stop_token_ids: must be tokens of the model"):
        await client.generate_once(PROMPT, max_new_tokens=5, stop_token_ids=[10**6])
    assert (await client.generate_once(PROMPT, max_new_tokens=5)).token_ids
