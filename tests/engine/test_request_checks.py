"""What a client may send that would end the scheduler: a 400 that names the field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.runtime_context import get_exec

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tokenized_request import Create, creator
from vase_sgl.engine import platform_cpu


@pytest.fixture
def create(stepped: SteppedScheduler) -> Create:
    return creator(stepped.scheduler.model_config)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("sampling", "fields", "text"),
    [
        ({"top_k": 2**31}, {}, "top_k: must be at most 2147483647"),
        ({"min_new_tokens": 2**31, "max_new_tokens": None}, {}, "min_new_tokens: must be at"),
        ({"repetition_penalty": 1e-38}, {}, "repetition_penalty: must be at least 0.01"),
        # Types, which SGLang checks at one door only.
        ({"max_new_tokens": 4.5}, {}, r"max_new_tokens: Expected `int \| null`, got `float`"),
        ({"top_k": 2.5}, {}, "top_k: Expected `int`"),
        ({"stop": [["a", "b"]]}, {}, "stop: Expected `str`"),
        ({"ignore_eos": "no"}, {}, "ignore_eos: Expected `bool`"),
        ({"regex": ["a"]}, {}, "regex: Expected `str"),
        ({"logit_bias": {"1": NAN}}, {}, "logit_bias: values must be from -1e"),
        ({"logit_bias": {"1": 0.5, "2": INF}}, {}, "logit_bias"),
        ({"logit_bias": {"1": -INF}}, {}, "logit_bias"),
        ({"logit_bias": {"1": 1e300}}, {}, "logit_bias"),  # infinite as float32
        ({"stop_token_ids": [7, 10**9]}, {}, "stop_token_ids: .* from 0 up to 256 exclusive"),
        ({"stop_token_ids": [256]}, {}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, {}, "stop_token_ids"),
        (
            {"stop_regex": r"(\w+\s?)+\x00"},
            {},
            "stop_regex: matching could take more than 1000 steps",
        ),
        ({"stop_regex": "a+b"}, {}, "stop_regex"),  # an a's steps grow with those after it
        ({"stop_regex": "(?=a*)b"}, {}, "stop_regex"),
        ({"stop_regex": "(a|b*)c"}, {}, "stop_regex"),
        ({"stop_regex": "a?" * 20 + "a" * 20}, {}, "stop_regex"),
        ({"stop_regex": "(a|aa)" * 10}, {}, "stop_regex"),
        ({"stop_regex": r"(a{1,10}\s?){1,10}b"}, {}, "stop_regex"),
        ({"stop_regex": "(?:){999999}"}, {}, "stop_regex"),
        ({"stop_regex": r"(a)\1"}, {}, "stop_regex"),
        ({"stop_regex": ["[ab]{0,600}", "c{0,600}"]}, {}, "stop_regex"),  # together
        # These search the whole answer after each token, the last for the other's sake.
        ({"stop_regex": r"(?=)(?:.|..){7}\x00"}, {}, "stop_regex"),
        ({"stop_regex": r"(?:.|..){7}\x00a*"}, {}, "stop_regex"),
        ({"stop_regex": ["a+", "b{0,60}c"]}, {}, "stop_regex"),
        ({"stop_regex": r"(?i)[\x01-\uffff]{3}[!-\uffff]{3}[b-\uffff]"}, {}, "compiling too long"),
        ({"stop_regex": [r"([b-\uffff]|a)"] * 3}, {}, "stop_regex"),
        ({}, {"top_logprobs_num": 10**6}, "top_logprobs_num: must be from 0 to 256"),
        ({}, {"top_logprobs_num": -3}, "top_logprobs_num"),
        ({}, {"logprob_start_len": -2}, "logprob_start_len: must be -1 "),
        ({}, {"session_params": {"id": {"a": 1}}}, "session_params: id and rid must be strings"),
        ({}, {"session_params": {"id": "s", "rid": ["a"]}}, "session_params"),
        ({}, {"session_params": {"id": "s", "offset": "1"}}, "session_params"),
        ({}, {"positional_embed_overrides": {}}, "positional_embed_overrides: cannot be sent"),
        ({"max_new_tokens": 0}, {"token_indices_to_pool": [1]}, "token_indices_to_pool: counts"),
        # The model is one in float32; of others in bfloat16_model.py.
        ({}, {"input_embeds": [[0.5] * 64]}, "input_embeds: SGLang computes them in bfloat16"),
        # SGLang's own; they must not get lost.
        ({"logit_bias": {"256": 1.0}}, {}, r"logit_bias must has keys in \[0, 255\]"),
    ],
)
def test_what_would_end_the_scheduler_is_refused(
    create: Create, sampling: dict[str, Any], fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        create(sampling, return_logprob=True, **fields)


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({}, {}),
        ({"top_k": -1, "min_p": 0.5, "repetition_penalty": 0.01}, {}),
        ({"temperature": 1, "max_new_tokens": None, "stop": "a", "stop_regex": ["a+"]}, {}),
        ({"stop_regex": ["</answer>", r"\n(?:Question|Q):\s*", "(a|ab){3,}"]}, {}),
        ({"stop_regex": ["</answer>", r"(?i)^[a-z]{1,40}\.\d{1,9}\b"]}, {}),
        ({"stop_regex": [r"(?i)[a-z\u4e00-\u9fff]{9}", r"[^\x00-\x1f]b{0,300}"]}, {}),
        ({"stop_regex": [r"\d{1,3}(\.\d{1,3}){3}"]}, {}),
        ({"stop_regex": ["(?<!a)b(?=c)", "[^a]"]}, {}),
        ({"json_schema": "{}", "custom_params": {"a": {"b": {"c": [1]}}}}, {}),
        ({"temperature": 0, "logit_bias": {"1": -1e30, "255": 1e30}}, {}),
        ({"min_new_tokens": 1, "stop_token_ids": [0, 255, None]}, {}),
        ({}, {"top_logprobs_num": 256, "logprob_start_len": 0, "token_ids_logprob": [255]}),
        ({}, {"session_params": {"id": "s", "rid": None, "offset": 3, "replace": True}}),
        ({}, {"positional_embed_overrides": PositionalEmbeds([torch.ones(64)], [0])}),
    ],
)
def test_what_is_harmless_goes_on(
    create: Create, sampling: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert create(sampling, return_logprob=True, **fields).rid == "r"


def test_min_p_with_deterministic_inference_is_refused(
    create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's draw by seed asserts that no request in the batch has one; ours knows it."""
    with get_exec().deterministic.override(enable_deterministic_inference=True):
        create({"min_p": 0.1})
        monkeypatch.setattr(platform_cpu, "is_active", lambda: False)
        create({"min_p": 0.0})
        with pytest.raises(ValueError, match="min_p: cannot be used with --enable-deterministic"):
            create({"min_p": 0.1})
