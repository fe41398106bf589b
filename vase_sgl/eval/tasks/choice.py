r"""Multiple choice. One JSON object a line: `question`, `choices` (2 to 26 texts), `answer`, `id`.

`answer` is a letter, or a place counted from 0 as in MMLU; `id` is optional. The model puts its
letter into `\boxed{}`; by the rule of `vase_sgl.eval.answers` the final answer must be one letter,
alone, in brackets, or followed by the choice's text, all of it perhaps within `\text{}` or the
like. A full stop or blanks at the end of a choice's text do not matter.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence

from vase_sgl.eval.answers import final_answer
from vase_sgl.eval.items import Grade, Item
from vase_sgl.eval.tasks.records import Row, chosen, read_rows, refuse_duplicates
from vase_sgl.eval.tasks.spec import TaskError, TaskSpec

_EXAMPLE = '{"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}'
_PROMPT = """\
{question}

{choices}

Reason step by step, and put the letter of the right choice within \\boxed{{}}."""
_STYLE = r"\\(?:text|textbf|mathrm|mathbf)\s*\{"
_STYLED = re.compile(_STYLE)
_LETTER = re.compile(rf"(?:{_STYLE})?[\s(*\[]*([A-Za-z])\b(?P<rest>.*)", re.S)
_SEPARATORS = re.compile(r"[\s)*\]}.:]*")


def open_task(spec: TaskSpec) -> ChoiceTask:
    """The task for a parsed `choice:...`."""
    items = [_item(spec.name, row) for row in read_rows(spec, _EXAMPLE)]
    refuse_duplicates(items)
    return ChoiceTask(spec.name, items)


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """Questions with lettered choices."""

    name: str
    all_items: Sequence[Item]

    def items(self, limit: int | None, seed: int) -> list[Item]:
        """`limit` questions drawn by `seed`, all without a limit; in the order of the data."""
        return chosen(self.all_items, limit, seed)

    def grade(self, item: Item, text: str) -> Grade:
        """Right if the final answer is the right letter."""
        answer = final_answer(text)
        if answer is None:
            return Grade(False, None, "no final answer")
        found = _LETTER.fullmatch(_plain(answer))
        letters = string.ascii_uppercase[: int(item.metadata["choices"])]
        letter = found[1].upper() if found else ""
        texts = item.metadata["choice_texts"].split("\x1f")
        if not found or letter not in letters or not _is_any(("", *texts), found["rest"]):
            return Grade(False, None, f"the final answer {answer!r} is not one letter of {letters}")
        if letter == item.answer:
            return Grade(True, letter, "right choice")
        return Grade(False, letter, f"the right choice is {item.answer}")


def _is_any(texts: Sequence[str], rest: str) -> bool:
    """Whether what follows the letter is separators and one of `texts`.

    A text may begin with what separates, such as `.5`.
    """
    rest = _plain(rest)
    return any(
        rest.endswith(text) and _SEPARATORS.fullmatch(rest.removesuffix(text))
        for text in map(_plain, texts)
    )


def _plain(text: str) -> str:
    """Without styles around all of it, blanks at its ends and full stops at its end."""
    closing = _closing_braces(text)
    start, end = 0, len(text)
    while True:
        while start < end and text[start].isspace():
            start += 1
        while start < end and (text[end - 1].isspace() or text[end - 1] == "."):
            end -= 1
        styled = _STYLED.match(text, start, end)
        if not styled or closing.get(styled.end() - 1) != end - 1:
            return text[start:end]
        start, end = styled.end(), end - 1


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that opens is closed."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for place, character in enumerate(text):
        if character == "{":
            opened.append(place)
        elif character == "}" and opened:
            closing[opened.pop()] = place
    return closing


def _item(task: str, row: Row) -> Item:
    choices = row.value(list, "a list of 2 to 26 texts", "choices", check=_are_choices)
    letters = string.ascii_uppercase[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    prompt = _PROMPT.format(question=row.text("question").strip(), choices="\n".join(lines))
    return Item(
        task=task,
        item_id=row.item_id("id"),
        messages=({"role": "user", "content": prompt},),
        answer=_answer(row, letters),
        metadata={
            **row.metadata("subject"),
            "choices": str(len(choices)),
            "choice_texts": "\x1f".join(choices),
        },
    )


def _are_choices(value: list[object]) -> bool:
    return 2 <= len(value) <= 26 and all(isinstance(one, str) and one.strip() for one in value)


def _answer(row: Row, letters: str) -> str:
    written = row.fields.get("answer")
    if isinstance(written, int) and not isinstance(written, bool) and 0 <= written < len(letters):
        return letters[written]
    if isinstance(written, str) and len(written) == 1 and written.upper() in letters:
        return written.upper()
    raise TaskError(
        f"{row.where}: 'answer' must be a letter from A to {letters[-1]} or a place from 0 to "
        f"{len(letters) - 1}, not {written!r}"
    )
