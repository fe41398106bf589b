"""One row per sample, as a JSON line: what was asked, what came, and what it cost."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, get_args

#: completed: an answer, whole or cut at its longest length. aborted: the worker gave the request
#: up, which is an outcome of the arm. failed: no outcome; the sample has to run again.
Status = Literal["completed", "aborted", "failed"]

#: Item of a forced task as versions before this one named it: the text, then the question.
_SHARED_QUESTION = re.compile(r"(.+)/((?:passkey|state)-forced/\d+/\d+)")
_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(Exception):
    """A file of rows cannot be read or written. The text names the file, the line and the cure."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample. Lengths and slots in tokens; seconds as floats; times since the epoch.

    run_id: fingerprint of the run's configuration. arm, policy, budget, window, prompt_mode: how
    its KV cache was kept; the last three are None for a full cache. worker: the worker
    configuration. task, item_id, seed_index: what was asked; the same triple in every arm is a
    pair. seeds: request seed, and the sampling and eviction seeds that were used.
    request_id: id of the request and, behind a gateway, of the record to replay.
    error: why it was aborted or failed. correct: None for a task without grades.
    loop_start, loop_period: in words of the text, as `vase_sgl.eval.loops` counts them; None
    without a loop, the period also for a loop with variations. malformed: the signs that
    `vase_sgl.eval.malformed` finds. physical_length: cached tokens at the end.
    reserved_slots: slots reserved for the request; full_kv_slots: what a full cache would hold.
    Both are 0 if nothing of an answer came.
    queue_seconds: of `total_seconds`, those before it was admitted; None if not known.
    session: when its session began; `started` compares with that of rows of the same one alone.
    None for forced text and in rows of versions before this one.
    nll_sum, nll_tokens: teacher-forced tasks alone, in nats; output_tokens then counts forced ones.
    """

    run_id: str
    arm: str
    policy: str
    task: str
    item_id: str
    seed_index: int
    status: Status
    started: float
    total_seconds: float
    budget: int | None = None
    window: int | None = None
    prompt_mode: str | None = None
    worker: str = "production"
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    request_id: str | None = None
    error: str | None = None
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    correct: bool | None = None
    extracted: str | None = None
    grade_reason: str | None = None
    loop: bool = False
    loop_start: int | None = None
    loop_period: int | None = None
    malformed: tuple[str, ...] = ()
    rounds: int = 0
    evicted_tokens: int = 0
    physical_length: int = 0
    reserved_slots: int = 0
    full_kv_slots: int = 0
    ttft_seconds: float | None = None
    queue_seconds: float | None = None
    session: float | None = None
    digest: str | None = None
    nll_sum: float | None = None
    nll_tokens: int | None = None

    @property
    def pair(self) -> tuple[str, int]:
        """Item and seed: what two arms have in common within a task."""
        return self.item_id, self.seed_index

    @property
    def unit(self) -> tuple[str, Any]:
        """As `pair`, but by question: what statistics may take for independent."""
        question, text = question_of(self.item_id)
        return question, self.seed_index if text is None else (text, self.seed_index)

    @property
    def slots(self) -> int:
        """KV slots it took: those reserved for it under a budget, else its final length.

        Without the query ring, which is the worker's: see `vase_sgl.eval.cells.Cell.slots`.
        The rule of reservations charges a full cache with the longest answer allowed, which no
        server reserves.
        """
        return self.full_kv_slots if self.budget is None else self.reserved_slots

    @property
    def key(self) -> tuple[str, int | None, str, str, int]:
        """Which sample this is; a later row of the same key replaces an earlier one."""
        return self.arm, self.budget, self.task, self.item_id, self.seed_index

    def to_json(self) -> str:
        """One line, without its end. Unpaired surrogates are escaped: UTF-8 has none."""
        line = json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", line)

    @classmethod
    def from_mapping(cls, raw: object) -> Row:
        """The row of a parsed line. Raises `ValueError`; unknown keys are errors."""
        if not isinstance(raw, dict):
            raise ValueError("is not an object")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(f"has an unknown key {', '.join(unknown)}")
        required = {
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - set(raw)):
            raise ValueError(f"lacks {', '.join(missing)}")
        row = cls(**{**raw, "malformed": tuple(raw.get("malformed", ()))})
        if row.status not in get_args(Status):
            raise ValueError(f"has the unknown status {row.status!r}")
        return row


def question_of(item_id: str) -> tuple[str, str | None]:
    """What an item asks, and of which text if other items ask the same of other texts.

    Forced tasks once did: the same pass keys after each text. Now every item asks its own.
    """
    shared = _SHARED_QUESTION.fullmatch(item_id)
    return (item_id, None) if shared is None else (shared[2], shared[1])


def read(path: Path) -> list[Row]:
    """Every row of a file, in order. Raises `RowError` for a line that is none, a torn one too."""
    try:
        with path.open(encoding="utf-8") as lines:
            return list(_parse(path, lines))
    except (OSError, UnicodeDecodeError) as error:
        raise RowError(f"cannot read {path}: {error}") from error


def latest(rows: Iterable[Row]) -> dict[tuple[str, int | None, str, str, int], Row]:
    """The last row of every sample, in the order the samples first came."""
    return {row.key: row for row in rows}


class RowFile:
    """Appends rows to a file that one process at a time may write."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; cuts off a last line that an interruption left unfinished.

        Raises `RowError` if another process has it open or a line before the last is damaged.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RowError(
                f"{path} is being written by another run; wait for it, or choose another folder"
            ) from error
        try:
            self._cut_torn_line()
            self.rows = read(path)
        except BaseException:
            self.close()
            raise

    def append(self, row: Row) -> None:
        """Write one row; it is on disk when this returns."""
        self._file.write(row.to_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let another process write."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)


def _parse(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        try:
            yield Row.from_mapping(_json(line))
        except (ValueError, TypeError) as error:
            raise RowError(
                f"{path}, line {number} {error}; remove that line to have its sample run again"
            ) from error


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from error
