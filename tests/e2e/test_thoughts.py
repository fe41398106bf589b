"""Thoughts of a real model, told apart by a gateway as by SGLang, and read by OpenAI's client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tests.e2e.connected import started
from tests.e2e.worker_process import SECOND_KEY, WorkerProcess
from tests.gateway.running import until_ready
from vase_sgl.client import AsyncClient

pytestmark = pytest.mark.xdist_group("worker")

THOUGHT, CONTENT = "\nA name for much water.", "It is salt water."
TEXT = f"<think>{THOUGHT}</think>{CONTENT}"
#: The template opens the second one's thought, and the model that of the first.
QUESTIONS = ("What is the sea?", "What is the sea? /think")


def chat(question: str) -> list[Any]:
    """After four turns that are equal the model says the same again, by a wide margin."""
    asked = {"role": "user", "content": question}
    answered = {"role": "assistant", "content": CONTENT, "reasoning_content": THOUGHT}
    return [asked, answered] * 4 + [asked]


async def told(url: str, key: str) -> list[tuple[str, list[Any]]]:
    """To each question the whole answer's id; its thought and content, whole and streamed; and how
    many tokens the thought is said to have."""
    plain = DefaultAsyncHttpxClient(verify=False)  # it would load every authority
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, http_client=plain) as api:
        model = (await api.models.list()).data[0].id

        async def ask(question: str) -> tuple[str, list[Any]]:
            call: Any = {"model": model, "messages": chat(question), "max_tokens": 30}
            answer, stream = await asyncio.gather(
                api.chat.completions.create(**call, temperature=0),
                api.chat.completions.create(**call, temperature=0, stream=True),
            )
            message = answer.choices[0].message
            deltas = [chunk.choices[0].delta async for chunk in stream]
            streamed = (
                "".join(delta.reasoning_content or "" for delta in deltas),
                "".join(delta.content or "" for delta in deltas),
            )
            counted = answer.usage.completion_tokens_details.reasoning_tokens
            return answer.id, [(message.reasoning_content, message.content), streamed, counted]

        return await asyncio.gather(*map(ask, QUESTIONS))


async def test_thoughts_are_told_apart_as_sglang_does(
    second_worker: WorkerProcess, tmp_path: Path
) -> None:
    async with (
        started([second_worker], tmp_path, api_key=SECOND_KEY) as (gateway, key),
        AsyncClient(f"127.0.0.1:{gateway.port}", key) as client,
    ):
        await until_ready(client)
        answers = await told(f"http://127.0.0.1:{gateway.http_port}", key)
        ids = [id_.removeprefix("chatcmpl-") for id_, _ in answers]
        records = [await client.get_record(id_) for id_ in ids]
    parts = [(THOUGHT, CONTENT), (THOUGHT.lstrip(), CONTENT)]
    assert [found[:2] for _, found in answers] == [[part] * 2 for part in parts]
    assert all(
        0 < found[2] < len(r.output_token_ids)
        for (_, found), r in zip(answers, records, strict=True)
    )
    assert [record.text for record in records] == [TEXT, TEXT.removeprefix("<think>\n")]
    by_sglang = await told(second_worker.url, SECOND_KEY)
    assert [found for _, found in by_sglang] == [found for _, found in answers]
