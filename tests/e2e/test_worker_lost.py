"""One gateway, two real workers, one of which is lost in the middle of its streams."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.e2e.connected import started
from tests.e2e.worker_process import SECOND_KEY, WorkerProcess
from tests.gateway.running import until_ready
from vase_sgl.client import NEVER, AsyncClient, Message, Unavailable

pytestmark = pytest.mark.xdist_group("worker")

#: Long enough that no worker has answered before the other has begun, on a fast CPU too.
LONG = 120
PROMPT = [Message(role="user", content="Tell me about the sea.")]
REQUEST = {"budget": 32, "window": 8, "policy": "vase-attnv", "ignore_eos": True}


def test_a_worker_with_a_key(second_worker: WorkerProcess) -> None:
    for path in ("/server_info", "/generate", "/v1/models", "/v1/tokenize", "/abort_request"):
        assert httpx.post(second_worker.url + path, json={}).status_code == 401, path
    assert httpx.get(f"{second_worker.url}/health").status_code == 200
    second_worker.state()
    assert SECOND_KEY not in second_worker.log.read_text()


async def test_answers_of_a_lost_worker_fail_clearly_and_are_replayed_by_the_other(
    worker: WorkerProcess, second_worker: WorkerProcess, tmp_path: Path
) -> None:
    workers = [worker, second_worker]
    options = {"health_interval_seconds": 0.3, "api_key": SECOND_KEY}  # the first asks for none
    async with (
        started(workers, tmp_path, **options) as (gateway, key),
        AsyncClient(f"127.0.0.1:{gateway.port}", key, retry=NEVER) as client,
    ):
        await until_ready(client)
        await _lose_one(client, worker, second_worker)


async def _lose_one(
    client: AsyncClient, worker: WorkerProcess, second_worker: WorkerProcess
) -> None:
    while (await client.capacity()).total_slots < 2 * 4096:
        await asyncio.sleep(0.1)  # both are known
    before = [await _rounds(process) for process in (worker, second_worker)]
    complete = await asyncio.gather(
        *(
            client.generate_once(PROMPT, max_new_tokens=24, seed=seed, temperature=0.8, **REQUEST)
            for seed in range(4)
        )
    )
    after = [await _rounds(process) for process in (worker, second_worker)]
    assert all(now > then for now, then in zip(after, before, strict=True)), "both served"

    streams = [
        client.generate(PROMPT, max_new_tokens=LONG, seed=seed, temperature=0.8, **REQUEST)
        for seed in range(4)
    ]
    tokens: list[list[int]] = [[] for _ in streams]
    under_way = asyncio.Event()

    async def read(index: int) -> str:
        try:
            async for chunk in streams[index]:
                tokens[index] += chunk.token_ids
                if all(len(seen) > 10 for seen in tokens):
                    under_way.set()
        except Unavailable:
            return "lost"
        return "complete"

    reading = [asyncio.create_task(read(index)) for index in range(4)]
    await asyncio.wait_for(under_way.wait(), 60)
    second_worker.kill()
    outcomes = await asyncio.gather(*reading)
    assert sorted(set(outcomes)) == ["complete", "lost"]
    for index, outcome in enumerate(outcomes):
        record = await client.get_record(streams[index].request_id)
        assert list(record.output_token_ids[: len(tokens[index])]) == tokens[index]
        assert len(tokens[index]) == LONG if outcome == "complete" else len(tokens[index]) > 10
        assert record.status == ("completed" if outcome == "complete" else "failed")

    # What the lost worker had answered is replayed by the other one, bit for bit.
    verdicts = await asyncio.gather(
        *(client.replay(answer.request_id).verdict() for answer in complete)
    )
    for verdict in verdicts:
        assert verdict.outcome == "MATCH" and verdict.tokens_compared == 24
    again = await client.generate_once(PROMPT, max_new_tokens=5, **REQUEST)
    assert again.token_ids


async def _rounds(process: WorkerProcess) -> int:
    state = await asyncio.to_thread(process.state)  # the gateway runs in this loop
    return int(state["rounds"])
