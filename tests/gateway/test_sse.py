"""Server-sent events over arbitrary block boundaries."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vase_sgl.gateway import sse

BODY = b'data: {"a": 1}\n\n: a comment\ndata: {"b": "\xc3\xa9"}\r\n\r\ndata: [DONE]\n\n'


async def blocks(body: bytes, sizes: list[int]) -> AsyncIterator[bytes]:
    while body:
        size = sizes.pop() if sizes else len(body)
        yield body[:size]
        body = body[size:]


@given(sizes=st.lists(st.integers(1, 9), max_size=40))
async def test_boundaries_do_not_matter(sizes: list[int]) -> None:
    found = [event async for events in sse.events(blocks(BODY, sizes)) for event in events]
    assert found == [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"[DONE]"]


async def test_an_endless_event_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        _ = [event async for event in sse.events(blocks(b"data: " + b"x" * 200, [50] * 4))]


async def test_many_events_may_be_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    body = b"data: " + b"x" * 20 + b"\n\n"
    found = [event async for events in sse.events(blocks(body * 30, [7] * 120)) for event in events]
    assert found == [b"x" * 20] * 30
