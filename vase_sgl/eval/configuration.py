"""What a run measures, kept in its folder so that a resumed run measures the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vase_sgl.eval.arms import Arm
from vase_sgl.eval.targets import Sampling

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = "vase-sgl-eval/1"
RUN_FILE = "run.json"
ROWS_FILE = "rows.jsonl"
SESSIONS_FILE = "sessions.jsonl"


@dataclasses.dataclass(frozen=True)
class Forcing:
    """How text is forced. Lengths in tokens.

    texts: name and SHA-256 of each. prompt_tokens, forced_tokens, chunks: of the task `nll`;
    thought_tokens, items: of the others.
    """

    texts: Mapping[str, str]
    dtype: str
    prompt_tokens: int
    forced_tokens: int
    chunks: int
    thought_tokens: int
    items: int


class ConfigurationError(Exception):
    """A run cannot go on in this folder. The text names the difference and the cure."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Everything that decides the rows, beside the model itself.

    tasks: as they were written. items: by task, the ids in order. items_digest: SHA-256 of all
    questions and answers; task_digests: the same by task, to compare runs of other tasks with.
    settings: how answers come about. seeds: samples per item. seed: what request seeds and
    generated items are derived from.
    """

    tasks: tuple[str, ...]
    items: Mapping[str, tuple[str, ...]]
    items_digest: str
    task_digests: Mapping[str, str]
    limit: int | None
    arms: tuple[Arm, ...]
    settings: Sampling | Forcing
    seeds: int
    seed: int

    def run_id(self) -> str:
        """16 hex digits that stand for all of it."""
        text = json.dumps(self.to_mapping(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        mapping = json.loads(json.dumps(dataclasses.asdict(self)))
        assert isinstance(mapping, dict)
        return mapping


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The file `run.json`: the configuration, and the fingerprint of every worker seen so far.

    query_ring_slots: by worker, how many slots of K and V are as large as the query ring that a
    request has whose policy reads queries; workers that do not tell are not there.
    """

    path: Path
    configuration: Mapping[str, Any]
    run_id: str
    workers: Mapping[str, Mapping[str, str]]
    query_ring_slots: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, configuration: Configuration) -> RunFolder:
        """Make the folder's file, or check that it holds the same configuration."""
        path, rows = folder / RUN_FILE, folder / ROWS_FILE
        if not rows.exists() or rows.stat().st_size == 0:
            made = cls(path, configuration.to_mapping(), configuration.run_id(), {})
            folder.mkdir(parents=True, exist_ok=True)
            made._write()
            return made
        found = cls.read(folder)
        differences = [
            f"{key}: there {_short(found.configuration.get(key))}, now {_short(value)}"
            for key, value in configuration.to_mapping().items()
            # A key that the run's version did not have says nothing.
            if found.configuration.get(key, value) != value
        ]
        if differences:
            raise ConfigurationError(
                f"{folder} holds a run with another configuration; give the same options to go "
                "on, or another --output:\n  " + "\n  ".join(differences)
            )
        return found

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """What a folder holds. Raises `ConfigurationError`."""
        path = folder / RUN_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ConfigurationError(
                    f"{path} has the format {content['format']!r}, not {FORMAT!r}"
                )
            return cls(
                path,
                content["configuration"],
                content["run_id"],
                content["workers"],
                content.get("query_ring_slots", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is not the file of a run: {error!r}") from error

    def with_worker(
        self, worker: str, fingerprint: Mapping[str, str], ring_slots: float | None
    ) -> RunFolder:
        """Note fingerprint and query ring of a worker configuration; refuse others than before."""
        before = self.workers.get(worker, fingerprint)
        rings = self.query_ring_slots
        if ring_slots is not None:
            rings = {worker: ring_slots, **rings}
        differences = [
            f"{key}: there {before.get(key)}, now {fingerprint.get(key)}"
            for key in differing(before, fingerprint)
        ]
        if ring_slots is not None and rings[worker] != ring_slots:
            differences.append(
                f"query ring (--vase-max-window): there {rings[worker]:g} slots, now {ring_slots:g}"
            )
        if differences:
            raise ConfigurationError(
                f"{self.path.parent} was begun with another {worker} worker; use the same one, or "
                "another --output:\n  " + "\n  ".join(differences)
            )
        noted = dataclasses.replace(
            self,
            workers={**self.workers, worker: dict(sorted(before.items()))},
            query_ring_slots=rings,
        )
        if noted != self:
            noted._write()
        return noted

    def _write(self) -> None:
        """All of it or nothing, whatever happens meanwhile."""
        content = {
            "format": FORMAT,
            "run_id": self.run_id,
            "configuration": self.configuration,
            "workers": self.workers,
            "query_ring_slots": self.query_ring_slots,
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ or that only one of the two has, in order."""
    return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]


def items_digest(items: Sequence[DataclassInstance]) -> str:
    """SHA-256 of questions and answers, 32 hex digits of it."""
    text = json.dumps([dataclasses.asdict(item) for item in items], sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
