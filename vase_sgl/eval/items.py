"""What every task gives and takes: items to ask, and a grade for a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from vase_sgl.client.types import Message

#: How the reason of a grade begins where no grader came to a verdict; the answer counts as wrong.
GRADER_FAILED = "the grader failed"
NOT_COMPARED = "math-verify cannot compare it"


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task. `dataclasses.asdict` of it is JSON-able."""

    #: `Task.name` of the task it belongs to.
    task: str
    #: Unique within the task; the same for the same data, parameters and seed.
    item_id: str
    #: The conversation to send.
    messages: tuple[Message, ...]
    #: The reference answer; for `code` the tests.
    answer: str
    #: Facts about the item that a report may group by, or that grading needs.
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on one answer."""

    correct: bool
    #: The final answer that was found in the text; None if there is none.
    extracted: str | None
    #: Why, in one line.
    reason: str


class Task(Protocol):
    """A set of questions with a rule that grades answers."""

    @property
    def name(self) -> str:
        """The task's name with the parameters that were given, such as `passkey?steps=400`."""

    def items(self, limit: int | None, seed: int) -> Sequence[Item]:
        """The questions to ask, the same for the same `limit` and `seed`.

        A larger limit only adds items, so a run can be extended. `limit=None` is every item of a
        data file, and the documented default count of a generated task.

        Raises:
            ValueError: the limit is below 1.
        """

    def grade(self, item: Item, text: str) -> Grade:
        """Grade the full text of an answer, thinking included.

        Never raises for what the text holds. Deterministic, apart from `code`, which runs the
        text as a program under limits of time and memory.
        """
