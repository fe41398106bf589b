"""Rows of a task's data, from a JSONL file or the `datasets` library; errors say where."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vase_sgl.eval.items import Item
from vase_sgl.eval.tasks.spec import (
    HubSource,
    TaskError,
    TaskSpec,
    checked_limit,
    generator,
    refuse_unknown,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
    """One record and where it came from."""

    where: str
    number: int
    fields: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of these fields that is there, a text that is not blank."""
        return self.value(str, "a text", *names, check=lambda value: bool(value.strip()))

    def value(self, kind: type[T], description: str, *names: str, check: Any = None) -> T:
        """The first of these fields that is there.

        Raises:
            TaskError: there is none, or it is not of this kind.
        """
        name = next((name for name in names if name in self.fields), None)
        if name is None:
            raise TaskError(
                f"{self.where}: no field {' or '.join(map(repr, names))}; "
                f"it has {', '.join(map(repr, self.fields)) or 'none'}"
            )
        value = self.fields[name]
        # A bool is an int in Python, and in no data set.
        if not isinstance(value, kind) or isinstance(value, bool) or (check and not check(value)):
            raise TaskError(f"{self.where}: {name!r} must be {description}, not {value!r}")
        return value

    def item_id(self, *names: str) -> str:
        """The first of these fields that is there, else the row's number, from 1."""
        for name in names:
            if name in self.fields:
                return str(self.fields[name])
        return str(self.number)

    def metadata(self, *names: str) -> dict[str, str]:
        """Those of these fields that are there, as text."""
        return {name: str(self.fields[name]) for name in names if name in self.fields}


def read_rows(spec: TaskSpec, example: str) -> list[Row]:
    """Every row of the task's data.

    Args:
        spec: the task. A data set of the hub may have the parameter `config`.
        example: one line of the format, for the error when no data is named.

    Raises:
        TaskError: no data is named, it is missing, or it is not JSON objects line by line.
    """
    if spec.source is None:
        raise TaskError(
            f"{spec.name}: name its data, {spec.name}:PATH.jsonl or {spec.name}:hf:DATASET[:split];"
            f" a line looks like {example}"
        )
    if isinstance(spec.source, HubSource):
        refuse_unknown(spec, {"config": None})
        rows = _hub_rows(spec.source, spec.parameters.get("config"))
    else:
        refuse_unknown(spec, {})
        rows = _jsonl_rows(spec.source.path)
    if not rows:
        raise TaskError(f"{spec.name}: the data has no rows")
    return rows


def refuse_duplicates(items: Sequence[Item]) -> None:
    """Raise TaskError if two items have one id."""
    seen: set[str] = set()
    for item in items:
        if item.item_id in seen:
            raise TaskError(f"{item.task}: the id {item.item_id!r} occurs twice")
        seen.add(item.item_id)


def chosen(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """`limit` items drawn without replacement by `seed`, in the order of the data.

    A larger limit with the same seed only adds items. All of them if there are fewer.
    """
    count = min(checked_limit(limit, len(items)), len(items))
    order = list(range(len(items)))
    generator("choice of items", seed).shuffle(order)
    return [items[index] for index in sorted(order[:count])]


def _jsonl_rows(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 at byte {error.start}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{where}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise TaskError(f"{where}: not a JSON object")
        rows.append(Row(where, number, fields))
    return rows


def _hub_rows(source: HubSource, config: str | None) -> list[Row]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise TaskError(
            f"hf:{source.dataset}: data sets of the Hugging Face hub need the package 'datasets'; "
            "install it with `pip install datasets`, or name a local PATH.jsonl"
        ) from error
    loaded = datasets.load_dataset(source.dataset, config, split=source.split)
    return [
        Row(f"hf:{source.dataset}:{source.split} row {number}", number, dict(fields))
        for number, fields in enumerate(loaded, 1)
    ]
