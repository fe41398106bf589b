"""The asyncio client and the event loop it belongs to."""

from __future__ import annotations

import asyncio
import gc
import sys

import pytest

from vase_sgl.client import AsyncClient, AsyncGeneration, VaseError


def test_without_a_running_loop_it_says_where_to_make_it() -> None:
    """It would bind another loop than the one that asyncio.run makes, and every call would fail."""
    with pytest.raises(VaseError, match="make an AsyncClient inside a coroutine"):
        AsyncClient("127.0.0.1:9")


def test_letting_go_after_the_loop_is_closed_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def begun() -> AsyncGeneration:
        return AsyncClient("127.0.0.1:9").generate("a")

    held = [asyncio.run(begun())]
    errors: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    held.clear()
    gc.collect()
    assert errors == []
