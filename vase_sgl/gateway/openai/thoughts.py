"""Text of a thinking model: what it thinks, and what it answers."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from vase_sgl.gateway.deltas import beginning_at_end
from vase_sgl.gateway.workers import Thinking

#: Blanks that may stand before a thought's start, far more than a model writes there. They are held
#: until it is known what follows; without an end of that, a stream of blanks would never be sent.
MAX_BLANKS = 64


class Parts(NamedTuple):
    """A piece of text, told apart."""

    reasoning: str = ""
    content: str = ""


class _Place(enum.Enum):
    BEFORE = enum.auto()  # a thought may begin
    OPENING = enum.auto()  # a thought has begun; its start may be repeated
    THOUGHT = enum.auto()
    CONTENT = enum.auto()


class Splitter:
    """Tells thought and answer of a growing text apart, as SGLang's plain detectors do.

    One thought, at the text's beginning, possibly opened by the prompt; without its end all is
    thought. Only markers are left out: blanks around them stay.
    """

    def __init__(self, thinking: Thinking | None) -> None:
        """None: all text is content."""
        self._start = self._end = self._held = ""
        self._place = _Place.CONTENT
        #: A thought has begun, and has ended.
        self.began = self.ended = False
        if thinking is not None:
            self._start, self._end = thinking.start, thinking.end
            self._place = _Place.OPENING if thinking.begun else _Place.BEFORE
            self.began = thinking.begun

    def take(self, text: str, *, final: bool = False) -> Parts:
        """What is known of the text with this piece of it; nothing is held back if `final`.

        What may be the beginning of a marker is held until it is known.
        """
        start, end = self._start, self._end
        held, reasoning, content = self._held + text, "", ""
        if self._place is _Place.BEFORE:
            bare = held.lstrip()
            blanks = len(held) - len(bare)
            if blanks <= MAX_BLANKS and bare.startswith(start):
                reasoning, held = held[:blanks], bare
                self._place = _Place.OPENING
                self.began = True
            elif final or blanks > MAX_BLANKS or not start.startswith(bare):
                self._place = _Place.CONTENT
        if self._place is _Place.OPENING:
            while held.startswith(start):
                held = held.removeprefix(start)
            if final or not start.startswith(held):
                self._place = _Place.THOUGHT
        if self._place is _Place.THOUGHT:
            thought, found, rest = held.partition(end)
            if found:
                self._place = _Place.CONTENT
                self.ended = True
            elif not final:
                cut = len(thought) - beginning_at_end(thought, [end])
                thought, rest = thought[:cut], thought[cut:]
            reasoning, held = reasoning + thought, rest
        if self._place is _Place.CONTENT:
            content, held = held, ""
        self._held = held
        return Parts(reasoning, content)


def thought_tokens(text: str, token_ids: Sequence[int], thinking: Thinking) -> int | None:
    """How many tokens of an answer are its thought, markers included, as SGLang counts them.

    All, if the thought does not end. None: the tokens do not show where it does, because the model
    wrote the end in other ones, or the worker does not tell them.
    """
    splitter = Splitter(thinking)
    splitter.take(text, final=True)
    if not splitter.began:
        return 0
    if not splitter.ended:
        return len(token_ids)
    end, size = thinking.end_ids, len(thinking.end_ids)
    starts = (i for i, token in enumerate(token_ids) if end and token == end[0])
    return next((i + size for i in starts if tuple(token_ids[i : i + size]) == end), None)
