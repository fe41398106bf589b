"""The demo's stream: text as it comes, the cache beside it, and a mark for every round."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console

from vase_sgl.cli.stream_view import StreamView, status_line
from vase_sgl.client import Chunk


class RoundView:
    """On a terminal a live status line (`StreamView`); elsewhere a line after every round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = StreamView(console)
        self._rounds = 0
        self._tokens = 0

    def add(self, chunk: Chunk) -> None:
        self._live.add(chunk)
        self._tokens += len(chunk.token_ids)
        if not self._console.is_terminal and chunk.cache and chunk.cache.rounds > self._rounds:
            self._rounds = chunk.cache.rounds
            self._console.file.write(f"\n    [{status_line(chunk.cache, self._tokens)}]\n")

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, traceback)
