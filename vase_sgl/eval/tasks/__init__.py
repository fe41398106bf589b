"""The tasks by name.

A task is asked for as `NAME`, `NAME:PATH.jsonl` or `NAME:hf:DATASET[:split]`, with parameters
after a question mark: `passkey?steps=400`, `gsm8k:hf:openai/gsm8k:test?config=main`.
"""

from __future__ import annotations

from importlib import import_module

from vase_sgl.eval.items import Task
from vase_sgl.eval.tasks.spec import TaskError, parse_task

__all__ = ["TASKS", "TaskError", "open_task"]

#: Name -> module with an `open_task(spec)`. A module is imported when its task is asked for, so
#: that a task does not need the packages of another.
TASKS = {
    "aime": "vase_sgl.eval.tasks.math",
    "choice": "vase_sgl.eval.tasks.choice",
    "code": "vase_sgl.eval.tasks.code",
    "gsm8k": "vase_sgl.eval.tasks.math",
    "math500": "vase_sgl.eval.tasks.math",
    "passkey": "vase_sgl.eval.tasks.passkey",
    "state-tracking": "vase_sgl.eval.tasks.state_tracking",
}


def open_task(spec: str) -> Task:
    """The task that `spec` asks for, its data read and checked.

    Raises:
        TaskError: an unknown name or parameter, a value out of range, a missing or bad data file;
            the text says what to change.
        ModuleNotFoundError: a package of the extra `eval` is missing.
    """
    parsed = parse_task(spec)
    module = TASKS.get(parsed.name)
    if module is None:
        raise TaskError(f"unknown task {parsed.name!r}; known are {', '.join(sorted(TASKS))}")
    task: Task = import_module(module).open_task(parsed)
    return task
