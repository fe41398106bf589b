"""Whether runs measured the same, so that their arms can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vase_sgl.eval.configuration import RunFolder, differing


def unlike(runs: Sequence[RunFolder]) -> list[str]:
    """What differs between runs that have a task in common, a line each.

    A run is held against the first one of each of its tasks: items, settings, seed, and the
    fingerprint of every worker configuration that both have used.
    """
    problems: list[str] = []
    firsts: dict[str, RunFolder] = {}
    for run in runs:
        shared: dict[str, tuple[RunFolder, list[str]]] = {}
        for task in run.configuration["items"]:
            first = firsts.setdefault(task, run)
            if first is not run:
                shared.setdefault(str(first.path), (first, []))[1].append(task)
        for first, tasks in shared.values():
            problems += [
                f"{run.path.parent} against {first.path.parent}: {difference}"
                for difference in _differences(run, first, tasks)
            ]
    return problems


def _differences(run: RunFolder, first: RunFolder, tasks: Sequence[str]) -> Iterator[str]:
    here, there = run.configuration, first.configuration
    for task in tasks:
        if _asks_otherwise(here, there, task):
            yield f"items of {task} have the same ids, but other questions or answers"
    yield from _entries("", {"seed": here.get("seed")}, {"seed": there.get("seed")})
    yield from _entries("", here.get("settings", {}), there.get("settings", {}))
    for worker in sorted(run.workers.keys() & first.workers.keys()):
        yield from _entries(f"{worker} worker, ", run.workers[worker], first.workers[worker])


def _asks_otherwise(here: Mapping[str, Any], there: Mapping[str, Any], task: str) -> bool:
    """Whether the same ids stand for other items; other ids are found as samples without a pair.

    Runs of older versions have one digest of all their items, which says something only about a
    run of the same tasks.
    """
    if here["items"][task] != there["items"][task]:
        return False
    if "task_digests" in here and "task_digests" in there:
        return bool(here["task_digests"][task] != there["task_digests"][task])
    same_tasks = list(here["items"].items()) == list(there["items"].items())
    return same_tasks and here.get("items_digest") != there.get("items_digest")


def _entries(where: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for key in differing(here, there):
        yield f"{where}{key} is {here.get(key)}, there {there.get(key)}"
