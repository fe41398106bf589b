"""A passkey that must survive a long chain of thought.

The passkey is given first; then the model works through an enumerated chain, one line a step, and
states the passkey at the end. The chain is what pushes the passkey's KV entries out of the recent
window. The item is generated; `steps` sets the length of the chain (about 12 tokens a step).
"""

from __future__ import annotations

import dataclasses
import re

from vase_sgl.eval.answers import after_thinking
from vase_sgl.eval.items import Grade, Item
from vase_sgl.eval.tasks.spec import (
    IntegerParameter,
    TaskSpec,
    checked_limit,
    generator,
    integers,
    labelled,
)

#: Items without a limit.
DEFAULT_ITEMS = 50

_PARAMETERS = {"steps": IntegerParameter(default=100, low=1, high=10_000)}
_DIGITS = 5
_STEP = re.compile(r"^[^\w\n]*step\s+(\d+)", re.I | re.M)
#: Digits that are not the number of digits or of steps: `5-digit`, but not `29325. Steps done`.
_NUMBER = r"(?<!\d)(\d+(?:,\d{3})*)(?!,?\d)(?![^\w\n.,;:!?()\[\]]{0,2}(?:digits?|steps?)\b)"
#: "The passkey is ...", the number in the same line, or below and perhaps in a box.
_STATED = re.compile(
    r"passkey\b[^\d\n]{0,60}?(?:\b(?:is|was)\b|[:=])"
    rf"(?:[^\d\n]{{0,60}}?|(?:\W|boxed|text){{0,20}}?){_NUMBER}",
    re.I,
)
#: A text without that: a number of the right length beside the word.
_BESIDE = re.compile(rf"passkey\b[^\d\n]{{0,60}}?(?=\d\d,?\d{{{_DIGITS - 2}}}\b){_NUMBER}", re.I)

_PROMPT = """\
The passkey is {passkey}. Remember it: you will be asked for it at the end.

First work through this chain of steps, one line for each step, leaving none out. \
Start with the number {start}. In each step add {increment} to the number of the step before:
Step 1: {start} + {increment} = {first}
Step 2: {first} + {increment} = {second}
and so on up to Step {steps}.

After Step {steps}, write a last line of the form:
The passkey is ..."""


def open_task(spec: TaskSpec) -> PasskeyTask:
    """The task for a parsed `passkey[?steps=N]`."""
    spec.without_source()
    return PasskeyTask(labelled(spec.name, spec.parameters), **integers(spec, _PARAMETERS))


@dataclasses.dataclass(frozen=True)
class PasskeyTask:
    """Asks for a five-digit passkey after `steps` steps of counting."""

    name: str
    steps: int

    def items(self, limit: int | None, seed: int) -> list[Item]:
        """`limit` generated items, 50 without a limit; item i depends on seed and i alone."""
        return [self._item(index, seed) for index in range(checked_limit(limit, DEFAULT_ITEMS))]

    def grade(self, item: Item, text: str) -> Grade:
        """Right if the last "passkey is ..." after the last step has the right digits.

        Without such a statement the last five digits beside "passkey" count. A passkey that is
        named before the last step, as when the question is repeated, is no answer.
        """
        visible = after_thinking(text)
        done = list(_STEP.finditer(visible))
        written = f"{len(done)} of {self.steps} steps written"
        tail = visible[done[-1].end() :] if done else visible
        stated = _STATED.findall(tail) or _BESIDE.findall(tail)
        if not stated:
            return Grade(False, None, f"no passkey stated after the steps; {written}")
        extracted = re.sub(r"\D", "", stated[-1])
        if extracted == item.answer:
            return Grade(True, extracted, f"passkey right; {written}")
        return Grade(False, extracted, f"passkey is {item.answer}, not {extracted}; {written}")

    def _item(self, index: int, seed: int) -> Item:
        draw = generator("passkey", seed, index)
        passkey = str(draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
        start = draw.randrange(100, 1000)
        increment = draw.randrange(3, 10)
        prompt = _PROMPT.format(
            passkey=passkey,
            start=start,
            increment=increment,
            first=start + increment,
            second=start + 2 * increment,
            steps=self.steps,
        )
        return Item(
            task=self.name,
            item_id=f"{seed}-{index}",
            messages=({"role": "user", "content": prompt},),
            answer=passkey,
            metadata={"steps": str(self.steps)},
        )
