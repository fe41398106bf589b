"""From OpenAI's request bodies to the gateway's own requests. What is not supported is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from google.protobuf import json_format
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vase_sgl.gateway.errors import InvalidRequest
from vase_sgl.gateway.validation import check_messages
from vase_sgl.gateway.wire import PROMPT_MODES
from vase_sgl.rpc.v1 import gateway_pb2 as pb

#: Samples of one request.
MAX_SAMPLES = 16
#: OpenAI's own default for /v1/completions.
COMPLETION_MAX_TOKENS = 16

#: What OpenAI calls a role of ours: to models that do not know it, it is the same.
_ROLES = {"developer": "system"}
#: More than any policy takes; which ones it takes is checked later, one by one.
_MAX_VASE_KEYS = 64
#: Unknown names that a refusal lists.
_NAMES_LISTED = 8
#: Keys of `vase`: those of `EvictionParams`, whose prompt mode is `prompt` here, and `inspect`.
_VASE_KEYS = (
    *("prompt" if n == "prompt_mode" else n for n in pb.EvictionParams.DESCRIPTOR.fields_by_name),
    "inspect",
)

T = TypeVar("T")
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
#: The first wrong item is enough: a problem for each of millions takes gigabytes.
Items = Annotated[list[T], Field(fail_fast=True)]


def _must_be(text: str) -> WrapValidator:
    """One problem that says what a field of several types may be.

    pydantic has one for each type, as if that were the only one, at a path with the type's name.
    """

    def check(value: object, types: ValidatorFunctionWrapHandler) -> object:
        try:
            return types(value)
        except ValidationError:
            raise PydanticCustomError("type", f"must be {text}") from None

    return WrapValidator(check)


def _unknown(fields: Mapping[str, Any], known: Container[str], count: int) -> list[str]:
    """The first names, up to `count`, that are set and not known."""
    names = (name for name, value in fields.items() if value is not None and name not in known)
    return list(itertools.islice(names, count))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: object) -> object:
        """null is the same as left out, as in OpenAI's own API.

        Of names that are unknown only the first is left, for the same reason as in `Items`.
        """
        if not isinstance(fields, dict):
            return fields
        known = {name: fields[name] for name in cls.model_fields if fields.get(name) is not None}
        return known | {name: fields[name] for name in _unknown(fields, cls.model_fields, 1)}


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: str
    content: Annotated[
        str | Items[_TextPart],
        _must_be(
            'a string or a list of {"type": "text", "text": …} parts; images and audio are not '
            "supported"
        ),
    ]
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _thought_alone(cls, fields: object) -> object:
        """An answer that ended within its thought has no content, which many write as null."""
        if not isinstance(fields, dict) or fields.get("reasoning_content") is None:
            return fields
        return {**fields, "content": ""} if fields.get("content") is None else fields

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return " ".join(part.text for part in self.content)  # as SGLang joins them


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Common(_Strict):
    """What both calls take. The second block is not OpenAI's; SGLang's names are kept."""

    model: str
    max_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: Annotated[str | Items[str] | None, _must_be("a string or a list of strings")] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    stream: bool = False
    stream_options: _StreamOptions | None = None

    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Items[TokenId] | None = None
    ignore_eos: bool | None = None
    vase: Annotated[dict[str, Any], Field(max_length=_MAX_VASE_KEYS)] | None = None


class _Chat(_Common):
    messages: Annotated[Items[_Message], Field(min_length=1)]
    max_completion_tokens: Int32 | None = None

    separate_reasoning: bool = True


class _Completion(_Common):
    prompt: Annotated[
        str | Items[str] | Items[TokenId],
        _must_be("a string or a list of token ids; send one prompt in a request"),
    ]


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked request: what to generate, how often, and how to answer.

    max_tokens_field: the field that names the longest answer; None: there was none, so that
    max_new_tokens is the gateway's own default.
    separate_reasoning: tell thoughts and answers apart.
    reasoning: what the chat's messages were thought with, by index.
    """

    model: str
    request: pb.GenerateRequest
    max_tokens_field: str | None
    samples: int
    stream: bool
    include_usage: bool
    separate_reasoning: bool = False
    reasoning: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def sample(self, index: int) -> pb.GenerateRequest:
        """The request of one sample; equal seeds give every sample draws of its own."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.request)
        request.sample_index = index
        return request


def chat_call(body: object, default_max_tokens: int) -> Call:
    """A body of /v1/chat/completions.

    Raises `InvalidRequest`, and `UnicodeEncodeError` for half of a surrogate pair.
    """
    _check_messages(body)
    chat = _parse(_Chat, body)
    conversation = pb.Conversation(
        messages=[
            pb.ChatMessage(role=_ROLES.get(m.role, m.role), content=m.text) for m in chat.messages
        ]
    )
    return dataclasses.replace(
        _call(chat, pb.GenerateRequest(chat=conversation), default_max_tokens),
        separate_reasoning=chat.separate_reasoning,
        reasoning=_reasoning(chat.messages),
    )


def _reasoning(messages: Sequence[_Message]) -> dict[int, str]:
    given = {
        index: message.reasoning_content
        for index, message in enumerate(messages)
        if message.reasoning_content is not None
    }
    for index, text in given.items():
        text.encode()  # half of a surrogate pair; `content` is in protobuf, which refuses it
        if messages[index].role != "assistant":  # SGLang would drop it
            raise InvalidRequest(
                f"messages.{index}.reasoning_content: only messages of the assistant have it; "
                "leave it out"
            )
    return given


def _check_messages(body: object) -> None:
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list):
        return
    check_messages("messages", len(messages))
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = sum(len(content) for content in contents if isinstance(content, list))
    check_messages("messages", len(messages) + parts)


def completion_call(body: object) -> Call:
    """A body of /v1/completions. Raises as `chat_call` does."""
    completion = _parse(_Completion, body)
    request, prompt = pb.GenerateRequest(), completion.prompt
    if isinstance(prompt, str):
        request.text = prompt
    elif all(isinstance(part, int) for part in prompt):
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(part for part in prompt if isinstance(part, int))
    elif len(prompt) == 1:
        request.text = str(prompt[0])
    else:
        raise InvalidRequest("prompt: several prompts in one request are not supported; send one")
    return _call(completion, request, COMPLETION_MAX_TOKENS)


def _call(body: _Common, request: pb.GenerateRequest, default_max_tokens: int) -> Call:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: has a meaning only with stream: true")
    given = {
        name: value
        for name in ("max_tokens", "max_completion_tokens")
        if (value := getattr(body, name, None)) is not None
    }
    if len(given) > 1:
        raise InvalidRequest("max_tokens: is the old name of max_completion_tokens; send one")
    max_tokens_field, request.max_new_tokens = next(iter(given.items()), (None, default_max_tokens))
    if body.seed is not None:
        request.seed = body.seed
    sampling = {
        name: value
        for name in pb.SamplingParams.DESCRIPTOR.fields_by_name
        if (value := getattr(body, name)) is not None
    }
    if isinstance(body.stop, str):
        sampling["stop"] = [body.stop]
    request.sampling.CopyFrom(pb.SamplingParams(**sampling))
    if body.vase is not None:
        vase = _known_vase(body.vase)
        eviction = {key: value for key, value in vase.items() if key != "inspect"}
        if eviction or "inspect" not in vase:
            request.eviction.CopyFrom(_eviction(eviction))
        request.inspect = _inspect(vase)
    options = body.stream_options
    return Call(
        model=body.model,
        request=request,
        max_tokens_field=max_tokens_field,
        samples=body.n,
        stream=body.stream,
        include_usage=options is not None and options.include_usage,
    )


def _known_vase(vase: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `vase` sets, all of it by names that are known. null is the same as left out."""
    unknown = _unknown(vase, _VASE_KEYS, _NAMES_LISTED)
    if unknown:
        raise InvalidRequest(
            f"vase: {', '.join(unknown)}: not known; known are {', '.join(_VASE_KEYS)}"
        )
    return {key: value for key, value in vase.items() if value is not None}


def _inspect(fields: Mapping[str, Any]) -> bool:
    """`inspect` of `vase`; its other keys are the eviction."""
    inspect = fields.get("inspect", False)
    if not isinstance(inspect, bool):
        raise InvalidRequest("vase.inspect: must be true or false")
    return inspect


def _eviction(fields: Mapping[str, Any]) -> pb.EvictionParams:
    """The fields of `vase`, named as in `EvictionParams`; the prompt mode is `prompt`."""
    named = dict(fields)
    if "prompt" in named:
        prompt = named.pop("prompt")
        mode = PROMPT_MODES.get(prompt) if isinstance(prompt, str) else None
        if mode is None:
            raise InvalidRequest(f"vase.prompt: must be {' or '.join(PROMPT_MODES)}")
        named["prompt_mode"] = mode
    try:
        return json_format.ParseDict(named, pb.EvictionParams())
    except json_format.ParseError as error:
        raise InvalidRequest(f"vase: {error}") from error


B = TypeVar("B", bound=_Common)


def _parse(kind: type[B], body: object) -> B:
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    unsupported = sorted(_unknown(body, kind.model_fields, _NAMES_LISTED))
    if unsupported:
        raise InvalidRequest(
            f"{', '.join(unsupported)}: not supported here; leave it out. Supported are "
            f"{', '.join(kind.model_fields)}"
        )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise InvalidRequest("; ".join(_problems(error))) from error


def _problems(error: ValidationError) -> list[str]:
    """One text for each field that is wrong; values are left out, they may be prompts."""
    texts: dict[str, str] = {}
    for problem in error.errors(include_input=False, include_url=False):
        location = [str(part) for part in problem["loc"]]
        texts.setdefault(
            location[0] if location else "body", f"{'.'.join(location)}: {problem['msg']}"
        )
    return list(texts.values())
