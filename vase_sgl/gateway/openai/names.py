"""The gateway's own names of fields, as HTTP's clients know them."""

from __future__ import annotations

from vase_sgl.gateway.openai.requests import Call


def in_http_names(text: str, call: Call) -> str:
    """The text of an error about `call`. The field at fault begins it, if there is one."""
    field, colon, rest = text.partition(": ")
    return f"{_http_name(field, call)}{colon}{rest}"


def _http_name(field: str, call: Call) -> str:
    head, dot, rest = field.partition(".")
    match head:
        case "max_new_tokens":
            return call.max_tokens_field or "max_tokens"
        case "sampling":
            return rest
        case "eviction":
            return f"vase{dot}{rest}"
        case "inspect":
            return "vase.inspect"
        case "chat" if rest:
            return rest
        case "input" | "text" | "token_ids" | "chat":
            return "messages" if call.request.HasField("chat") else "prompt"
    return field
