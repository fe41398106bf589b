"""A streaming answer on a terminal: text as it comes, and the cache beside it."""

from __future__ import annotations

import re
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from vase_sgl.client import CacheStats, Chunk


#: What a terminal may take for a command: control characters but tab, line feed and carriage return
#: (which rich leaves out).
_COMMANDS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class StreamView:
    """Writes chunks to `console`; while it is a terminal, keeps a status line under the text.

    A terminal is shown `\\u001b` for control characters, since no answer may steer it; a pipe gets
    the text as it is. Full lines scroll away above; only the line being written and the status are
    redrawn.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = ""
        self._tokens = 0
        self._cache: CacheStats | None = None
        self._live = (
            Live(console=console, transient=True, auto_refresh=False)
            if console.is_terminal
            else None
        )

    def add(self, chunk: Chunk) -> None:
        """Show new output."""
        self._tokens += len(chunk.token_ids)
        self._cache = chunk.cache
        if self._live is None:
            self._console.file.write(chunk.text)
            self._console.file.flush()
            return
        self._line += _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", chunk.text)
        self._scroll_full_lines()
        status = Text(status_line(self._cache, self._tokens), style="dim", overflow="ellipsis")
        self._live.update(Group(Text(self._line), status), refresh=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._console.print(Text(self._line))
        else:
            self._console.file.write("\n")

    def _scroll_full_lines(self) -> None:
        width = self._console.width
        while True:
            newline = self._line.find("\n")
            if newline >= 0:
                full, self._line = self._line[:newline], self._line[newline + 1 :]
            elif len(self._line) > width:
                # Break where a word ends; a word longer than the line breaks anywhere.
                cut = self._line.rfind(" ", 1, width + 1)
                cut = cut if cut > 0 else width
                full, self._line = self._line[:cut], self._line[cut:].removeprefix(" ")
            else:
                return
            self._console.print(Text(full))


def status_line(cache: CacheStats | None, output_tokens: int) -> str:
    """The state of a running generation in one line."""
    if cache is None:
        return f"{output_tokens} tokens, full cache"
    return (
        f"logical {cache.logical_length} | physical {cache.physical_length} | "
        f"rounds {cache.rounds} | slots reserved {cache.reserved_slots} | {cache.digest}"
    )
