"""A worker tokenizes beside its event loop, long prompts apart from short ones."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Response
from sglang.srt.entrypoints.openai.protocol import TokenizeRequest
from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingTokenize

from vase_sgl.engine import tokenizing
from vase_sgl.short_prompt import SHORT_PROMPT

CONTEXT = 5
LONG = "a" * (SHORT_PROMPT + 1)


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has one event loop, and each test another."""
    monkeypatch.setattr(tokenizing, "_short", asyncio.Lock())
    monkeypatch.setattr(tokenizing, "_long", asyncio.Lock())


class Tokenizer:
    """One token, the text's length, or as many as it is told. Long texts take as long as it says.

    seen: the lengths, as they come.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.tokens: list[int] | None = None
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Event()
        self.running = self.most_running = 0

    def encode(self, text: str, **options: Any) -> list[int]:
        self.seen.append(len(text))
        if len(text) > SHORT_PROMPT:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            self.begun.release()
            assert self.may_end.wait(10)
            self.running -= 1
        return self.tokens or [len(text)]

    async def has_begun(self) -> None:
        # Were it on this loop, nobody would come here.
        assert await asyncio.to_thread(self.begun.acquire, timeout=10)


class Caller:
    """Stands where the HTTP request is."""

    def __init__(self) -> None:
        self.left = False

    async def is_disconnected(self) -> bool:
        return self.left


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


def tokenize(tokenizer: Tokenizer, prompt: str, caller: Caller | None = None) -> Any:
    """The task of one call."""
    serving = OpenAIServingTokenize.__new__(OpenAIServingTokenize)
    serving.tokenizer_manager = SimpleNamespace(  # type: ignore[assignment]
        tokenizer=tokenizer, model_config=SimpleNamespace(context_len=CONTEXT)
    )
    request = TokenizeRequest(model="m", prompt=prompt)
    caller = caller or Caller()
    return asyncio.create_task(
        serving._handle_non_streaming_request(request, request, caller)  # type: ignore[arg-type]
    )


def content(response: Response) -> Any:
    return json.loads(bytes(response.body))


async def test_the_loop_and_short_prompts_go_on_while_long_ones_are_tokenized(
    tokenizer: Tokenizer,
) -> None:
    longs = [tokenize(tokenizer, LONG + "a" * n) for n in range(4)]
    await tokenizer.has_begun()
    shorts = await asyncio.gather(*(tokenize(tokenizer, "a" * n) for n in range(1, 4)))
    assert [content(answer)["tokens"] for answer in shorts] == [[1], [2], [3]]
    tokenizer.may_end.set()
    answers = await asyncio.gather(*longs)
    assert [content(answer)["tokens"] for answer in answers] == [[len(LONG) + n] for n in range(4)]
    assert tokenizer.most_running == 1


async def test_nothing_is_tokenized_for_callers_who_left(tokenizer: Tokenizer) -> None:
    first = tokenize(tokenizer, LONG)
    await tokenizer.has_begun()
    callers = [Caller() for _ in range(3)]
    waiting = [tokenize(tokenizer, LONG + "a" * (n + 1), c) for n, c in enumerate(callers)]
    callers[0].left = callers[2].left = True
    tokenizer.may_end.set()
    await asyncio.gather(first, *waiting)
    assert tokenizer.seen == [len(LONG), len(LONG) + 2]


async def test_answers_are_written_in_the_thread(tokenizer: Tokenizer) -> None:
    """FastAPI would look at each token on the loop, for seconds."""
    answer = await tokenize(tokenizer, "abc")
    assert isinstance(answer, Response) and answer.media_type == "application/json"
    assert content(answer)["tokens"] == [3] and content(answer)["count"] == 1


async def test_more_tokens_than_the_context_are_counted_not_sent(tokenizer: Tokenizer) -> None:
    tokenizer.tokens = list(range(CONTEXT))
    assert (await tokenize(tokenizer, "abc")).status_code == 200
    tokenizer.tokens = list(range(CONTEXT + 1))
    answer = await tokenize(tokenizer, "abc")
    assert answer.status_code == 400
    text = content(answer)["message"]
    assert text.startswith("the prompt has 6 tokens, more than the model's context length of 5")


def test_the_length_of_a_chat_is_that_of_its_messages() -> None:
    """As many characters are short, whoever says them."""
    for content, characters in (("ab", 4), (None, 2)):
        messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": content}]
        request = TokenizeRequest(model="m", messages=messages)
        assert tokenizing._characters(request) == characters
    assert tokenizing._characters(TokenizeRequest(model="m", prompt=["ab", "c"])) == 3
