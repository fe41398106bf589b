"""The rule that finds a final answer."""

from __future__ import annotations

import pytest

from vase_sgl.eval.answers import after_thinking, final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"first \boxed{4}, no: \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"\boxed{}", None),
        (r"\boxed{\boxed{1} + \{2\}}", "1"),
        (r"\boxed{1 \\} and more}", r"1 \\"),
        (r"<think>\boxed{1}</think> it is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> it is two", None),
        (r"<think>\boxed{1}", None),
        (r"\boxed{1}</think> The final answer is 2.", "2"),
        ("Final Answer: 42", "42"),
        ("**Final answer:** 42", "42"),
        ("The final answer is: $12$\nI hope this helps.", "$12$"),
        ("final answer: 3\nNo. The final answer is -7.5.", "-7.5"),
        (r"The final answer is $\boxed{9}$", "9"),
        ("It is 42.", None),
        ("The final answer", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_thinking_is_cut_off() -> None:
    assert after_thinking("<think>a</think>b") == "b"
    assert after_thinking("a</think>b</think>c") == "c"
    assert after_thinking("<think>a</think>b<think>c") == "b"
    assert after_thinking("<think>a") == ""
    assert after_thinking("a") == "a"
