"""The view of a stream on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from vase_sgl.cli.stream_view import StreamView
from vase_sgl.client import CacheStats, Chunk

CACHE = CacheStats(700, 150, 18, 550, 160, "0123456789abcdef")


def show(*texts: str, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=40, color_system=None)
    with StreamView(console) as view:
        for text in texts:
            view.add(Chunk(text, (1,), CACHE))
    return output.getvalue()


def test_without_a_terminal_only_the_text_is_written() -> None:
    assert show("[bold]one ", "two\nthree", terminal=False) == "[bold]one two\nthree\n"


def test_an_answer_does_not_steer_a_terminal() -> None:
    hostile = "\x1b]0;title\x07 \x1b[2J \x9b31m \x00\x7f tab\tend\r\nnext"
    written = show(hostile[:1], hostile[1:], terminal=True)
    text = " ".join(screen(written))
    assert "\\u001b]0;title\\u0007 \\u001b[2J \\u009b31m" in text.replace("\\ ", "\\")
    assert not set(re.sub(r"\x1b\[\??\d*[A-Za-z]", "", written)) & set("\x1b\x9b\x07\x00\x7f")
    assert "\x1b[2J" not in written
    assert show(hostile, terminal=False) == hostile + "\n"


def screen(written: str) -> list[str]:
    """What a terminal shows in the end: interprets what rich uses to redraw."""
    lines, row = [""], 0
    for code, text in re.findall(r"(\x1b\[\??\d*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", written):
        if text:
            lines[row] += text
        elif code == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif code == "\x1b[1A":
            row -= 1
        elif code == "\x1b[2K":
            lines[row] = ""
    return [line.rstrip() for line in lines]


def test_a_terminal_keeps_the_text_and_drops_the_status() -> None:
    words = [f"word{n}" for n in range(20)]
    written = show("first [x]\n", *(f"{word} " for word in words), "\n\nlast", terminal=True)
    assert "logical 700 | physical 150 | rounds" in written
    shown = screen(written)
    text = " ".join(shown)
    assert shown[0] == "first [x]" and text.split() == ["first", "[x]", *words, "last"]
    assert "logical" not in text
    assert all(len(line) <= 40 for line in shown)
