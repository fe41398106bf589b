"""Signs of a malformed answer, one by one and together."""

from __future__ import annotations

import pytest

from vase_sgl.eval.items import Grade
from vase_sgl.eval.malformed import malformed

_FOUND = Grade(True, "5", "")
_NOTHING = Grade(False, None, "no final answer")


@pytest.mark.parametrize(
    ("text", "reason", "grade", "signs"),
    [
        ("<think>2 + 3</think>\\boxed{5}", "stop", _FOUND, []),
        ("2 + 3</think>\\boxed{5}", "stop", _FOUND, []),
        ("plain", "stop", None, []),
        ("Ünïcödé 思考 😀", "stop", None, []),
        ("<think>2 + 3 is", "stop", _NOTHING, ["unclosed_think", "no_final_answer"]),
        ("<think>2", "length", _NOTHING, ["truncated", "unclosed_think", "no_final_answer"]),
        ("<think>a</think> b <think>c", "stop", None, ["unclosed_think"]),
        ("the end \ufffd", "stop", None, ["invalid_utf8"]),
        ("half \ud83d", "stop", None, ["invalid_utf8"]),
        (b"cut \xe6\x80", "stop", None, ["invalid_utf8"]),
        (b"whole \xe6\x80\x9d", "stop", None, []),
        ("", "stop", _NOTHING, ["no_final_answer"]),
        ("so the", "length", None, ["truncated"]),
    ],
)
def test_signs(text: str | bytes, reason: str, grade: Grade | None, signs: list[str]) -> None:
    assert malformed(text, finish_reason=reason, grade=grade) == signs
