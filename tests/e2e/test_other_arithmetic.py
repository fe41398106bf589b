"""Replays of the real model in the arithmetic that the other tests' worker does not have: float32,
and what a CPU without AVX-512 computes with. Beside each replay others are answered."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.connected import connected
from tests.e2e.worker_process import WorkerProcess
from vase_sgl.client import Message

pytestmark = [
    pytest.mark.xdist_group("worker"),
    pytest.mark.skipif("VASE_TEST_SLOW" not in os.environ, reason="set VASE_TEST_SLOW=1"),
]

PROMPT = [Message(role="user", content="Tell me about the sea.")]
REQUEST = {"max_new_tokens": 45, "temperature": 0.8, "ignore_eos": True}
BUDGET = {"budget": 40, "window": 8, "policy": "vase-attnv"}
_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture(
    params=[
        (("--dtype", "float32"), {}, {"dtype": "float32", "linear_tiles": "16-64-float32"}),
        ((), _AVX2, {"cpu_capability": "AVX2", "linear_tiles": "1-64-float32"}),
    ],
    ids=["float32", "avx2"],
)
def other_worker(
    request: pytest.FixtureRequest, model: Path, tmp_path: Path
) -> Iterator[WorkerProcess]:
    flags, env, fingerprint = request.param
    with WorkerProcess(model, tmp_path, *flags, **env) as process:
        assert fingerprint.items() <= process.state()["fingerprint"].items()
        yield process


async def test_a_replay_in_company_matches(other_worker: WorkerProcess, tmp_path: Path) -> None:
    async with connected(other_worker, tmp_path) as client:
        alone = await client.generate_once(PROMPT, seed=4, **REQUEST, **BUDGET)
        rounds = len(alone.result.round_digests)
        assert rounds >= 4
        replay = asyncio.create_task(client.replay(alone.request_id).verdict())
        others = [
            client.generate_once(PROMPT * (1 + seed), seed=seed, **REQUEST, **(BUDGET | budget))
            for seed, budget in enumerate(({}, {"policy": "vase-dkv"}, {"budget": 64}))
        ]
        stock = client.generate_once(PROMPT, seed=4, **REQUEST)
        await asyncio.gather(*others, stock)
        verdict = await replay
    assert verdict.outcome == "MATCH"
    assert (verdict.tokens_compared, verdict.rounds_compared) == (45, rounds)
