"""Recorded agent conversations as a task: every assistant turn is asked for again.

A line of the file is a conversation in OpenAI's form: `{"messages": […], "tools": […], "id": …}`,
or the list of messages alone. Its recorded messages are the context of every turn, whatever an arm
generates, so that arms are compared on the same questions.

Tools go to the model as text, in the form of the Hermes and Qwen chat templates, because chat
templates disagree about tool messages and a gateway's messages are text: signatures in the system
message inside `<tools>`, calls as `<tool_call>` with a JSON object, results in a user message as
`<tool_response>`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vase_sgl.client.types import Message
from vase_sgl.eval.answers import after_thinking
from vase_sgl.eval.items import Grade, Item

#: Begins the name of every such task.
PREFIX = "trace:"

_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
_OPENING = re.compile(r"<tool_call>\s*")
_CLOSING = re.compile(r"\s*</tool_call>")
_JSON = json.JSONDecoder()
_ROLES = ("system", "developer", "user", "assistant", "tool")


class TraceError(Exception):
    """A file of conversations is wrong. The text names the line, the message and the cure."""


def trace_of(item_id: str) -> str:
    """The conversation a turn belongs to."""
    return item_id.rpartition("#")[0]


@dataclasses.dataclass(frozen=True)
class TraceTask:
    """The assistant turns of the conversations of a file, as a `vase_sgl.eval.items.Task`."""

    name: str
    turns: tuple[Item, ...]

    @classmethod
    def read(cls, path: Path, limit: int | None = None) -> TraceTask:
        """The first `limit` conversations of a file. Raises `TraceError`."""
        name = f"{PREFIX}{path.name}"
        turns: list[Item] = []
        seen: set[str] = set()
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"cannot read {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip() or (limit is not None and len(seen) >= limit):
                continue
            try:
                trace, found = _turns(name, f"line{number}", json.loads(line))
            except ValueError as error:
                raise TraceError(f"{path}, line {number}: {error}") from error
            if trace in seen:
                raise TraceError(f"{path}, line {number}: the id {trace!r} is there twice")
            seen.add(trace)
            turns += found
        if not turns:
            raise TraceError(f"{path} holds no conversation")
        return cls(name, tuple(turns))

    def items(self, limit: int | None, seed: int) -> Sequence[Item]:
        """Every turn, in order; `limit` turns at most. Nothing depends on the seed."""
        return self.turns[:limit]

    def grade(self, item: Item, text: str) -> Grade:
        """Right if the text calls the tools that the recorded turn called, and no others.

        Order counts, and arguments are compared as JSON values: 1 is 1.0, but not true. Calls
        inside a thought do not.
        """
        called, broken = _called(after_thinking(text))
        if broken:
            return Grade(False, None, f"a tool call is not JSON: {broken[:80]}")
        extracted = _canonical(called)
        wanted = json.loads(item.answer)
        if _same(called, wanted):
            return Grade(True, extracted, f"{len(wanted)} tool calls as recorded")
        names = ", ".join(call["name"] for call in called) or "none"
        recorded = ", ".join(call["name"] for call in wanted) or "none"
        return Grade(False, extracted, f"called {names}; recorded were {recorded}")


def _turns(task: str, default_id: str, raw: object) -> tuple[str, list[Item]]:
    """Id and turns of one conversation. Raises `ValueError`."""
    if isinstance(raw, list):
        raw = {"messages": raw}
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        raise ValueError("is not a conversation: it needs a list `messages`")
    trace = str(raw.get("id", default_id))
    context: list[Message] = []
    if tools := raw.get("tools"):
        signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        context.append(Message(role="system", content=_TOOLS.format(signatures=signatures)))
    turns: list[Item] = []
    for index, message in enumerate(raw["messages"]):
        try:
            role, content, calls = _message(message)
        except ValueError as error:
            raise ValueError(f"message {index} {error}") from error
        if role == "assistant" and context:
            turns.append(
                Item(
                    task=task,
                    item_id=f"{trace}#{index}",
                    messages=tuple(context),
                    answer=_canonical(calls),
                    metadata={"trace": trace, "message": str(index)},
                )
            )
        _add(context, role, content)
    if not turns:
        raise ValueError("has no assistant turn after another message")
    return trace, turns


def _message(raw: object) -> tuple[str, str, list[dict[str, Any]]]:
    """Role, text and tool calls of a recorded message."""
    if not isinstance(raw, dict) or raw.get("role") not in _ROLES:
        raise ValueError(f"needs a role of {', '.join(_ROLES)}")
    if raw.get("function_call"):
        raise ValueError("has the old `function_call`; write it as `tool_calls`")
    content = _text(raw.get("content"))
    calls = [_call(call) for call in raw.get("tool_calls") or ()]
    if calls and raw["role"] != "assistant":
        raise ValueError("has tool_calls, but is not the assistant's")
    if raw["role"] == "tool":
        return "user", f"<tool_response>\n{content}\n</tool_response>", []
    written = [f"<tool_call>\n{json.dumps(c, ensure_ascii=False)}\n</tool_call>" for c in calls]
    role = "system" if raw["role"] == "developer" else raw["role"]
    return role, "\n".join(filter(None, (content, *written))), calls


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return "".join(str(part["text"]) for part in content)
    raise ValueError("has a content that is not text; images and audio cannot be replayed")


def _call(raw: object) -> dict[str, Any]:
    try:
        function = raw["function"]  # type: ignore[index]
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        return {"name": str(function["name"]), "arguments": arguments}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"has a tool call without a name, or its arguments are no JSON: {raw}"
        ) from error


def _add(context: list[Message], role: str, content: str) -> None:
    """Append, joining what one party says in a row: templates want turns to alternate."""
    if context and context[-1]["role"] == role:
        last = context.pop()
        content = "\n".join(filter(None, (last["content"], content)))
    context.append(Message(role=role, content=content))


def _called(text: str) -> tuple[list[dict[str, Any]], str]:
    """The calls in a generated text, and the first that cannot be read."""
    calls: list[dict[str, Any]] = []
    opening = _OPENING.search(text)
    while opening is not None:
        try:
            raw, end = _JSON.raw_decode(text, opening.end())
            calls.append({"name": str(raw["name"]), "arguments": raw.get("arguments") or {}})
        except (ValueError, KeyError, TypeError, RecursionError):
            return calls, text[opening.start() :]
        closing = _CLOSING.match(text, end)
        if closing is None:
            return calls, text[opening.start() :]
        opening = _OPENING.search(text, closing.end())
    return calls, ""


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON values. Python's `==` takes true for 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _canonical(calls: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(calls, sort_keys=True, ensure_ascii=False)
