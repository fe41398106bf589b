"""Rows by task, arm, budget and window; incomplete cells are refused by name."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vase_sgl.eval import rows as row_files
from vase_sgl.eval.arms import BASELINE
from vase_sgl.eval.configuration import ROWS_FILE, RUN_FILE, SESSIONS_FILE, RunFolder
from vase_sgl.eval.likeness import unlike
from vase_sgl.eval.rows import Row
from vase_sgl.eviction.policies import POLICIES

#: Share of samples with an eviction below which a cell shows only that nothing broke.
CONTROL_SHARE = 0.2

#: Worker of teacher-forced rows, where arms run side by side.
IN_PROCESS = "in-process"

_NAMED = 20

#: Task, arm, budget and window of a cell.
_Key = tuple[str, str, int | None, int | None]


class IncompleteError(Exception):
    """Cells lack samples, or runs did not measure the same. The text names what."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """The samples of one arm at one budget and window on one task, a row each, in the order of
    their pairs.

    attempts: every row, those of samples that were run again included. tells_window: its task has
    several windows, so its name holds its own. ring_slots: memory of a request's query ring, in
    slots: 0 if the policy reads no queries, None if not known.
    """

    task: str
    arm: str
    budget: int | None
    window: int | None
    rows: tuple[Row, ...]
    attempts: tuple[Row, ...]
    tells_window: bool = False
    ring_slots: float | None = None

    @property
    def name(self) -> str:
        """The arm, with its window where others of the task have another one."""
        return f"{self.arm}, window {self.window}" if self.tells_window else self.arm

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} @ {self.budget}"

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def answered(self) -> tuple[Row, ...]:
        """The samples that ended with an answer; of the others nothing but that is known."""
        return tuple(row for row in self.rows if row.status == "completed")

    @property
    def completed(self) -> int:
        """How many samples ended with an answer."""
        return len(self.answered)

    @property
    def evicts(self) -> bool:
        return self.budget is not None

    @property
    def keeps_prompt(self) -> bool:
        """Whether its budget is of generated tokens alone, beside the prompt."""
        return self.rows[0].prompt_mode == "keep"

    @property
    def evicted_share(self) -> float | None:
        """Share of answered samples in which an eviction happened; None without such samples."""
        return self.mean(lambda row: row.rounds > 0)

    @property
    def is_control(self) -> bool:
        """Too few evictions to say anything about the policy: a no-regression control."""
        share = self.evicted_share
        return self.evicts and share is not None and share < CONTROL_SHARE

    @property
    def timed(self) -> bool:
        """False if its samples shared a forward pass with other arms: their time is no one's."""
        return all(row.worker != IN_PROCESS for row in self.attempts)

    @property
    def machine_seconds(self) -> float:
        """Time in which at least one of its requests ran, repeated attempts included.

        Of sessions the sum: they do not overlap, though their clocks may say so.
        """
        total = 0.0
        ends: dict[float | None, float] = {}
        for row in sorted(self.attempts, key=lambda r: (r.started, r.total_seconds)):
            stop, end = row.started + row.total_seconds, ends.get(row.session, 0.0)
            total += max(stop - max(row.started, end), 0.0)
            ends[row.session] = max(end, stop)
        return total

    def slots(self, row: Row) -> float:
        """Memory a request took, in slots: its own and its query ring, as far as known."""
        return row.slots + (self.ring_slots or 0) if row.slots else 0

    @property
    def slot_seconds(self) -> float:
        """Memory taken, as in the end, times the seconds from admission to the end."""
        return sum(
            self.slots(row) * (row.total_seconds - (row.queue_seconds or 0))
            for row in self.attempts
        )

    @property
    def queue_is_known(self) -> bool:
        """Whether `slot_seconds` begin at the admission; else they are an upper bound."""
        return all(row.queue_seconds is not None for row in self.attempts if row.slots)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests over `machine_seconds`."""
        seconds = self.machine_seconds
        return sum(row.output_tokens for row in self.attempts) / seconds if seconds else 0.0

    def mean(self, value: Callable[[Row], float]) -> float | None:
        """Mean over the answered samples; None without such samples."""
        return statistics.fmean(map(value, self.answered)) if self.answered else None

    def median_ttft(self) -> float | None:
        """Seconds; None if no sample has one."""
        found = [row.ttft_seconds for row in self.rows if row.ttft_seconds is not None]
        return statistics.median(found) if found else None


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a report is made of.

    cells: by task, full caches first, then by arm, window and budget. runs: the content of each
    run.json. sessions: what workers counted. attempts: every row.
    """

    cells: Mapping[str, Sequence[Cell]]
    runs: Sequence[RunFolder]
    sessions: Sequence[Mapping[str, Any]]
    attempts: Sequence[Row]


def load(folders: Sequence[Path]) -> Results:
    """Read folders of runs, or files of rows alone; together they are one comparison.

    Every cell must have a row with an outcome for each sample of its run; in a file without a
    run's configuration, for each sample that any arm of the task has. Runs of one task must have
    asked the same of the same model. Raises `IncompleteError`, `RowError` and `ConfigurationError`.
    """
    cells: dict[str, list[Cell]] = {}
    problems: list[str] = []
    runs, sessions, attempts = [], [], []
    for path in folders:
        rows = row_files.read(path if path.is_file() else path / ROWS_FILE)
        run = None
        if path.is_dir() and ((path / RUN_FILE).exists() or not rows):
            run = RunFolder.read(path)
            runs.append(run)
            sessions += _sessions(path / SESSIONS_FILE)
        attempts += rows
        expected = _expected_without_run(rows) if run is None else _expected(run)
        for key, pairs in expected.items():
            mine = [r for r in rows if (r.task, r.arm, r.budget, r.window) == key]
            done = {row.pair: row for row in row_files.latest(mine).values()}
            task = key[0]
            cell = Cell(
                *key,
                rows=tuple(done[p] for p in pairs if p in done and done[p].status != "failed"),
                attempts=tuple(mine),
                ring_slots=_ring_slots(mine, run),
            )
            problems += _missing(cell, pairs, done)
            if any((c.arm, c.budget, c.window) == key[1:] for c in cells.get(task, ())):
                problems.append(f"{task}, {cell.label}: is in more than one of the inputs")
            cells.setdefault(task, []).append(cell)
    problems += _unpaired(cells)
    if unlike_runs := unlike(runs):
        raise IncompleteError(
            "these runs did not measure the same, so their arms cannot be compared; report on them "
            "one by one:\n  " + "\n  ".join(unlike_runs)
        )
    if not cells:
        raise IncompleteError("there are no rows to report on")
    if problems:
        raise IncompleteError(
            "a report on incomplete cells would compare unlike things; run the same command "
            "again to fill them:\n  " + "\n  ".join(problems)
        )
    return Results(
        {task: sorted(_named(found), key=_order) for task, found in cells.items()},
        runs,
        sessions,
        attempts,
    )


def baseline(cells: Sequence[Cell]) -> Cell | None:
    """The cell that the others of the task are compared with."""
    return next((cell for cell in cells if cell.arm == BASELINE), None)


def windows(cells: Iterable[Cell]) -> list[int]:
    """The windows of a task's arms, in order."""
    return sorted({cell.window for cell in cells if cell.window is not None})


def _named(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of a task, with their windows in their names if these differ."""
    several = len(windows(cells)) > 1
    return [
        dataclasses.replace(cell, tells_window=several and cell.window is not None)
        for cell in cells
    ]


def _ring_slots(rows: Sequence[Row], run: RunFolder | None) -> float | None:
    """What `Cell.ring_slots` is for the rows of one arm. Only the run's configuration tells."""
    policy = POLICIES.get(rows[0].policy) if rows else None
    if policy is not None and not policy.needs_queries:
        return 0
    return run.query_ring_slots.get(rows[0].worker) if run is not None and rows else None


def _order(cell: Cell) -> tuple[bool, str, int, int]:
    return cell.evicts, cell.arm, cell.window or 0, cell.budget or 0


def _expected(run: RunFolder) -> dict[_Key, list[tuple[str, int]]]:
    configuration = run.configuration
    return {
        (task, arm["name"], arm["eviction"].get("budget"), arm["eviction"].get("window")): [
            (item_id, index) for item_id in item_ids for index in range(configuration["seeds"])
        ]
        for task, item_ids in configuration["items"].items()
        for arm in configuration["arms"]
    }


def _expected_without_run(
    rows: Iterable[Row],
) -> dict[_Key, list[tuple[str, int]]]:
    pairs: dict[str, dict[tuple[str, int], None]] = {}
    cells: dict[_Key, None] = {}
    for row in rows:
        pairs.setdefault(row.task, {})[row.pair] = None
        cells[(row.task, row.arm, row.budget, row.window)] = None
    return {cell: list(pairs[cell[0]]) for cell in cells}


def _missing(
    cell: Cell, pairs: Sequence[tuple[str, int]], done: Mapping[tuple[str, int], Row]
) -> list[str]:
    """What a cell lacks, in one line."""
    absent = [pair for pair in pairs if pair not in done]
    failed = [pair for pair in pairs if pair in done and done[pair].status == "failed"]
    surplus = [pair for pair in done if pair not in set(pairs)]
    parts = []
    if absent:
        parts.append(f"{len(absent)} not run: {_names(absent)}")
    if failed:
        parts.append(
            f"{len(failed)} failed: {_names(failed)}; the last one said: {done[failed[-1]].error}"
        )
    if surplus:
        parts.append(f"{len(surplus)} that do not belong to the run: {_names(surplus)}")
    if not parts:
        return []
    return [f"{cell.task}, {cell.label}, {len(pairs)} samples: " + "; ".join(parts)]


def _unpaired(cells: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Cells of one task, from several inputs, that do not have the same samples."""
    problems = []
    for task, found in cells.items():
        first = {row.pair for row in found[0].rows}
        for cell in found[1:]:
            pairs = {row.pair for row in cell.rows}
            if pairs != first and cell.rows and found[0].rows:
                odd = sorted(pairs ^ first)
                problems.append(
                    f"{task}: {cell.label} and {found[0].label} have different samples: "
                    f"{_names(odd)}"
                )
    return problems


def _names(pairs: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{item_id} seed {index}" for item_id, index in pairs[:_NAMED])
    more = len(pairs) - _NAMED
    return f"{named} and {more} more" if more > 0 else named


def _sessions(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:  # an interruption may have left it unfinished
            raise row_files.RowError(
                f"{path}, line {number} is not JSON ({error}); remove that line, which holds "
                "counters alone"
            ) from error
    return found
