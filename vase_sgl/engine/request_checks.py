"""Requests that would end the scheduler, or hold it up, refused in the tokenizer process.

SGLang's own checks let them through; an exception in its scheduler ends the whole worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import SessionParams, TokenizedGenerateReqInput
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_params import SamplingParams

from vase_sgl.engine import platform_cpu, stop_regex

_MAX_INT32 = 2**31 - 1
#: Smaller ones, and larger biases, may overflow a logit, and probabilities are then no numbers.
MIN_REPETITION_PENALTY = 0.01
_MAX_BIAS = 1e30
_MAX_FLOAT32 = torch.finfo(torch.float32).max
#: Their declared types are narrower than what upstream itself makes of them.
_TYPED_ELSEWHERE = ("custom_params", "watermark", "logit_bias")

#: Field, whether its value is harmless (the request with all defaults, the model), and what it
#: should be, in words.
_Check = tuple[str, Callable[[TokenizedGenerateReqInput, Any], bool], str]


def refuse_fatal(result: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `TokenizerManager._create_tokenized_object`, where defaults are filled in.

    Raises ValueError naming the first wrong field, which the HTTP server answers with a 400.
    """
    if not isinstance(result, TokenizedGenerateReqInput):
        return
    _refuse_other_types(result.sampling_params)
    for field, is_harmless, wanted in _CHECKS:
        if not is_harmless(result, manager.model_config):
            raise ValueError(f"{field}: {wanted.format(model=manager.model_config)}")


def _refuse_other_types(params: SamplingParams) -> None:
    """Upstream checks types at `/generate` alone; Ollama's doors take any JSON."""
    for field in msgspec.structs.fields(params):
        if field.name in _TYPED_ELSEWHERE:
            continue
        try:
            msgspec.convert(getattr(params, field.name), field.type)
        except msgspec.ValidationError as error:
            raise ValueError(f"{field.name.removesuffix('_strs')}: {error}") from None


def _has_no_min_p(request: TokenizedGenerateReqInput, model: Any) -> bool:
    """Upstream's draw by seed, which `--enable-deterministic-inference` turns on, knows none."""
    by_seed = get_exec().deterministic.enable_deterministic_inference
    return request.sampling_params.min_p == 0 or not by_seed or platform_cpu.is_active()


def _has_typed_session(request: TokenizedGenerateReqInput, model: Any) -> bool:
    """Upstream takes any JSON for its fields."""
    session = request.session_params
    try:
        msgspec.convert(session and msgspec.structs.astuple(session), SessionParams | None)
    except msgspec.ValidationError:
        return False
    return True


def _has_rows_of_embeds(request: TokenizedGenerateReqInput, model: Any) -> bool:
    if request.input_embeds is None:
        return True
    return request.session_params is None and all(
        len(row) == model.hidden_size and all(-_MAX_FLOAT32 <= x <= _MAX_FLOAT32 for x in row)
        for row in request.input_embeds
    )


_CHECKS: tuple[_Check, ...] = (
    (
        "min_p",
        _has_no_min_p,
        "cannot be used with --enable-deterministic-inference; send 0 (a default of the model's "
        "generation_config.json is left out with --sampling-defaults openai)",
    ),
    (
        "top_k",
        lambda request, model: request.sampling_params.top_k <= _MAX_INT32,
        f"must be at most {_MAX_INT32}; send -1 for all tokens",
    ),
    (
        "min_new_tokens",
        lambda request, model: request.sampling_params.min_new_tokens <= _MAX_INT32,
        f"must be at most {_MAX_INT32}",
    ),
    (
        "repetition_penalty",
        lambda request, model: request.sampling_params.repetition_penalty >= MIN_REPETITION_PENALTY,
        f"must be at least {MIN_REPETITION_PENALTY}",
    ),
    (
        "logit_bias",
        lambda request, model: all(
            -_MAX_BIAS <= bias <= _MAX_BIAS  # false for NaN
            for bias in (request.sampling_params.logit_bias or {}).values()
        ),
        f"values must be from -{_MAX_BIAS:g} to {_MAX_BIAS:g}",
    ),
    (
        "stop_token_ids",
        lambda request, model: all(
            0 <= token < model.vocab_size for token in request.sampling_params.stop_token_ids or ()
        ),
        "must be tokens of the model, from 0 up to {model.vocab_size} exclusive",
    ),
    (
        "stop_regex",
        lambda request, model: stop_regex.are_quick(
            request.sampling_params.stop_regex_strs, request.sampling_params.stop_regex_max_len
        ),
        f"matching could take more than {stop_regex.MAX_STEPS} steps at every character, or "
        "compiling too long, while all requests wait; let repeats without an upper bound (*, +) "
        "only end a short pattern, bound the others closely, and leave out back-references and "
        "ranges of very many characters",
    ),
    (
        "top_logprobs_num",
        lambda request, model: 0 <= request.top_logprobs_num <= model.vocab_size,
        "must be from 0 to {model.vocab_size}, the size of the vocabulary",
    ),
    (
        "logprob_start_len",
        lambda request, model: request.logprob_start_len >= -1,
        "must be -1 (the answer's tokens alone) or a position of the prompt",
    ),
    (
        "session_params",
        _has_typed_session,
        "id and rid must be strings, offset an integer, replace and drop_previous_output booleans",
    ),
    (
        "positional_embed_overrides",
        lambda request, model: isinstance(
            request.positional_embed_overrides, PositionalEmbeds | None
        ),
        "cannot be sent over HTTP; leave it out",
    ),
    (
        "token_indices_to_pool",
        lambda request, model: request.token_indices_to_pool is None,
        "counts from the first token that a prefill computes, which with a prefix cache or chunks "
        "is not the prompt's; leave it out",
    ),
    (
        "input_embeds",
        lambda request, model: request.input_embeds is None or model.dtype == torch.bfloat16,
        "SGLang computes them in bfloat16, and this worker's model in another type; start it with "
        "--dtype bfloat16, or send token ids",
    ),
    (
        "input_embeds",
        _has_rows_of_embeds,
        "every token must have {model.hidden_size} finite numbers, and sessions take none",
    ),
)
