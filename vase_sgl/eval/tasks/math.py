r"""Mathematics with one final answer: MATH-500, AIME, GSM8K.

Local formats, one JSON object a line:

- `math500`: `problem`, `answer` (LaTeX); `unique_id`, `subject`, `level` where there
- `aime`: `problem`, `answer` (a whole number from 0 to 999); `id`, `year` where there
- `gsm8k`: `question`, `answer` (a solution that ends in `#### NUMBER`, or the number); `id`

Graded by the rule of `vase_sgl.eval.answers` and `math-verify`. Where the answer is a number, a
unit behind it does not count: `18 dollars` is 18, `2 thousand dollars` is 2000. Words that make it
another number do: `2 or more`, `2x` and `2 dozen` are not 2. Where the answer is a numeral with a
base, `40_9`, neither `40` nor `40_8` is right.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from vase_sgl.eval.answers import final_answer
from vase_sgl.eval.items import NOT_COMPARED, Grade, Item
from vase_sgl.eval.math_answers import MathAnswers, shared_answers
from vase_sgl.eval.tasks.records import Row, chosen, read_rows, refuse_duplicates
from vase_sgl.eval.tasks.spec import TaskError, TaskSpec

_PROMPT = "{problem}\n\nReason step by step, and put your final answer within \\boxed{{}}."
#: How LaTeX sets blanks, and words.
_BLANK = r"(?:\\[,;: ]|~)"
_STYLED = re.compile(rf"\\(?:text|mathrm|textbf)\s*\{{([^{{}}]*)\}}|{_BLANK}")
#: A number with blanks between its thousands.
_THOUSANDS = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_BLANK}\d{{3}})+(?!\d)")
_NUMBER_AND_WORDS = re.compile(
    r"(?:\\\(|\$|\\\$|£|€)*\s*(-?\d[\d,]*(?:\.\d+)?)"  # the number
    r"(?:\\?%|\\\)|\$|\.)*((?:\\?%|\\\)|[$A-Za-z /.])*)"  # what ends it, and words
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
#: A unit: a word of two letters at least, set apart from the number; `2x` and `2 x` have none.
_UNIT = re.compile(r"\s+[A-Za-z]{2}")
#: What a unit does not have: another variable, or a word by which another number is meant.
_OTHER_NUMBER = re.compile(
    r"(?<![/A-Za-z])[A-Za-z](?![A-Za-z])|\b(?:and|dozen|factorial|least|minus|most|or|over|pi|plus"
    r"|than|to|trillion|up|squared|cubed|halves|thirds|fourths|fifths|tenths)\b",
    re.I,
)


@dataclasses.dataclass(frozen=True)
class _Format:
    """How one data set is written."""

    example: str
    problem: str
    answer: Callable[[Row], str]
    ids: tuple[str, ...]
    facts: tuple[str, ...]
    numeric: bool


def _aime_answer(row: Row) -> str:
    written = str(row.value(object, "there", "answer"))
    if not re.fullmatch(r"\d{1,3}", written):
        raise TaskError(f"{row.where}: 'answer' must be a number from 0 to 999, not {written!r}")
    return str(int(written))


def _gsm8k_answer(row: Row) -> str:
    written = row.text("answer").rpartition("####")[2].strip().replace(",", "")
    if not re.fullmatch(r"-?\d+(\.\d+)?", written):
        raise TaskError(f"{row.where}: 'answer' must end in '#### NUMBER', not {written!r}")
    return written


_FORMATS = {
    "math500": _Format(
        example='{"problem": "What is 1/2 + 1/3?", "answer": "\\\\frac{5}{6}"}',
        problem="problem",
        answer=lambda row: row.text("answer"),
        ids=("unique_id", "id"),
        facts=("subject", "level"),
        numeric=False,
    ),
    "aime": _Format(
        example='{"problem": "Find ...", "answer": 70}',
        problem="problem",
        answer=_aime_answer,
        ids=("id",),
        facts=("year",),
        numeric=True,
    ),
    "gsm8k": _Format(
        example='{"question": "Ann has 3 ...", "answer": "3 + 4 = 7\\n#### 7"}',
        problem="question",
        answer=_gsm8k_answer,
        ids=("id",),
        facts=(),
        numeric=True,
    ),
}


def open_task(spec: TaskSpec) -> MathTask:
    """The task for a parsed `math500:...`, `aime:...` or `gsm8k:...`."""
    written = _FORMATS[spec.name]
    items = [_item(spec.name, written, row) for row in read_rows(spec, written.example)]
    refuse_duplicates(items)
    return MathTask(spec.name, items, written.numeric, shared_answers())


class MathTask:
    """Problems whose final answer is compared as mathematics.

    Args:
        name: the task's name.
        items: every item of the data.
        numeric: answers are numbers, so units behind them are ignored.
        answers: compares.
    """

    def __init__(
        self, name: str, items: Sequence[Item], numeric: bool, answers: MathAnswers
    ) -> None:
        self.name = name
        self._items = items
        self._numeric = numeric
        self._answers = answers

    def items(self, limit: int | None, seed: int) -> list[Item]:
        """`limit` problems drawn by `seed`, all without a limit; in the order of the data."""
        return chosen(self._items, limit, seed)

    def grade(self, item: Item, text: str) -> Grade:
        """Right if the final answer means the same as the reference."""
        answer = final_answer(text)
        if answer is None:
            return Grade(False, None, "no final answer")
        reference, compared = _joined(item.answer), _joined(answer)
        if self._numeric:
            compared = self._without_unit(compared)
        comparison = self._answers.compare(reference, compared)
        if comparison == "equal":
            return Grade(True, answer, "equal to the reference")
        if comparison != "different":
            return Grade(False, answer, f"{NOT_COMPARED}: {comparison}")
        return Grade(False, answer, f"differs from the reference {item.answer}")

    @staticmethod
    def _without_unit(answer: str) -> str:
        plain = _STYLED.sub(lambda found: f" {found[1] or ''}", answer)
        parts = _NUMBER_AND_WORDS.fullmatch(plain)
        if not parts:
            return answer
        number, words = parts[1], parts[2]
        first, _, rest = words.lstrip().partition(" ")
        if scale := _SCALES.get(first.lower()):
            number, words = str(Decimal(number.replace(",", "")) * scale), f" {rest}"
        if words.strip() and (not _UNIT.match(words) or _OTHER_NUMBER.search(words)):
            return plain
        return number


def _joined(answer: str) -> str:
    """With the thousands of a number side by side: `58\\,500` is no product."""
    return _THOUSANDS.sub(lambda found: re.sub(_BLANK, "", found[0]), answer)


def _item(task: str, written: _Format, row: Row) -> Item:
    problem = row.text(written.problem).strip()
    return Item(
        task=task,
        item_id=row.item_id(*written.ids),
        messages=({"role": "user", "content": _PROMPT.format(problem=problem)},),
        answer=written.answer(row),
        metadata=row.metadata(*written.facts),
    )
