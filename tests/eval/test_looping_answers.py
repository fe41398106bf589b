"""Graders read what a model in a loop writes in time that grows with its length alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from vase_sgl.eval.answers import final_answer
from vase_sgl.eval.items import Grade, Item
from vase_sgl.eval.loops import detect_loop, words
from vase_sgl.eval.tasks import choice, code, passkey, state_tracking
from vase_sgl.eval.tasks.spec import parse_task
from vase_sgl.eval.trace import TraceTask

#: Characters of an answer of some 30,000 tokens.
LENGTH = 120_000
LOOPS = [
    *("\n", "* \n", "step ", "passkey ", "a = ", "\\", "{", "}", "\\boxed{x", "\\text{", "$"),
    *("```\n", "```python\n", "```python\ndef f():\n", "final answer", "final answer: "),
    *("<think>", "</think>", "<tool_call>{", "<tool_call>{}", "<tool_call>\n{\n", "[", "1, ", "."),
]
NESTED = "\\boxed{" + "\\text{" * (LENGTH // 14) + "A" + "}" * (LENGTH // 14) + "}"


def graders() -> dict[str, Callable[[str], object]]:
    key = passkey.open_task(parse_task("passkey"))
    state = state_tracking.open_task(parse_task("state-tracking"))
    letters = choice.ChoiceTask("choice", [])
    two = Item("choice", "0", (), "A", {"choices": "2", "choice_texts": "x\x1fy"})

    def called(text: str) -> Grade:
        return TraceTask("trace", ()).grade(Item("trace", "0", (), "[]", {}), text)

    return {
        "final answer": final_answer,
        "passkey": lambda text: key.grade(key.items(1, 0)[0], text),
        "state": lambda text: state.grade(state.items(1, 0)[0], text),
        "choice": lambda text: letters.grade(two, text),
        "code": lambda text: code._code(text, "f"),
        "trace": called,
        "loops": lambda text: detect_loop(words(text)),
    }


GRADERS = graders()


@pytest.mark.parametrize("grader", GRADERS)
def test_no_answer_takes_long(grader: str) -> None:
    for loop in LOOPS:
        begun = time.process_time()
        GRADERS[grader](loop * (LENGTH // len(loop)))
        assert time.process_time() - begun < 2, repr(loop)
    begun = time.process_time()
    GRADERS[grader](NESTED)
    assert time.process_time() - begun < 2


def test_a_call_without_an_end_of_its_json_is_none() -> None:
    task, item = TraceTask("trace", ()), Item("trace", "0", (), "[]", {})
    for text in ("<tool_call>", '<tool_call>{"name": "a"}', "<tool_call>[1]</tool_call>", "["):
        grade = task.grade(item, text)
        assert grade.correct is ("tool_call" not in text)
    deep = '<tool_call>{"name": "a", "arguments": ' + "[" * 100_000
    assert "a tool call is not JSON" in task.grade(item, deep).reason
