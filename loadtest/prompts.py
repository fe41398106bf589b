"""Where prompts come from: made up, or a JSONL file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtest.problems import BadSetup, explained, read_text
from vase_sgl.client import Message, Prompt

SYNTHETIC = "synthetic"

#: Each is one token, with the blank before it, in the usual byte-pair vocabularies.
_TEXT = (
    "about after again against almost always answer because before begin between both bring "
    "build call change city clear close common country course different does earth each early "
    "end enough every example face family find first follow form found give good great group "
    "hand head help high home house important idea keep kind know land large last later learn "
    "leave life light line list little long look main make many mean might more most move much "
    "must name near need never next night number often only open order other part people place "
    "plan play point problem question read real right river room school second see seem sentence "
    "set several show side simple small some sound still stop story study system take tell thing "
    "think time together tree turn under until use very walk want water way white whole why word "
    "work world write year young"
)
_WORDS = _TEXT.split()


class Source(Protocol):
    """Draws prompts. `max_new_tokens` is None where the source leaves it to the options."""

    def draw(self, rng: random.Random) -> tuple[Prompt, int | None]:
        """A prompt, and how many tokens its answer may have."""


class Synthetic:
    """Words at random, about one token each; no two prompts are alike."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def draw(self, rng: random.Random) -> tuple[Prompt, int | None]:
        return " ".join(rng.choices(_WORDS, k=self._tokens)), None


class _ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = Field(default=None, min_length=1)
    messages: tuple[_ChatMessage, ...] | None = Field(default=None, min_length=1)
    token_ids: tuple[int, ...] | None = Field(default=None, min_length=1)
    max_new_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> _Line:
        if sum(form is not None for form in (self.text, self.messages, self.token_ids)) != 1:
            raise ValueError("give one of text, messages and token_ids")
        return self

    @property
    def prompt(self) -> Prompt:
        if self.messages is not None:
            return [Message(role=m.role, content=m.content) for m in self.messages]
        return self.text or self.token_ids or ""


class Recorded:
    """The lines of a JSONL file, drawn at random with replacement."""

    def __init__(self, lines: Sequence[_Line]) -> None:
        self._lines = lines

    def draw(self, rng: random.Random) -> tuple[Prompt, int | None]:
        line = rng.choice(self._lines)
        return line.prompt, line.max_new_tokens


def read_jsonl(path: Path) -> Recorded:
    """One object a line: `text`, `messages` or `token_ids`, and perhaps `max_new_tokens`.

    Raises `BadSetup` with the number of the line.
    """
    lines = []
    for number, line in enumerate(read_text(path, "prompt file").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            lines.append(_Line.model_validate(json.loads(line)))
        except json.JSONDecodeError as error:
            raise BadSetup(f"{path}:{number}: not JSON: {error}") from error
        except ValidationError as error:
            raise BadSetup(f"{path}:{number}: {explained(error)}") from error
    if not lines:
        raise BadSetup(f"prompt file {path} has no prompts")
    return Recorded(lines)
