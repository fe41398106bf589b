"""What is found out about an answer: its grade, its loops, the faults of its form."""

from __future__ import annotations

from vase_sgl.eval.answers import THINK_OPEN
from vase_sgl.eval.items import Item, Task
from vase_sgl.eval.loops import detect_loop, words
from vase_sgl.eval.malformed import malformed
from vase_sgl.eval.targets import Answer


def assess(task: Task, item: Item, answer: Answer, *, opens_think: bool) -> dict[str, object]:
    """The fields of a row that the text decides. May take seconds: grading may run programs.

    opens_think: as in `vase_sgl.eval.targets.Sampling`; a thought that never ends is no answer
    then.
    """
    text = THINK_OPEN + answer.text if opens_think else answer.text
    grade = task.grade(item, text)
    loop = detect_loop(words(answer.text))
    return {
        "correct": grade.correct,
        "extracted": grade.extracted,
        "grade_reason": grade.reason,
        "loop": loop is not None,
        "loop_start": None if loop is None else loop.start,
        "loop_period": None if loop is None else loop.period,
        "malformed": malformed(text, finish_reason=answer.finish_reason, grade=grade),
    }
