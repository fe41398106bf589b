"""From generations to OpenAI's answers. Each carries a `vase` object beside OpenAI's own fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from vase_sgl.gateway.audit import Record
from vase_sgl.gateway.errors import REQUEST_ID, GatewayError
from vase_sgl.gateway.openai.names import in_http_names
from vase_sgl.gateway.openai.requests import Call
from vase_sgl.gateway.openai.thoughts import Splitter, thought_tokens
from vase_sgl.gateway.workers import Thinking

Kind = Literal["chat", "completion"]

_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}
_OBJECT = {"chat": "chat.completion", "completion": "text_completion"}
_CHUNK_OBJECT = {"chat": "chat.completion.chunk", "completion": "text_completion"}

#: gRPC status name -> HTTP status and OpenAI's error type.
_ERRORS = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "FAILED_PRECONDITION": (400, "invalid_request_error"),
    "UNAUTHENTICATED": (401, "authentication_error"),
    "PERMISSION_DENIED": (403, "permission_error"),
    "NOT_FOUND": (404, "not_found_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "UNAVAILABLE": (503, "service_unavailable_error"),
    "ABORTED": (502, "api_error"),
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What all messages of one answer have in common. `request_id`: that of the first sample."""

    kind: Kind
    model: str
    created: int
    request_id: str

    def whole(
        self, records: Sequence[Record], thinking: Thinking | None, *, separate: bool
    ) -> dict[str, Any]:
        """A whole answer; one record for each sample.

        thinking : None: there are no thoughts
        separate : tell them apart
        """
        choices = []
        for index, record in enumerate(records):
            content: dict[str, Any] = {"text": record.text}
            if self.kind == "chat":
                parts = _message(record.text, thinking if separate else None)
                content = {"message": {"role": "assistant", **parts}}
            choices.append(
                {
                    "index": index,
                    **content,
                    "logprobs": None,
                    "finish_reason": record.finish_reason,
                }
            )
        return {
            **self._head(_OBJECT[self.kind]),
            "choices": choices,
            "usage": usage(records, thinking),
            "vase": _vase(records),
        }

    def role(self, index: int) -> dict[str, Any]:
        """The first chunk of a sample of a chat."""
        return self._chunk(index, _delta(role="assistant", content=""), None)

    def text(self, index: int, text: str) -> dict[str, Any]:
        """A chunk of a sample's text."""
        content = _delta(content=text) if self.kind == "chat" else {"text": text}
        return self._chunk(index, content, None)

    def reasoning(self, index: int, text: str) -> dict[str, Any]:
        """A chunk of what a sample of a chat thinks."""
        return self._chunk(index, _delta(reasoning_content=text), None)

    def finish(self, index: int, record: Record) -> dict[str, Any]:
        """The last chunk of a sample; its record is durable."""
        content = _delta() if self.kind == "chat" else {"text": ""}
        return {
            **self._chunk(index, content, record.finish_reason),
            "vase": _vase([record]),
        }

    def usage(self, records: Sequence[Record], thinking: Thinking | None) -> dict[str, Any]:
        """The chunk that ends a stream with `include_usage`."""
        head = self._head(_CHUNK_OBJECT[self.kind])
        return {**head, "choices": [], "usage": usage(records, thinking)}

    def _chunk(self, index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        return {**self._head(_CHUNK_OBJECT[self.kind]), "choices": [choice]}

    def _head(self, object_: str) -> dict[str, Any]:
        return {
            "id": _PREFIX[self.kind] + self.request_id,
            "object": object_,
            "created": self.created,
            "model": self.model,
        }


def _delta(**fields: str) -> dict[str, Any]:
    """What a chunk adds to a chat; `reasoning_content` is always named.

    OpenAI's clients do not know that field: where it is left out, reading it raises.
    """
    return {"delta": {"reasoning_content": None, **fields}}


def _message(text: str, thinking: Thinking | None) -> dict[str, Any]:
    parts = Splitter(thinking).take(text, final=True)
    return {"content": parts.content, "reasoning_content": parts.reasoning or None}


def usage(records: Sequence[Record], thinking: Thinking | None) -> dict[str, Any]:
    """Tokens read and written; the prompt counts once, however many samples it has.

    Those of thoughts are told where a thought can be, if they are known of every sample.
    """
    prompt = len(records[0].prompt_token_ids)
    completion = sum(len(record.output_token_ids) for record in records)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if thinking is not None:
        thoughts = [thought_tokens(r.text, r.output_token_ids, thinking) for r in records]
        known = [tokens for tokens in thoughts if tokens is not None]
        if len(known) == len(thoughts):
            counts["completion_tokens_details"] = {"reasoning_tokens": sum(known)}
    return counts


def error(
    problem: GatewayError, call: Call | None = None
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """HTTP status, headers and body of a failure. `call`: what was asked for, once it is known."""
    status, kind = _ERRORS.get(problem.code.name, (500, "api_error"))
    headers = {} if problem.request_id is None else {REQUEST_ID: problem.request_id}
    if problem.final:
        headers["x-should-retry"] = "false"  # OpenAI's own clients try every 5xx again
    if problem.retry_seconds is not None:
        headers["Retry-After"] = str(max(int(-(-problem.retry_seconds // 1)), 1))
        # Read first by OpenAI's own clients.
        headers["retry-after-ms"] = str(int(problem.retry_seconds * 1000))
    text = str(problem) if call is None else in_http_names(str(problem), call)
    return status, headers, error_body(text, kind, problem.code.name)


def error_body(message: str, kind: str, code: str) -> dict[str, Any]:
    """OpenAI's error object; the parameter at fault begins the text of the message."""
    parameter, colon, _ = message.partition(":")
    named = kind == "invalid_request_error" and colon and " " not in parameter
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": parameter if named else None,
            "code": code.lower(),
        }
    }


def _vase(records: Sequence[Record]) -> dict[str, Any]:
    """Ids of the records, and what the caches came to."""
    return {
        "request_ids": [record.record_id for record in records],
        "cache": [dataclasses.asdict(r.cache) if r.cache else None for r in records],
    }
