"""A function to write, graded by running its tests in the sandbox.

One JSON object a line: `prompt`, `entry_point` (the function's name), `tests` (HumanEval calls it
`test`), optional `task_id` or `id`. The tests are Python that runs after the model's code; if they
define `check(candidate)`, as HumanEval's do, it is called with the function.

The model's code is the last fenced block that defines the entry point. If the prompt is itself
Python with the function's head, as HumanEval's, its imports and helpers come before that block.
Imports from `__future__` come before everything. What the code would do as a script alone, under
`if __name__ == "__main__":`, is not run; it may want input and arguments, or exit.

The tests run in the process of the code that they test: one that sets out to, such as by reading
its own source, passes any tests. Do not train on these grades.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import logging
import re
import secrets
from collections.abc import Iterator, Sequence

from vase_sgl.eval.answers import after_thinking
from vase_sgl.eval.items import Grade, Item
from vase_sgl.eval.sandbox import LAYERS, Limits, check_sandbox, run_program
from vase_sgl.eval.tasks.records import Row, chosen, read_rows, refuse_duplicates
from vase_sgl.eval.tasks.spec import TaskError, TaskSpec

_EXAMPLE = (
    '{"prompt": "Write a function add(a, b).", "entry_point": "add", '
    '"tests": "assert add(1, 2) == 3"}'
)
_PROMPT = """\
{prompt}

Write the complete Python function `{entry_point}` in one fenced code block that starts with \
```python."""
# Blocks in any language: of one that is skipped, the closing fence would be taken for an opening.
_OPENING = re.compile(r"[ \t]*```[^`]*")
_CLOSING = re.compile(r"[ \t]*```[ \t\r]*")
_FUTURE = re.compile(
    r"^from[ \t]+__future__[ \t]+import[ \t]*(?:\([^)]*\)|[^\n;#(]*)[ \t]*;?[ \t]*", re.M
)

#: Classes of the code look for their module by its name.
_AS_IMPORTED = """\
import sys
__name__ = "solution"
sys.modules[__name__] = sys.modules["__main__"]
del sys
"""
#: The tests may have such a block of their own.
_AS_SCRIPT = '__name__ = "__main__"'

LIMITS = Limits()

logger = logging.getLogger(__name__)


def open_task(spec: TaskSpec) -> CodeTask:
    """The task for a parsed `code:...`.

    Raises:
        SandboxError: programs cannot be run here.
    """
    items = [_item(spec.name, row) for row in read_rows(spec, _EXAMPLE)]
    refuse_duplicates(items)
    isolation = check_sandbox()
    if lacking := [layer for layer in LAYERS if layer not in isolation]:
        logger.warning(
            "programs that the model writes run here without %s; docs/security.md says what that "
            "leaves open",
            " and ".join(lacking),
        )
    return CodeTask(spec.name, items)


@dataclasses.dataclass(frozen=True)
class CodeTask:
    """Functions that must pass their tests."""

    name: str
    all_items: Sequence[Item]

    def items(self, limit: int | None, seed: int) -> list[Item]:
        """`limit` functions drawn by `seed`, all without a limit; in the order of the data."""
        return chosen(self.all_items, limit, seed)

    def grade(self, item: Item, text: str) -> Grade:
        """Right if the program of prompt, code and tests runs to its last line.

        Raises:
            SandboxError: the sandbox fails, which is no fault of the answer.
        """
        entry_point = item.metadata["entry_point"]
        code = _code(after_thinking(text), entry_point)
        if code is None:
            return Grade(False, None, f"no fenced code block that defines {entry_point}")
        # Code that ends the process before the tests have run does not write this line by chance.
        passed = f"passed {secrets.token_hex(16)}"
        program = "\n\n".join(
            [
                _AS_IMPORTED,
                _preamble(item.metadata["prompt"], entry_point),
                code,
                _AS_SCRIPT,
                item.answer,
                f"check({entry_point})" if _defines(item.answer, "check") else "",
                f"print({passed!r})",
            ]
        )
        execution = run_program(_with_futures_first(program), LIMITS)
        if execution.succeeded and execution.stdout.rstrip("\n").endswith(passed):
            return Grade(True, code, "tests pass")
        if execution.outcome == "timeout":
            return Grade(False, code, f"not done within {LIMITS.wall_seconds:g} s")
        if execution.outcome == "output":
            return Grade(False, code, f"wrote more than {LIMITS.output_bytes} bytes")
        if execution.outcome == "signal":
            return Grade(False, code, f"ended by signal {-(execution.status or 0)}")
        lines = execution.stderr.strip().splitlines()
        return Grade(False, code, lines[-1][:200] if lines else "ended before its tests had run")


def _item(task: str, row: Row) -> Item:
    prompt, entry_point = row.text("prompt"), row.text("entry_point").strip()
    if not entry_point.isidentifier() or keyword.iskeyword(entry_point):
        raise TaskError(f"{row.where}: 'entry_point' must be a function's name: {entry_point!r}")
    tests = row.text("tests", "test")
    try:
        ast.parse(tests)
    except SyntaxError as error:
        raise TaskError(f"{row.where}: the tests are no Python: {error}") from error
    asked = _PROMPT.format(prompt=prompt.strip(), entry_point=entry_point)
    return Item(
        task=task,
        item_id=row.item_id("task_id", "id"),
        messages=({"role": "user", "content": asked},),
        answer=tests,
        metadata={"entry_point": entry_point, "prompt": prompt},
    )


def _code(text: str, entry_point: str) -> str | None:
    blocks = [block for block in _blocks(text) if _defines(block, entry_point)]
    return blocks[-1] if blocks else None


def _blocks(text: str) -> Iterator[str]:
    """The content of every fenced block that is closed."""
    block: list[str] | None = None
    for line in text.split("\n"):
        if block is None:
            block = [] if _OPENING.fullmatch(line) else None
        elif _CLOSING.fullmatch(line):
            yield "".join(block)
            block = None
        else:
            block.append(f"{line}\n")


def _defines(source: str, name: str) -> bool:
    pattern = rf"^(?:(?:async\s+)?def\s+{re.escape(name)}\b|{re.escape(name)}\s*=[^=])"
    return re.search(pattern, source, re.M) is not None


def _with_futures_first(program: str) -> str:
    """The program with its imports from `__future__` at the top, where alone Python takes them."""
    futures = "".join(f"{statement}\n" for statement in _FUTURE.findall(program))
    return futures + _FUTURE.sub("", program)


def _preamble(prompt: str, entry_point: str) -> str:
    try:
        ast.parse(prompt)
    except SyntaxError:
        return ""
    return prompt if _defines(prompt, entry_point) else ""
