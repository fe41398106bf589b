"""The progress of a run on stderr: a bar with the time left, or lines without a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console

from vase_sgl.eval.answers import closes_unopened
from vase_sgl.eval.rows import Row

#: Seconds between lines where there is no terminal.
_LINE_SECONDS = 30.0


class Progress:
    """Use as `with Progress(…) as progress`, then `progress.add(row)`."""

    def __init__(self, total: int, left: int, *, warn_of_unopened: bool = False) -> None:
        """warn_of_unopened: say so when an answer closes a think block that it did not open."""
        self._warn_of_unopened = warn_of_unopened
        self._console = Console(stderr=True, markup=False)
        self._total, self._done, self._first = total, total - left, total - left
        self._correct = self._graded = self._failed = 0
        self._start = self._said = time.monotonic()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[state]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("eval", total=total, completed=self._done, state="")
        if self._done:
            self._console.print(f"{self._done} of {total} samples are there already")

    def say(self, text: str) -> None:
        """What is being waited for."""
        self._show(text)

    def add(self, row: Row) -> None:
        """A sample has ended."""
        self._failed += row.status == "failed"
        self._done += row.status != "failed"
        if row.correct is not None:
            self._graded += 1
            self._correct += row.correct
        if self._warn_of_unopened and closes_unopened(row.text or ""):
            self._warn_of_unopened = False
            self._console.print(
                f"warning: the answer to {row.item_id} closes a think block that it never opened. "
                "If the model's chat template opens it, thoughts without an end are graded as "
                "answers; use --opens-think and another --output"
            )
        arm = row.arm if row.budget is None else f"{row.arm} @ {row.budget}"
        state = f"{arm}  correct {self._correct}/{self._graded}  failed {self._failed}"
        self._show(state)

    def _show(self, state: str) -> None:
        """In the bar, or now and then as a line."""
        self._bar.update(self._task, completed=self._done, state=state)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said > _LINE_SECONDS:
            self._said = now
            rate = (self._done - self._first) / (now - self._start)
            left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "no rate yet"
            self._console.print(f"{self._done} of {self._total} samples, {left}; {state}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
        graded = f", {self._correct} of {self._graded} graded ones correct" if self._graded else ""
        self._console.print(
            f"{self._done} of {self._total} samples have an outcome{graded}; "
            f"{self._failed} attempts failed"
        )
