"""How a task is written on the command line: `NAME[:SOURCE][?key=value&key=value]`."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path


class TaskError(ValueError):
    """A task that cannot be opened; the text says what to change."""


@dataclasses.dataclass(frozen=True)
class JsonlSource:
    """A local file with one JSON object a line."""

    path: Path


@dataclasses.dataclass(frozen=True)
class HubSource:
    """A data set of the `datasets` library."""

    dataset: str
    split: str


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A parsed task argument."""

    name: str
    source: JsonlSource | HubSource | None
    parameters: Mapping[str, str]

    def without_source(self) -> None:
        """Raise TaskError if data is named for a task that generates its own."""
        if self.source is not None:
            raise TaskError(f"{self.name}: generates its own items and takes no data")


@dataclasses.dataclass(frozen=True)
class IntegerParameter:
    """A whole number from `low` to `high`, both included."""

    default: int
    low: int
    high: int


def parse_task(text: str) -> TaskSpec:
    """Parse `NAME[:PATH.jsonl | :hf:DATASET[:split]][?key=value&...]`; the split is `test`.

    Raises:
        TaskError: the text has another form.
    """
    head, question, query = text.partition("?")
    name, colon, source = head.partition(":")
    parameters: dict[str, str] = {}
    for pair in query.split("&") if question else ():
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise TaskError(f"{text!r}: parameters are written ?key=value&key=value, not {pair!r}")
        if key in parameters:
            raise TaskError(f"{text!r}: parameter {key!r} is given twice")
        parameters[key] = value
    return TaskSpec(name, _parse_source(text, source) if colon else None, parameters)


def integers(spec: TaskSpec, known: Mapping[str, IntegerParameter]) -> dict[str, int]:
    """The value of every known parameter.

    Raises:
        TaskError: a parameter is unknown, not a whole number or out of range.
    """
    refuse_unknown(spec, known)
    values = {}
    for key, parameter in known.items():
        written = spec.parameters.get(key, str(parameter.default))
        try:
            value = int(written)
        except ValueError:
            raise TaskError(f"{spec.name}: {key}={written!r} is not a whole number") from None
        if not parameter.low <= value <= parameter.high:
            raise TaskError(
                f"{spec.name}: {key}={value} is not within {parameter.low} to {parameter.high}"
            )
        values[key] = value
    return values


def refuse_unknown(spec: TaskSpec, known: Mapping[str, object]) -> None:
    """Raise TaskError naming the parameters of `spec` that are not `known`."""
    unknown = sorted(set(spec.parameters) - set(known))
    if unknown:
        takes = f"known are {', '.join(known)}" if known else "it takes none"
        raise TaskError(f"{spec.name}: unknown parameter {', '.join(unknown)}; {takes}")


def labelled(name: str, parameters: Mapping[str, str]) -> str:
    """The task's name with the parameters that were given, in alphabetical order."""
    query = "&".join(f"{key}={value}" for key, value in sorted(parameters.items()))
    return f"{name}?{query}" if query else name


def checked_limit(limit: int | None, otherwise: int) -> int:
    """`limit`, or `otherwise` if there is none.

    Raises:
        ValueError: the limit is below 1.
    """
    if limit is None:
        return otherwise
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return limit


def generator(*key: object) -> random.Random:
    """A random generator of its own for `key`, the same in every process."""
    return random.Random("/".join(str(part) for part in key))


def _parse_source(text: str, source: str) -> JsonlSource | HubSource:
    if source.startswith("hf:"):
        dataset, colon, split = source.removeprefix("hf:").partition(":")
        if not dataset or (colon and not split):
            raise TaskError(f"{text!r}: a data set is written hf:DATASET or hf:DATASET:split")
        return HubSource(dataset, split if colon else "test")
    if not source.endswith(".jsonl"):
        raise TaskError(f"{text!r}: data is a PATH.jsonl or hf:DATASET[:split], not {source!r}")
    return JsonlSource(Path(source))
