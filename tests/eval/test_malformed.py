"""Signs of a malformed answer, one by one and together."""

from __future__ import annotations

import pytest

from vase_sgl.eval.items import Grade
from vase_sgl.eval.malformed import malformed

_FOUND = Grade(True, "5", "")
_NOTHING = Grade(False, None, "no final answer")


@pytest.mark.parametrize(
    ("text", "reason", "grade", "thinking", "signs"),
    [
        ("<think>2 + 3</think>\\boxed{5}", "stop", _FOUND, False, []),
        ("2 + 3</think>\\boxed{5}", "stop", _FOUND, True, []),
        ("plain", "stop", None, False, []),
        ("Ünïcödé 思考 😀", "stop", None, False, []),
        ("<think>2 + 3 is", "stop", _NOTHING, False, ["unclosed_think", "no_final_answer"]),
        ("2 + 3 is", "length", _NOTHING, True, ["truncated", "unclosed_think", "no_final_answer"]),
        ("<think>a</think> b <think>c", "stop", None, False, ["unclosed_think"]),
        ("the end \ufffd", "stop", None, False, ["invalid_utf8"]),
        ("half \ud83d", "stop", None, False, ["invalid_utf8"]),
        (b"cut \xe6\x80", "stop", None, False, ["invalid_utf8"]),
        (b"whole \xe6\x80\x9d", "stop", None, False, []),
        ("", "stop", _NOTHING, False, ["no_final_answer"]),
        ("so the", "length", None, False, ["truncated"]),
    ],
)
def test_signs(
    text: str | bytes, reason: str, grade: Grade | None, thinking: bool, signs: list[str]
) -> None:
    assert malformed(text, finish_reason=reason, grade=grade, thinking=thinking) == signs
