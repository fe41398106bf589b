"""Runs teacher-forced tasks in this process; rows and folder as those of a run against a worker."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vase_sgl.engine.weights import weights_digest
from vase_sgl.eval.arms import PRODUCTION, Arm, ArmError
from vase_sgl.eval.cells import IN_PROCESS
from vase_sgl.eval.configuration import (
    ROWS_FILE,
    Configuration,
    Forcing,
    RunFolder,
    items_digest,
)
from vase_sgl.eval.forced import (
    ForcedArm,
    ForcedItem,
    ForcedModel,
    TextChunk,
    nll_rows,
    passkey_items,
    state_items,
    task_rows,
    text_chunks,
)
from vase_sgl.eval.rows import Row, RowFile, latest
from vase_sgl.eval.targets import eviction_seed, request_seed
from vase_sgl.eviction.params import WIDEST, EvictionParams

NLL = "nll"
#: Makes the items of the tasks with a question.
_QUESTIONS = {"passkey-forced": passkey_items, "state-forced": state_items}


@dataclasses.dataclass(frozen=True)
class ForcedTexts:
    """What is forced: files of text, tasks by name, and lengths as in `Forcing`."""

    texts: tuple[Path, ...]
    tasks: tuple[str, ...]
    dtype: str
    prompt_tokens: int
    forced_tokens: int
    chunks: int
    thought_tokens: int
    items: int

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in (NLL, *_QUESTIONS):
                raise ValueError(
                    f"there is no forced task {task!r}; there are {', '.join((NLL, *_QUESTIONS))}"
                )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        names = [path.stem for path in self.texts]
        if len(set(names)) != len(names):
            raise ValueError("two texts have the same name; their items could not be told apart")

    def settings(self) -> Forcing:
        """Their lengths, and which texts they are."""
        digests = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest()[:32] for p in self.texts}
        lengths = dataclasses.asdict(self)
        del lengths["tasks"]
        return Forcing(**{**lengths, "texts": digests})

    def read(self, tokenizer: Any, seed: int) -> Iterator[tuple[str, TextChunk | ForcedItem]]:
        """Task and item, in order. Raises `ValueError` for a text that is too short."""
        for path in self.texts:
            tokens = tokenizer(path.read_text(encoding="utf-8")).input_ids
            for task in self.tasks:
                if task == NLL:
                    for chunk in text_chunks(
                        path.stem,
                        tokens,
                        prompt_tokens=self.prompt_tokens,
                        forced_tokens=self.forced_tokens,
                        count=self.chunks,
                    ):
                        yield task, chunk
                    continue
                for item in _QUESTIONS[task](
                    path.stem,
                    tokenizer,
                    tokens,
                    thought_tokens=self.thought_tokens,
                    count=self.items,
                    seed=seed,
                ):
                    yield task, item


class ForcedRun:
    """One run in its folder; another one in the same folder goes on where it stopped."""

    def __init__(
        self,
        folder: Path,
        model: str,
        texts: ForcedTexts,
        arms: Sequence[Arm],
        *,
        seeds: int,
        seed: int,
    ) -> None:
        """Loads the model. Raises `ConfigurationError`, `RowError`, `ArmError`, `ValueError`."""
        for arm in arms:
            if arm.worker != PRODUCTION:
                raise ArmError(f"{arm.name} is about a worker's flags; forced tasks have no worker")
        self._model = ForcedModel(model, getattr(torch, texts.dtype))
        self._items = list(texts.read(self._model.tokenizer, seed))
        self._arms, self._seeds, self._seed = arms, seeds, seed
        configuration = Configuration(
            tasks=texts.tasks,
            items={
                task: tuple(item.item_id for name, item in self._items if name == task)
                for task in texts.tasks
            },
            items_digest=items_digest([item for _, item in self._items]),
            task_digests={
                task: items_digest([item for name, item in self._items if name == task])
                for task in texts.tasks
            },
            limit=None,
            arms=tuple(arms),
            settings=texts.settings(),
            seeds=seeds,
            seed=seed,
        )
        run = RunFolder.open(folder, configuration)
        window = max((arm.window for arm in arms if arm.window is not None), default=0)
        self._run = run.with_worker(
            IN_PROCESS, fingerprint(model, texts.dtype), self._model.shape.ring_slots(window)
        )
        self._rows = RowFile(folder / ROWS_FILE)
        done = latest(self._rows.rows)
        self._groups = [
            (task, item, group)
            for task, item in self._items
            for group in self._side_by_side()
            if any(
                (arm.name, arm.budget, task, item.item_id, index) not in done
                for arm in group
                for index in range(seeds)
            )
        ]
        #: Samples in all, and those still to do.
        self.total = len(self._items) * len(arms) * seeds
        self.left = sum(len(group) * seeds for _, _, group in self._groups)

    def execute(self, on_row: Callable[[Row], None]) -> None:
        """Run what is left, an item and budget at a time."""
        for task, item, arms in self._groups:
            forced = [
                ForcedArm(arm.name, self._params(arm, task, item.item_id, index), index)
                for arm in arms
                for index in range(self._seeds)
            ]
            if isinstance(item, TextChunk):
                found = nll_rows(self._model, [item], forced, self._run.run_id)
            else:
                found = task_rows(self._model, [item], forced, self._run.run_id)
            for raw in found:
                row = Row.from_mapping(raw)
                self._rows.append(row)
                on_row(row)

    def close(self) -> None:
        """Let another process write the rows."""
        self._rows.close()

    def _side_by_side(self) -> list[list[Arm]]:
        """Arms of one budget share forward passes: always the same ones, resumed or not."""
        budgets = dict.fromkeys(arm.budget for arm in self._arms)
        return [[arm for arm in self._arms if arm.budget == budget] for budget in budgets]

    def _params(self, arm: Arm, task: str, item_id: str, index: int) -> EvictionParams | None:
        if arm.budget is None:
            return None
        seed = eviction_seed(request_seed(self._seed, task, item_id, index))
        return EvictionParams.parse(arm.params(seed), WIDEST)


def fingerprint(model: str, dtype: str) -> dict[str, str]:
    """What decides the rows beside the configuration."""
    from importlib.metadata import version

    from vase_sgl import __version__

    return {
        "model": Path(model).name,
        "weights_digest": weights_digest(model),
        "vase_sgl": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "dtype": dtype,
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
