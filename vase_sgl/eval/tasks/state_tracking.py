"""A generated program of assignments; its final state is asked.

Every line reads variables that were written many lines before, so a wrong or forgotten value shows.
Values are whole numbers within ±999. `variables` and `steps` set the size.
"""

from __future__ import annotations

import dataclasses
import random
import re
import string

from vase_sgl.eval.answers import final_answer
from vase_sgl.eval.items import Grade, Item
from vase_sgl.eval.tasks.spec import (
    IntegerParameter,
    TaskError,
    TaskSpec,
    checked_limit,
    generator,
    integers,
    labelled,
)

#: Items without a limit.
DEFAULT_ITEMS = 50

_PARAMETERS = {
    "variables": IntegerParameter(default=4, low=1, high=26),
    "steps": IntegerParameter(default=20, low=1, high=5_000),
}
_LARGEST = 999
#: Digits of a number that is read. Longer ones are no values, and the longest make int() raise.
_MOST_DIGITS = 18
_BINDING = re.compile(r"([A-Za-z])\s*(?:=|:|\\to)\s*(?:\\text\{)?\s*([-\u2212]?\s*\d+)")

_PROMPT = """\
Here is a program. Each line assigns to one variable.

{program}

Work through the program line by line and write the value that each line assigns. \
Then give the value of every variable after the last line, as in \\boxed{{{example}}}."""


def open_task(spec: TaskSpec) -> StateTrackingTask:
    """The task for a parsed `state-tracking[?variables=N&steps=N]`."""
    spec.without_source()
    values = integers(spec, _PARAMETERS)
    if values["steps"] < values["variables"]:
        raise TaskError(
            f"{spec.name}: steps={values['steps']} is below variables={values['variables']}; every "
            "variable is assigned once before the rest of the program"
        )
    return StateTrackingTask(labelled(spec.name, spec.parameters), **values)


@dataclasses.dataclass(frozen=True)
class StateTrackingTask:
    """Asks for the state after `steps` assignments to `variables` variables."""

    name: str
    variables: int
    steps: int

    def items(self, limit: int | None, seed: int) -> list[Item]:
        """`limit` generated items, 50 without a limit; item i depends on seed and i alone."""
        return [self._item(index, seed) for index in range(checked_limit(limit, DEFAULT_ITEMS))]

    def grade(self, item: Item, text: str) -> Grade:
        """Right if the final answer binds every variable to its value, and no other variable.

        A variable bound twice counts with its last value.
        """
        answer = final_answer(text)
        if answer is None:
            return Grade(False, None, "no final answer")
        found = _bindings(answer)
        state = _bindings(item.answer)
        right = sum(found.get(name) == value for name, value in state.items())
        surplus = sorted(found.keys() - state.keys())
        reason = f"{right} of {len(state)} variables right"
        if surplus:
            reason += f"; not in the program: {', '.join(surplus)}"
        return Grade(right == len(state) and not surplus, answer, reason)

    def _item(self, index: int, seed: int) -> Item:
        draw = generator("state-tracking", self.variables, self.steps, seed, index)
        program, state = _program(draw, self.variables, self.steps)
        names = list(state)
        prompt = _PROMPT.format(
            program="\n".join(program),
            example=", ".join(f"{name}=..." for name in names),
        )
        return Item(
            task=self.name,
            item_id=f"{seed}-{index}",
            messages=({"role": "user", "content": prompt},),
            answer=", ".join(f"{name}={value}" for name, value in state.items()),
            metadata={"variables": str(self.variables), "steps": str(self.steps)},
        )


def _program(draw: random.Random, variables: int, steps: int) -> tuple[list[str], dict[str, int]]:
    state: dict[str, int] = {}
    lines = []
    for name in string.ascii_lowercase[:variables]:
        state[name] = draw.randrange(1, 20)
        lines.append(f"{name} = {state[name]}")
    while len(lines) < steps:
        name, left, right = (draw.choice(list(state)) for _ in range(3))
        number = draw.randrange(2, 10)
        expression, value = draw.choice(
            [
                (f"{left} + {right}", state[left] + state[right]),
                (f"{left} - {right}", state[left] - state[right]),
                (f"{left} + {number}", state[left] + number),
                (f"{left} - {number}", state[left] - number),
                (f"{left} * {number}", state[left] * number),
            ]
        )
        if abs(value) <= _LARGEST and expression != f"{left} - {left}":
            state[name] = value
            lines.append(f"{name} = {expression}")
    return lines, state


def _bindings(text: str) -> dict[str, int | None]:
    return {name.lower(): _value(written) for name, written in _BINDING.findall(text)}


def _value(written: str) -> int | None:
    """The number; None for one that is too long to be a value."""
    number = re.sub(r"\s", "", written).replace("\u2212", "-")
    return int(number) if len(number.lstrip("-")) <= _MOST_DIGITS else None
