"""An answer ends at the first of its stop strings, however it is written: on SGLang's own `Req`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.schedule_batch import Req

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tokenized_request import creator

VOCABULARY = ["a", "b", "#", "##", "###", ";", "\n", ";\n", "\n;", "S", "T", "O", "P", "STOP", "語"]


class Tokenizer:
    """Encodes by the longest token that fits, as most do; a model may write otherwise."""

    eos_token_id = None
    additional_stop_token_ids = None

    def encode(self, text: str, **_: object) -> list[int]:
        found = []
        while text:
            token = max((t for t in VOCABULARY if text.startswith(t)), key=len)
            found.append(VOCABULARY.index(token))
            text = text[len(token) :]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(VOCABULARY[i] for i in ids)


def answered(stepped: SteppedScheduler, stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    """The text of a request that is given the pieces one by one, and whether it ended itself."""
    tokenizer = Tokenizer()
    create = creator(stepped.scheduler.model_config, tokenizer)
    params = create({"stop": stop, "max_new_tokens": 100}).sampling_params
    req = Req("r", "", array("q", [0]), params, vocab_size=len(VOCABULARY), eos_token_ids=set())
    req.tokenizer = tokenizer
    for piece in pieces:
        req.output_ids.append(VOCABULARY.index(piece))
        req.update_finish_state(1)
        if req.finished():
            break
    text = tokenizer.decode(req.output_ids_through_stop)
    if not req.finished():
        return text, False
    ended = DetokenizerManager.__new__(DetokenizerManager)
    return ended.trim_matched_stop(text, req.finished_reason.to_json(), False), True


@pytest.mark.parametrize("stop", [["\n", ";"], [";", "\n"]])
@pytest.mark.parametrize("token", [";\n", "\n;"])
def test_two_in_one_token_end_it_at_the_first(
    stepped: SteppedScheduler, stop: list[str], token: str
) -> None:
    assert answered(stepped, stop, ["a", "b", token, "a"]) == ("ab", True)


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        ("###", ["###"]),
        ("###", ["#", "##"]),
        ("###", ["#", "#", "#"]),
        ("STOP", ["S", "T", "O", "P"]),
        ("STOP###", ["S", "T", "O", "P", "#", "#", "#"]),
        ("語" * 40, ["語"] * 40),
    ],
)
def test_unusual_tokens_make_it_too(
    stepped: SteppedScheduler, stop: str, pieces: list[str]
) -> None:
    assert answered(stepped, [stop], ["a", *pieces, "b"]) == ("a", True)


def test_how_much_is_decoded_in_every_step_is_bounded(stepped: SteppedScheduler) -> None:
    create = creator(stepped.scheduler.model_config, Tokenizer())
    long = create({"stop": ["STOP" * 60]}).sampling_params
    assert long.stop_str_max_len == 2 * 60 + 4
    assert create({}).sampling_params.stop_str_max_len == 0
