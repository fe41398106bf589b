"""Fields that a request has and this version does not know, as a newer client may send.

Protobuf sets them aside without a word, and the answer would be one without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.message import Message

from vase_sgl import __version__
from vase_sgl.gateway.errors import InvalidRequest


def parse_known(parse: Callable[[bytes], Message], content: bytes) -> Message:
    """The request, of which every field is known, in all its parts.

    Raises `InvalidRequest` if one is not, and what `parse` raises.
    """
    request = parse(content)
    # The whole by code in C: a chat may hold millions of messages, and they are counted later.
    if _drop_unknown(request):
        place = _place_of_unknown(parse(content), ())
        assert place is not None, "what the whole has is in one of its parts"
        path, part = place
        raise InvalidRequest(
            f"{'.'.join(path) or 'the request'}: it has a field that this gateway, of vase_sgl "
            f"{__version__}, does not know; known are {_names(part.DESCRIPTOR.fields)}. Leave the "
            "field out, or call a gateway of the client's version"
        )
    return request


def _drop_unknown(message: Message) -> bool:
    """Whether there were unknown fields, in whatever part; they are gone."""
    size = message.ByteSize()
    message.DiscardUnknownFields()
    return message.ByteSize() != size


def _place_of_unknown(
    message: Message, path: tuple[str, ...]
) -> tuple[tuple[str, ...], Message] | None:
    """The innermost part with an unknown field, and its path; items of lists belong to theirs.

    Drops them on its way.
    """
    for field, value in message.ListFields():
        if field.message_type is not None and not field.is_repeated:
            place = _place_of_unknown(value, (*path, field.name))
            if place is not None:
                return place
    return (path, message) if _drop_unknown(message) else None


def _names(fields: Iterable[Any]) -> str:
    """The names of a message's fields, and behind a list of messages theirs."""
    return ", ".join(
        f"{field.name} ({_names(field.message_type.fields)})"
        if field.is_repeated and field.message_type is not None
        else str(field.name)
        for field in fields
    )
