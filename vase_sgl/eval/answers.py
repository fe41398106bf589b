r"""Finding the final answer in a model's text.

Rule, the same for every task that asks for one:

1. Only what follows the last `</think>` counts. A think block that is opened and not closed leaves
   nothing. A text without think marks counts whole.
2. The content of the last complete `\boxed{...}` (or `\fbox{...}`) with balanced braces.
3. Else what follows the last "final answer" (any case), after an optional "is", ":" or "=", to
   the end of that line.
4. Else there is no final answer. A number somewhere in the text is not one.
"""

from __future__ import annotations

import re

#: What decides where a box ends: backslashes, then perhaps a box's opening or a brace; or a brace.
_TOKEN = re.compile(r"(\\+)(?:((?:boxed|fbox)\s*\{)|([{}]))?|([{}])")
_FINAL = re.compile(r"final answer\W{0,4}?\s*(?:is\b)?\s*[:=]?[ \t*]*(?P<answer>[^\n]*)", re.I)

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


def after_thinking(text: str) -> str:
    """The part of `text` that is the answer proper; empty if a think block is left open."""
    visible = text.rpartition(THINK_CLOSE)[2]
    return visible.partition(THINK_OPEN)[0] if THINK_OPEN in visible else visible


def closes_unopened(text: str) -> bool:
    """Whether it begins inside a think block that it did not open."""
    return THINK_CLOSE in text.partition(THINK_OPEN)[0]


def final_answer(text: str) -> str | None:
    """The final answer by the rule of this module, stripped; None if there is none."""
    visible = after_thinking(text)
    boxed = _last_boxed(visible)
    if boxed is not None:
        return boxed
    stated = list(_FINAL.finditer(visible))
    if not stated:
        return None
    answer = stated[-1]["answer"].strip().rstrip(".").strip("* ").strip()
    return answer or None


def _last_boxed(text: str) -> str | None:
    """In one pass: a model in a loop opens thousands of boxes and closes none."""
    start, end = -1, -1
    open_braces: list[int | None] = []  # where the content of a box begins; None: another brace
    for token in _TOKEN.finditer(text):
        slashes, box, after, brace = token.groups()
        if slashes is not None and len(slashes) % 2 == 0:
            brace = after  # it is not escaped: the backslashes are pairs
        if box is not None:
            open_braces.append(token.end())
        elif brace == "{":
            open_braces.append(None)
        elif brace == "}" and open_braces:
            begun = open_braces.pop()
            if begun is not None and begun > start:
                start, end = begun, token.end() - 1
    return text[start:end].strip() or None if start >= 0 else None
