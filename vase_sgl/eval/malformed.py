"""Is an answer malformed? Four signs, each found by itself.

- `truncated`: it ended at the token limit
- `unclosed_think`: a think block was opened and never closed
- `invalid_utf8`: it holds U+FFFD, which detokenizers put for bytes that are no UTF-8, an unpaired
  surrogate, or, given as bytes, is no UTF-8
- `no_final_answer`: the task's grader found no final answer

An answer that was truncated may have the others as a consequence; the signs are not exclusive.
"""

from __future__ import annotations

from typing import Literal

from vase_sgl.eval.answers import THINK_CLOSE, THINK_OPEN
from vase_sgl.eval.items import Grade

Sign = Literal["truncated", "unclosed_think", "invalid_utf8", "no_final_answer"]


def malformed(
    text: str | bytes, *, finish_reason: str | None, grade: Grade | None = None
) -> list[Sign]:
    """The signs found, in the order of the list above; empty for a well-formed answer.

    Args:
        text: the whole answer, from the opening of its think block on.
        finish_reason: as the client reports it; `length` is a truncation.
        grade: of the same text; None where the task has no final answer.
    """
    signs: list[Sign] = []
    if finish_reason == "length":
        signs.append("truncated")
    readable = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if readable.rfind(THINK_CLOSE) < readable.rfind(THINK_OPEN):
        signs.append("unclosed_think")
    if "\N{REPLACEMENT CHARACTER}" in readable or any(0xD800 <= ord(c) <= 0xDFFF for c in readable):
        signs.append("invalid_utf8")
    if grade is not None and grade.extracted is None:
        signs.append("no_final_answer")
    return signs
