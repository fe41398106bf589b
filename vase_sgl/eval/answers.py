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

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
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
    for opening in reversed(list(_BOX.finditer(text))):
        depth = 1
        for index in range(opening.end(), len(text)):
            if text[index - 1] == "\\" and text[index] in "{}":
                continue  # an escaped brace is part of the answer
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[opening.end() : index].strip() or None
    return None
