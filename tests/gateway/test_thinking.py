"""Thoughts and answers are told apart at the OpenAI-compatible door, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.gateway.running import Running, run_gateway
from tests.gateway.test_openai import CHAT, client
from vase_sgl.gateway.openai.thoughts import MAX_BLANKS, Parts, Splitter, thought_tokens
from vase_sgl.gateway.workers import Thinking

MARKS = {"start": "<think>", "end": "</think>", "begun": False}
#: Markers cut by tokens, and what begins like one and is none.
PIECES = ("\n<th", "ink>a <", "b </", "thin c\n", "</thi", "nk>\n\n", "A <", " B</thin")
#: As many as may stand before a thought.
BLANKS = "\n" * MAX_BLANKS
RAW, REASONING, CONTENT = "".join(PIECES), "\na <b </thin c\n", "\n\nA < B</thin"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Running]:
    async with run_gateway(tmp_path, http={"port": 0}) as running:
        running.worker.thinking = MARKS
        running.worker.token_seconds = 0.005
        yield running


async def parts(door: Running, samples: int = 1, **options: Any) -> list[tuple[str | None, str]]:
    """Reasoning and content of each sample, whole and streamed alike."""
    call = {"model": "scripted", "messages": CHAT, "seed": 3, "n": samples, **options}
    async with client(door) as api:
        answer = await api.chat.completions.create(**call)
        streamed = [["", ""] for _ in range(samples)]
        async for chunk in await api.chat.completions.create(**call, stream=True):
            for choice in chunk.choices:
                delta: Any = choice.delta
                assert not (delta.reasoning_content and delta.content)
                streamed[choice.index][0] += delta.reasoning_content or ""
                streamed[choice.index][1] += delta.content or ""
    messages: list[Any] = [choice.message for choice in answer.choices]
    whole = [(message.reasoning_content, message.content) for message in messages]
    assert [(thought or "", content) for thought, content in whole] == [
        (thought, content) for thought, content in streamed
    ]
    return whole


async def test_markers_are_found_however_tokens_cut_them(door: Running) -> None:
    door.worker.pieces = PIECES
    (whole,) = await parts(door, max_tokens=len(PIECES))
    assert whole == (REASONING, CONTENT)


async def test_each_sample_has_a_thought_of_its_own(door: Running) -> None:
    door.worker.opening, door.worker.pieces = "<think>", ("a ", "b ", "</think>")
    found = await parts(door, samples=3, max_tokens=6)
    assert [reasoning for reasoning, _ in found] == ["a b "] * 3
    assert len({content for _, content in found}) == 3


@pytest.mark.parametrize(
    ("pieces", "begun", "found"),
    [
        (("a ", "b</think>", "c"), True, ("a b", "c")),
        (("<think>", "a</think>", "b"), True, ("a", "b")),  # some models repeat it
        (("a", "b", "</thi"), True, ("ab</thi", "")),
        (("<think>", "a", "b"), False, ("ab", "")),
        (("<think>", "</think>", "a"), False, (None, "a")),
        (("a", "<think>b", "</think>"), False, (None, "a<think>b</think>")),
        (("a", "</think>", "b"), False, (None, "a</think>b")),
        ((" ", "\n", "<thi"), False, (None, " \n<thi")),
        ((BLANKS, "<th", "ink>a</think>b"), False, (BLANKS + "a", "b")),
        ((BLANKS, "\n<th", "ink>a"), False, (None, BLANKS + "\n<think>a")),
    ],
)
async def test_where_a_thought_begins_and_ends(
    door: Running, pieces: tuple[str, ...], begun: bool, found: tuple[str | None, str]
) -> None:
    door.worker.pieces = pieces
    door.worker.thinking = {**MARKS, "begun": begun}
    assert await parts(door, max_tokens=len(pieces)) == [found]


def test_blanks_without_end_are_sent() -> None:
    splitter = Splitter(Thinking("<think>", "</think>", begun=False))
    assert splitter.take(BLANKS) == Parts()
    assert splitter.take("\n") == Parts(content=BLANKS + "\n")
    assert splitter.take("\n") == Parts(content="\n")


async def test_whoever_wants_it_gets_the_text_whole(door: Running) -> None:
    door.worker.pieces = PIECES
    call = {"max_tokens": len(PIECES)}
    assert await parts(door, **call, extra_body={"separate_reasoning": False}) == [(None, RAW)]
    door.worker.thinking = None
    assert await parts(door, **call) == [(None, RAW)]
    async with client(door) as api:
        completion = await api.completions.create(model="scripted", prompt="tell me", **call)
        assert completion.choices[0].text == RAW
        assert "reasoning_content" not in completion.choices[0].to_dict()
        with pytest.raises(openai.BadRequestError, match="separate_reasoning: not supported here"):
            await api.completions.create(
                model="scripted", prompt="tell me", extra_body={"separate_reasoning": True}
            )


async def test_records_replays_and_grpc_have_the_text_whole(door: Running) -> None:
    door.worker.pieces = PIECES
    async with client(door) as api:
        answer = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_tokens=len(PIECES), seed=3
        )
    record = await door.client.get_record(answer.id.removeprefix("chatcmpl-"))
    assert record.text == RAW
    assert answer.usage is not None and answer.usage.completion_tokens == len(PIECES)
    assert (await door.client.replay(record.record_id).verdict()).outcome == "MATCH"
    same = await door.client.generate_once(CHAT, max_new_tokens=len(PIECES), seed=3)
    assert same.text == RAW


async def test_usage_tells_the_tokens_of_thoughts(door: Running) -> None:
    door.worker.pieces = ("<think>", "a", "</thi", "nk>", "b")
    call: Any = {"model": "scripted", "messages": CHAT, "max_tokens": 5, "seed": 3, "n": 2}
    streamed = {**call, "stream": True, "stream_options": {"include_usage": True}}

    async def usage(**options: Any) -> list[dict[str, Any] | None]:
        async with client(door) as api:
            whole = await api.chat.completions.create(**call, **options)
            *_, last = [chunk async for chunk in await api.chat.completions.create(**streamed)]
        for counted in (whole.usage, last.usage):
            assert counted is not None and counted.completion_tokens == 10
        return [x.usage.to_dict().get("completion_tokens_details") for x in (whole, last)]

    assert await usage() == [None, None]  # of a worker that does not tell the end's tokens
    async with client(door) as api:
        answer = await api.chat.completions.create(**{**call, "n": 1})
    record = await door.client.get_record(answer.id.removeprefix("chatcmpl-"))
    door.worker.thinking = {**MARKS, "end_ids": list(record.output_token_ids[2:4])}
    assert await usage() == [None, None]  # the second sample draws other tokens
    call["n"] = streamed["n"] = 1
    door.worker.pieces += ("c",) * 5
    call["max_tokens"] = streamed["max_tokens"] = 10
    counted = {"reasoning_tokens": 4}
    assert await usage() == [counted, counted]
    whole_text = {"extra_body": {"separate_reasoning": False}}
    assert await usage(**whole_text) == [counted, counted]
    door.worker.thinking = None
    assert await usage() == [None, None]


@pytest.mark.parametrize(
    ("text", "token_ids", "begun", "tokens"),
    [
        ("<think>a</think>b", [1, 2, 7, 8, 3], False, 4),
        ("a</think>", [2, 7, 8], True, 3),
        ("</think>a", [7, 8, 2], True, 2),
        ("a b", [2, 3], True, 2),  # no end
        ("", [], True, 0),
        ("a</think>b", [2, 7, 8, 3], False, 0),  # no thought
        ("<think>a</think>b", [1, 7, 7, 8, 3, 7, 8], False, 4),
        ("<think>a</think>b", [1, 2, 7, 9, 3], False, None),  # the end in other tokens
        ("<think>a</think>b", [1, 2, 3, 7], False, None),
    ],
)
def test_tokens_of_a_thought(
    text: str, token_ids: list[int], begun: bool, tokens: int | None
) -> None:
    told = Thinking("<think>", "</think>", begun, end_ids=(7, 8))
    assert thought_tokens(text, tuple(token_ids), told) == tokens


async def test_a_stop_string_ends_a_thought(door: Running) -> None:
    door.worker.pieces = ("<think>a ", "b", " STO", "P c</think>")
    assert await parts(door, max_tokens=4, stop="STOP") == [("a b ", "")]
    assert await parts(door, max_tokens=4, stop="</think>") == [("a b STOP c", "")]


async def test_a_message_goes_back_with_what_it_was_thought_with(door: Running) -> None:
    door.worker.pieces = PIECES
    async with client(door) as api:
        answer = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_tokens=len(PIECES)
        )
        message: Any = answer.choices[0].message
        for held in (message, message.model_dump()):
            await api.chat.completions.create(
                model="scripted", messages=[*CHAT, held, *CHAT], max_tokens=1
            )
        with pytest.raises(openai.BadRequestError, match="only messages of the assistant") as error:
            await api.chat.completions.create(
                model="scripted", messages=[{**CHAT[0], "reasoning_content": "a"}]
            )
    assert error.value.param == "messages.0.reasoning_content"
    told = {"role": "assistant", "content": CONTENT, "reasoning_content": REASONING}
    assert door.worker.chats == [CHAT, [*CHAT, told, *CHAT], [*CHAT, told, *CHAT]]


async def test_an_answer_that_ended_within_its_thought_goes_back(door: Running) -> None:
    thought: Any = {"role": "assistant", "reasoning_content": REASONING}
    async with client(door) as api:
        for message in (thought, {**thought, "content": None}):
            await api.chat.completions.create(
                model="scripted", messages=[message, *CHAT], max_tokens=1
            )
        with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content: Field required"):
            empty: Any = {**thought, "reasoning_content": None}
            await api.chat.completions.create(model="scripted", messages=[empty, *CHAT])
    assert door.worker.chats == [[{**thought, "content": ""}, *CHAT]] * 2


async def test_a_long_thought_counts_as_part_of_the_prompt(door: Running) -> None:
    messages: Any = [{"role": "assistant", "content": "b", "reasoning_content": "a" * 2**20}]
    async with client(door) as api:
        with pytest.raises(openai.BadRequestError, match=f"the prompt has {2**20 + 10} bytes"):
            await api.chat.completions.create(model="scripted", messages=messages)


@pytest.mark.parametrize("field", ["content", "reasoning_content"])
async def test_half_a_surrogate_pair_is_no_text(door: Running, field: str) -> None:
    """JSON can name it, and UTF-8 has no bytes for it."""
    message = {"role": "assistant", "content": "b", "reasoning_content": "a", field: "\ud800"}
    body = json.dumps({"model": "scripted", "messages": [message]})
    headers = {"Authorization": f"Bearer {door.key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.post(f"{door.http_url}/v1/chat/completions", data=body) as answer,
    ):
        assert answer.status == 400
        assert "holds a character that is none" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize("thinking", ["<think>", {"start": ""}, {**MARKS, "end": ""}])
async def test_markers_that_are_none_are_not_understood(door: Running, thinking: Any) -> None:
    door.worker.thinking = thinking
    async with client(door) as api:
        with pytest.raises(openai.InternalServerError, match="cannot be understood"):
            await api.chat.completions.create(model="scripted", messages=CHAT, max_tokens=1)
