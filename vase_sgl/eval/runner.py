"""Asks every question under every arm, a row per sample; goes on where it was interrupted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import groupby
from pathlib import Path

from vase_sgl.eval import rows as row_files
from vase_sgl.eval.arms import FP8, Arm
from vase_sgl.eval.assessment import assess
from vase_sgl.eval.clock import SessionClock
from vase_sgl.eval.configuration import (
    ROWS_FILE,
    SESSIONS_FILE,
    Configuration,
    RunFolder,
    differing,
)
from vase_sgl.eval.items import GRADER_FAILED, Grade, Item, Task
from vase_sgl.eval.rows import Row, RowFile, Status
from vase_sgl.eval.targets import (
    Answer,
    RequestAborted,
    Sampling,
    Target,
    TargetChanged,
    TargetError,
    TargetInfo,
    request_seed,
)

logger = logging.getLogger(__name__)

#: Samples without an outcome, one after the other, after which a run stops.
FAILURES_IN_A_ROW = 5

#: Opens the target of a worker configuration.
Connect = Callable[[str], AbstractAsyncContextManager[Target]]


class RunStopped(Exception):
    """The run cannot go on now; what it has is kept, and the same command resumes it."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task with the items that are asked of it."""

    task: Task
    items: Sequence[Item]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question under one arm."""

    arm: Arm
    task: Task
    item: Item
    seed_index: int

    @property
    def key(self) -> tuple[str, int | None, str, str, int]:
        """As `Row.key`."""
        return self.arm.name, self.arm.budget, self.task.name, self.item.item_id, self.seed_index


@dataclasses.dataclass(frozen=True)
class _Forgiving:
    """A task whose grader may raise for what a text holds, against its contract.

    Such an answer counts as wrong and the grade says why. Raising would lose the row, and the same
    seeds bring the same answer when the run is resumed.
    """

    task: Task

    @property
    def name(self) -> str:
        return self.task.name

    def items(self, limit: int | None, seed: int) -> Sequence[Item]:
        return self.task.items(limit, seed)

    def grade(self, item: Item, text: str) -> Grade:
        """Raises what says that the machine failed, `SandboxError` for instance."""
        try:
            return self.task.grade(item, text)
        except Exception as error:
            machine_failed = isinstance(error, OSError | MemoryError | RuntimeError)
            if machine_failed and not isinstance(error, RecursionError):
                raise
            logger.exception("the grader of %s failed on item %s", self.name, item.item_id)
            return Grade(False, None, f"{GRADER_FAILED}: {error!r:.200}")


class Run:
    """One run in its folder. Another `Run` in the same folder goes on where it stopped."""

    def __init__(self, folder: Path, configuration: Configuration, asked: Sequence[Asked]) -> None:
        """Raises `ConfigurationError` if the folder holds another run, `RowError` for its rows."""
        assert isinstance(configuration.settings, Sampling)
        self._sampling = configuration.settings
        self._folder = folder
        self._configuration = configuration
        self._asked = asked
        self._file = RunFolder.open(folder, configuration)
        self._rows = RowFile(folder / ROWS_FILE)
        self._clock: SessionClock
        done = row_files.latest(self._rows.rows)
        #: What is still to do: never run, failed or aborted.
        self.left = [
            sample
            for sample in self._samples()
            if (row := done.get(sample.key)) is None or row.status != "completed"
        ]
        self.total = sum(1 for _ in self._samples())

    async def execute(
        self, connect: Connect, *, concurrency: int, on_row: Callable[[Row], None]
    ) -> None:
        """Run what is left, arm by arm, a worker configuration at a time.

        At most `concurrency` requests at once; a task of an arm begins when what was before has
        ended and, where that is possible, without prompts that it left in the prefix cache: its
        time is its own. Raises `RunStopped`, `ConfigurationError` and `TargetError`, among them
        `TargetChanged` if another model than at the connection answers.
        """
        for worker, group in groupby(self.left, lambda sample: sample.arm.worker):
            samples = list(group)
            async with connect(worker) as target:
                info = await target.info()
                _check(worker, target, info, [sample.arm for sample in samples])
                self._file = self._file.with_worker(worker, info.fingerprint, info.query_ring_slots)
                self._clock, emptied = SessionClock(), True
                try:
                    for _, cell in groupby(samples, lambda s: (s.arm, s.task.name)):
                        emptied &= await target.empty_prefix_cache()
                        asked = list(cell)
                        await self._cell(target, asked, concurrency, on_row)
                        await _check_unchanged(target, info, asked[0])
                finally:
                    await self._note_session(worker, target, info, emptied)

    def close(self) -> None:
        """Let another process write the rows."""
        self._rows.close()

    def _samples(self) -> Iterator[Sample]:
        for arm in self._configuration.arms:
            for asked in self._asked:
                for item in asked.items:
                    for index in range(self._configuration.seeds):
                        yield Sample(arm, asked.task, item, index)

    async def _cell(
        self,
        target: Target,
        samples: Sequence[Sample],
        concurrency: int,
        on_row: Callable[[Row], None],
    ) -> None:
        waiting = iter(samples)
        failures: list[str] = []

        async def work() -> None:
            for sample in waiting:
                row = await self._run(target, sample)
                self._rows.append(row)
                on_row(row)
                if row.status != "failed":
                    failures.clear()
                    continue
                failures.append(row.error or "")
                if len(failures) >= FAILURES_IN_A_ROW:
                    raise RunStopped(
                        f"{len(failures)} samples in a row failed under {sample.arm.label}, the "
                        f"last one: {row.error}; what was done is kept, the same command goes on"
                    )

        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(samples)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _run(self, target: Target, sample: Sample) -> Row:
        seed = request_seed(
            self._configuration.seed, sample.task.name, sample.item.item_id, sample.seed_index
        )
        started, start = self._clock.now(), time.monotonic()
        try:
            answer = await target.answer(sample.item.messages, sample.arm, self._sampling, seed)
        except TargetChanged:
            raise
        except TargetError as error:
            status: Status = "aborted" if isinstance(error, RequestAborted) else "failed"
            return self._row(
                sample,
                status,
                started,
                time.monotonic() - start,
                **{
                    "seeds": {"request": seed},
                    "request_id": error.request_id,
                    **(_measured(error.partial) if error.partial else {}),
                },
                error=str(error),
                # An answer that never came is not right, where being right is asked for.
                correct=False if status == "aborted" else None,
            )
        seconds = time.monotonic() - start
        # Grading may run programs and take seconds.
        task = _Forgiving(sample.task)
        found = await asyncio.to_thread(
            assess, task, sample.item, answer, opens_think=self._sampling.opens_think
        )
        return self._row(sample, "completed", started, seconds, **_measured(answer), **found)

    def _row(
        self, sample: Sample, status: Status, started: float, seconds: float, **fields: object
    ) -> Row:
        arm = sample.arm
        return Row.from_mapping(
            {
                "run_id": self._file.run_id,
                "arm": arm.name,
                "policy": arm.policy,
                "budget": arm.budget,
                "window": arm.window,
                "prompt_mode": arm.prompt_mode,
                "worker": arm.worker,
                "task": sample.task.name,
                "item_id": sample.item.item_id,
                "seed_index": sample.seed_index,
                "status": status,
                "started": started,
                "total_seconds": seconds,
                "session": self._clock.started,
                **fields,
            }
        )

    async def _note_session(
        self, worker: str, target: Target, before: TargetInfo, emptied: bool
    ) -> None:
        """Append what the worker counted meanwhile; a worker that is gone has counted nothing."""
        try:
            after: Mapping[str, float] | None = (await target.info()).counters
        except TargetError:
            after = None
        session = {
            "worker": worker,
            "target": target.name,
            "started": self._clock.started,
            "ended": self._clock.now(),
            "total_slots": before.total_slots,
            "prefix_cache_emptied": emptied,
            "counters": None
            if after is None
            else {name: after[name] - value for name, value in before.counters.items()},
        }
        with (self._folder / SESSIONS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(session) + "\n")


def _measured(answer: Answer) -> dict[str, object]:
    """The fields of a row that an answer has."""
    return {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}


async def _check_unchanged(target: Target, before: TargetInfo, sample: Sample) -> None:
    """Raise `TargetChanged` if the target became another one: not every answer tells by itself."""
    try:
        now = (await target.info()).fingerprint
    except TargetError:
        return  # the next question says it
    differences = [
        f"{key}: then {before.fingerprint.get(key)}, now {now.get(key)}"
        for key in differing(before.fingerprint, now)
    ]
    if differences:
        raise TargetChanged(
            f"{target.name} became another worker while {sample.arm.label} was asked "
            f"{sample.task.name}; the rows of that may be of either, so remove their lines:\n  "
            + "\n  ".join(differences)
        )


def _check(worker: str, target: Target, info: TargetInfo, arms: Sequence[Arm]) -> None:
    """Refuse a worker that cannot run the arms before the first of them runs."""
    if worker == FP8 and "float8" not in info.fingerprint.get("kv_cache_dtype", ""):
        raise TargetError(
            f"{target.name} was named as the {FP8} worker, but its KV cache is "
            f"{info.fingerprint.get('kv_cache_dtype', 'of an unknown type')}; start it with "
            "--kv-cache-dtype fp8_e4m3"
        )
    for arm in arms:
        if (arm.budget or 0) > info.max_budget:
            raise TargetError(
                f"{arm.label}: {target.name} allows budgets up to {info.max_budget}; lower "
                "--budgets, or start it with --vase-max-budget"
            )
        if (arm.window or 0) > info.max_window:
            raise TargetError(
                f"{arm.label}: {target.name} allows windows up to {info.max_window}; lower "
                "--window, or start it with --vase-max-window"
            )
