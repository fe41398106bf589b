"""However tokens are put together on their way to the client, their text is the same.

On SGLang's own `Req`, output streamer and detokenizer.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components import output_streamer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tokenized_request import creator
from vase_sgl.engine import stop_strings

SPECIAL, EOS = "<sep>", "<eos>"
#: Chinese ones, blanks and ends of lines: SGLang treats them in a way of their own.
CHARACTERS = [*"再天é、\n aN", "😀", "🎉"]
#: Tokens of more than a byte, and how they may begin and end within characters.
PIECES = [
    *(character.encode() for character in CHARACTERS if not character.isascii()),
    *(b"END", b"N ", b"aa", " 😀".encode(), b"\xf0\x9f", b" \xf0\x9f", b"\x98\x80", b"\x9f\x98"),
    *("再".encode() + b"\xf0\x9f", b"\x98\x80\xf0", b"\x80 \xe5", b"\xa9\xe5", b"END\xf0"),
]


def of_transformers(tokenizer: Tokenizer) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    made.additional_stop_token_ids = None  # as SGLang leaves it
    return made


def byte_level() -> Any:
    """GPT-2's kind: a token is any bytes."""
    letters = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in letters)}
    pieces = [bytes([byte]) for byte in range(256)] + PIECES
    names = ["".join(letters[byte] for byte in piece) for piece in pieces]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SPECIAL])
    return of_transformers(tokenizer)


def byte_fallback() -> Any:
    """Llama's old kind: what is no token is bytes, of which an incomplete run is all "�"."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "N", "再", "\n", "▁a"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return of_transformers(tokenizer)


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
PROMPT = [ord("a"), ord("b")]
TOKENS = {bytes([byte]): byte for byte in range(256)} | {p: 256 + i for i, p in enumerate(PIECES)}
SEPARATOR = len(TOKENS)


def tokenized(text: bytes, seed: int) -> list[int]:
    """One of the ways to write these bytes in tokens of BYTE_LEVEL."""
    chance, tokens = random.Random(seed), []
    while text:
        piece = chance.choice([p for p in (*PIECES, text[:1]) if text.startswith(p)])
        tokens.append(TOKENS[piece])
        text = text[len(piece) :]
    return tokens


def answered(
    stepped: SteppedScheduler,
    tokenizer: Any,
    tokens: Sequence[int],
    sampling: dict[str, Any],
    *,
    stream: bool = True,
    forced_interval: int = 50,
    by_batch: bool = True,
    prompt: Sequence[int] = PROMPT,
) -> tuple[Req, str]:
    """The request after its scheduler was given the tokens, and the text that its client has.

    forced_interval: tokens after which SGLang puts an answer that is not streamed into text.
    """
    create = creator(stepped.scheduler.model_config, tokenizer)
    params = create({**sampling, "max_new_tokens": len(tokens)}).sampling_params
    req = Req(
        "r",
        "",
        array("q", prompt),
        params,
        stream=stream,
        return_logprob=True,
        vocab_size=len(tokenizer),
        eos_token_ids=set(),
    )
    req.tokenizer = tokenizer
    detokenizer = DetokenizerManager.__new__(DetokenizerManager)
    detokenizer.tokenizer, detokenizer.vocab_size = tokenizer, len(tokenizer)
    detokenizer.decode_status = {}
    detokenizer.disable_tokenizer_batch_decode = not by_batch
    detokenizer.is_tool_call_parser_gpt_oss, detokenizer.tool_close_token_ids = False, ()
    sent: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_streamer, "DEFAULT_FORCE_STREAM_INTERVAL", forced_interval)
        streamer = stepped.scheduler.output_streamer
        patch.setattr(streamer, "send_to_detokenizer", SimpleNamespace(send_output=sent.append))
        for place, token in enumerate(tokens):
            req.output_ids.append(token)
            req.logprob.output_token_logprobs_val.append(-float(place))
            req.logprob.output_token_logprobs_idx.append(token)
            req.update_finish_state(1)
            streamer.stream_output([req], True)
            if req.finished():
                break
    outputs = [detokenizer.handle_batch_token_id_out(payload) for payload in sent]
    ids = [token for output in outputs for token in output.output_ids[0]]
    assert ids == list(req.output_ids_through_stop)
    assert [i for output in outputs for i in output.output_token_logprobs_idx[0]] == ids
    assert detokenizer.decode_status == {}
    return req, "".join(output.output_strs[0] for output in outputs)


def joined(pieces: Sequence[bytes | str]) -> bytes:
    return b"".join(p.encode() if isinstance(p, str) else p for p in pieces)


ANSWERS = st.builds(
    tokenized,
    st.lists(st.sampled_from([*CHARACTERS, *PIECES]), min_size=1).map(joined),
    st.integers(0, 2**32),
)
#: Where in the answer it is, how much of it, and how it goes on there.
STOPS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 3), st.text(CHARACTERS, max_size=1)), max_size=3
)
WAYS = st.fixed_dictionaries(
    {"stream": st.booleans(), "forced_interval": st.integers(1, 8), "by_batch": st.booleans()}
)
INTERVALS = st.none() | st.integers(1, 8)


@settings(deadline=None)
@given(ANSWERS, STOPS, INTERVALS, st.booleans(), WAYS)
def test_the_text_is_that_of_the_tokens_up_to_the_stop_string(
    stepped: SteppedScheduler,
    tokens: list[int],
    places: list[tuple[int, int, str]],
    interval: int | None,
    no_stop_trim: bool,
    way: dict[str, Any],
) -> None:
    answer = BYTE_LEVEL.decode(tokens)
    stop = [answer[start : start + length] + other for start, length, other in places]
    stop = [text for text in stop if text and "\N{REPLACEMENT CHARACTER}" not in text]
    sampling = {"stop": stop, "stream_interval": interval, "no_stop_trim": no_stop_trim}
    req, text = answered(stepped, BYTE_LEVEL, tokens, sampling, **way)
    whole = BYTE_LEVEL.decode(req.output_ids_through_stop)
    found = req.finished_reason.to_json().get("matched")
    if found is None:
        assert text == whole
    else:
        before, stopped, _ = whole.partition(found)
        assert text == (before + stopped if no_stop_trim else before)
    assert no_stop_trim or not any(s in text for s in stop)


@pytest.mark.parametrize("interval", [2, 3, 5, 8])
@pytest.mark.parametrize("stream", [True, False])
def test_no_text_is_sent_twice(stepped: SteppedScheduler, interval: int, stream: bool) -> None:
    answer = "天再天再天😀🎉再天😀再再🎉😀再天、再再天天😀🎉再天🎉" * 3
    sampling = {"stream_interval": interval}
    way = {"stream": stream, "forced_interval": interval}
    tokens = list(answer.encode())
    assert answered(stepped, BYTE_LEVEL, tokens, sampling, **way)[1] == answer


@pytest.mark.parametrize("stop", ["再😀", "END😀", " é"])
def test_a_stop_string_is_held_back_while_its_next_character_is_incomplete(
    stepped: SteppedScheduler, stop: str
) -> None:
    tokens = list(f"a{stop}a".encode())
    assert answered(stepped, BYTE_LEVEL, tokens, {"stop": [stop]})[1] == "a"


def test_half_a_stop_string_does_not_stay_in_an_answer_that_is_not_streamed(
    stepped: SteppedScheduler,
) -> None:
    for interval in (1, 2, 3):
        way = {"stream": False, "forced_interval": interval}
        _, text = answered(stepped, BYTE_LEVEL, list(b"aENaENDa"), {"stop": ["END"]}, **way)
        assert text == "aENa"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*TOKENS.values(), *[SEPARATOR] * 40]), min_size=1),
    INTERVALS,
    st.booleans(),
    WAYS,
)
def test_any_tokens_are_the_text_that_they_are_together(
    stepped: SteppedScheduler,
    tokens: list[int],
    interval: int | None,
    skip: bool,
    way: dict[str, Any],
) -> None:
    """Bytes that are no characters, too, and special tokens that are left out or not."""
    sampling = {"stream_interval": interval, "skip_special_tokens": skip}
    _, text = answered(stepped, BYTE_LEVEL, tokens, sampling, **way)
    assert text == BYTE_LEVEL.decode(tokens, skip_special_tokens=skip)


@settings(deadline=None)
@given(
    st.text(CHARACTERS, min_size=1),
    st.sampled_from(["N", "aN", "N a", "😀", "é", "天天", "🎉N"]),
    INTERVALS,
    WAYS,
)
def test_characters_in_bytes_of_their_own(
    stepped: SteppedScheduler, answer: str, stop: str, interval: int | None, way: dict[str, Any]
) -> None:
    prompt = BYTE_FALLBACK.encode("a", add_special_tokens=False)
    tokens = BYTE_FALLBACK.encode(answer.replace(" ", "▁"), add_special_tokens=False)
    sampling = {"stop": [stop], "stream_interval": interval}
    _, text = answered(stepped, BYTE_FALLBACK, tokens, sampling, prompt=prompt, **way)
    assert text == answer.partition(stop)[0]


def test_only_tokens_that_are_bytes_are_decoded_again() -> None:
    """Four times as much for every token of a Chinese answer would be much for nothing."""
    assert stop_strings._falls_back_to_bytes(BYTE_FALLBACK)
    assert not stop_strings._falls_back_to_bytes(BYTE_LEVEL)
    assert not stop_strings._falls_back_to_bytes(object())
