"""What a worker tells of its model's thoughts, and that a gateway finds them as SGLang does."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import TokenizeRequest
from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingTokenize
from sglang.srt.parser.reasoning_parser import ReasoningParser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import fingerprint, plugin, prometheus, thinking, tokenizing
from vase_sgl.gateway.openai.thoughts import Splitter
from vase_sgl.gateway.workers import Thinking

START, END = "<think>", "</think>"
#: SGLang's parsers that go by more than their markers, or by markers that a request chooses.
OTHERS = {
    *("apertus2509", "beam", "cohere_command4", "gpt-oss", "granite_thinking_parser", "inkling"),
    *("k2_horizon", "kimi_k3", "ling3", "minimax-append-think", "minimax-m3", "muse"),
    "response_template",
}


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Bytes are tokens, and so is END; `special` ones are no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_tokens([END])
    model.add_special_tokens([*special])
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.fixture(scope="module")
def bytes_() -> PreTrainedTokenizerFast:
    return tokenizer()


def test_markers_of_plain_parsers_are_told(bytes_: PreTrainedTokenizerFast) -> None:
    """A parser that is new here: read its class, and see that the gateway finds what it finds."""
    told = {name: thinking.markers(name, bytes_) for name in ReasoningParser.DetectorMap}
    assert {name for name, found in told.items() if found is None} == OTHERS
    assert told["qwen3"] == told["deepseek-r1"] == told["glm45"] == (START, END)
    assert told["kimi"] == ("◁think▷", "◁/think▷")
    assert told["gemma4"] == ("<|channel>thought\n", "<channel|>")


@pytest.mark.parametrize("special", ["[THINK]", "[/THINK]"])
def test_markers_that_no_text_shows_are_not_told(special: str) -> None:
    assert thinking.markers("mistral", tokenizer(special)) is None
    assert thinking.markers("mistral", tokenizer()) == ("[THINK]", "[/THINK]")


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("<think>", True),
        ("a" * 100 + "<think>\n", True),
        ("é<think> \n\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("think>", False),
        ("<think>a", False),
        ("", False),
    ],
)
def test_a_prompt_may_open_the_thought(
    bytes_: PreTrainedTokenizerFast, prompt: str, begun: bool
) -> None:
    token_ids = bytes_.encode(prompt, add_special_tokens=False)
    end_ids = bytes_.encode(END, add_special_tokens=False)
    told = {"start": START, "end": END, "begun": begun, "end_ids": end_ids}
    assert thinking.describe("qwen3", bytes_, token_ids) == told
    assert thinking.describe("gpt-oss", bytes_, token_ids) is None
    assert thinking.describe(None, bytes_, token_ids) is None


@pytest.mark.parametrize(
    ("parser", "warns"), [("qwen3", False), ("gpt-oss", True), ("mistral", True), (None, False)]
)
def test_a_worker_says_once_that_thoughts_stay(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    parser: str | None,
    warns: bool,
) -> None:
    monkeypatch.setattr(thinking, "get_serving", lambda: SimpleNamespace(reasoning_parser=parser))
    with caplog.at_level(logging.WARNING, logger=thinking.logger.name):
        for one in (tokenizer("[THINK]"), None):
            thinking.warn_of_whole_text(SimpleNamespace(tokenizer=one))
    assert len(caplog.records) == warns
    assert all(f"--reasoning-parser {parser}: " in line for line in caplog.messages)


def test_it_says_so_at_the_start(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(thinking, "get_serving", lambda: SimpleNamespace(reasoning_parser="muse"))
    monkeypatch.setattr(stepped.scheduler, "tokenizer", tokenizer())
    for begins in ((fingerprint, "begin_to_read_weights"), (prometheus, "start_metrics")):
        monkeypatch.setattr(*begins, lambda argument: None)
    plugin._check_start(None, stepped.scheduler)
    assert "--reasoning-parser muse: " in caplog.text


class Caller:
    async def is_disconnected(self) -> bool:
        return False


async def tokenized(
    monkeypatch: pytest.MonkeyPatch, bytes_: PreTrainedTokenizerFast, **request: Any
) -> Any:
    """The worker's answer on /v1/tokenize; its chat template adds `<think>`."""
    monkeypatch.setattr(tokenizing, "_short", asyncio.Lock())
    serving = OpenAIServingTokenize.__new__(OpenAIServingTokenize)
    serving.tokenizer_manager = SimpleNamespace(  # type: ignore[assignment]
        tokenizer=bytes_, model_config=SimpleNamespace(context_len=100)
    )
    serving.chat_serving = SimpleNamespace(reasoning_parser="qwen3")  # type: ignore[assignment]
    monkeypatch.setattr(
        OpenAIServingTokenize,
        "_tokenize_chat_request",
        lambda self, request: bytes_.encode(request.messages[0].content + START),
    )
    asked = TokenizeRequest(model="m", **request)
    answer = await serving._handle_non_streaming_request(asked, asked, Caller())  # type: ignore[arg-type]
    return json.loads(bytes(answer.body))  # type: ignore[union-attr]


async def test_tokens_of_a_chat_come_with_the_markers(
    monkeypatch: pytest.MonkeyPatch, bytes_: PreTrainedTokenizerFast
) -> None:
    chat = await tokenized(monkeypatch, bytes_, messages=[{"role": "user", "content": "a"}])
    assert chat["tokens"] == bytes_.encode("a<think>") and chat["count"] == 8
    assert chat["vase"] == {
        "thinking": {"start": START, "end": END, "begun": True, "end_ids": bytes_.encode(END)}
    }
    assert "vase" not in await tokenized(monkeypatch, bytes_, prompt="a<think>")


def test_a_long_thought_makes_a_chat_long() -> None:
    message = {"role": "assistant", "content": "ab", "reasoning_content": "abc"}
    assert tokenizing._characters(TokenizeRequest(model="m", messages=[message])) == 5


# -- the gateway's side against SGLang's ----------------------------------------------------------

PIECES = st.sampled_from([START, END, "<", "</", "think>", "<think", "</th", "a", " ", "\n", ">"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)
PLAIN = TEXTS.filter(lambda text: START not in text and END not in text)
PARSERS = st.sampled_from(["qwen3", "deepseek-r1", "glm45", "kimi_k2", "nemotron_3"])
CUTS = st.lists(st.integers(0, 80), max_size=8)


def pieces(text: str, cuts: list[int]) -> Iterator[str]:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return (text[begin:end] for begin, end in pairwise(places))


def whole(text: str, begun: bool) -> tuple[str, str]:
    return Splitter(Thinking(START, END, begun)).take(text, final=True)


def streamed(text: str, cuts: list[int], begun: bool) -> tuple[str, str]:
    splitter = Splitter(Thinking(START, END, begun))
    taken = [*(splitter.take(piece) for piece in pieces(text, cuts)), splitter.take("", final=True)]
    return "".join(part.reasoning for part in taken), "".join(part.content for part in taken)


@given(text=TEXTS, parser=PARSERS)
def test_a_whole_text_is_told_apart_as_sglang_does(text: str, parser: str) -> None:
    found = ReasoningParser(parser, stream_reasoning=False, force_reasoning=True)
    assert whole(text, begun=True) == found.parse_non_stream(text)
    # What SGLang makes of a marker in the midst of an answer, and of an R1 without one, is left.
    if parser != "deepseek-r1" and (text.startswith(START) or START not in text):
        found = ReasoningParser(parser, stream_reasoning=False, force_reasoning=False)
        assert whole(text, begun=False) == found.parse_non_stream(text)


@given(thought=PLAIN, answer=PLAIN, end=st.booleans(), begun=st.booleans(), cuts=CUTS)
def test_a_stream_is_told_apart_as_sglang_does(
    thought: str, answer: str, end: bool, begun: bool, cuts: list[int]
) -> None:
    """Of a text with one thought or none; of others SGLang's finding depends on the cuts."""
    text = thought + END * end + answer
    if text.count(START) + text.count(END) > end:
        return
    for start in ("", START):
        parser = ReasoningParser("qwen3", force_reasoning=begun)
        found = [parser.parse_stream_chunk(piece) for piece in pieces(start + text, cuts)]
        found.append(parser.parse_stream_end())
        joined = tuple("".join(part or "" for part in side) for side in zip(*found, strict=True))
        if begun or start or not end:
            assert streamed(start + text, cuts, begun) == joined


@given(text=TEXTS, cuts=CUTS, begun=st.booleans())
@example(text="<think></thi", cuts=[3, 9], begun=False)
def test_however_a_text_is_cut_it_is_told_apart_alike(
    text: str, cuts: list[int], begun: bool
) -> None:
    assert streamed(text, cuts, begun) == whole(text, begun)


@given(text=TEXTS, begun=st.booleans())
def test_no_more_is_held_than_may_begin_a_marker(text: str, begun: bool) -> None:
    splitter = Splitter(Thinking(START, END, begun))
    given = ""
    for letter in text:
        splitter.take(letter)
        given += letter
        held = splitter._held
        assert given.endswith(held)
        assert START.startswith(held.lstrip()) or END.startswith(held)
        assert held not in (START, END)
