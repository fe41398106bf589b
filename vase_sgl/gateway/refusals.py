"""What found no room, so that in one dispatch of the queue those who need as much are not asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vase_sgl.gateway.need import Need, kind_of
from vase_sgl.gateway.workers import WorkerInfo

#: Whether queries are read, from which lease on those that run do not count, slots: with each of
#: them as great or greater there is less room.
_Rank = tuple[bool, int, int]


class Refusals:
    """Refused needs, while nothing gets free. Outside of `remembered` there are none.

    Told per kind of worker, as how many slots a need takes depends on it.
    """

    def __init__(self) -> None:
        self._kinds: list[WorkerInfo] = []
        #: By kind and question the least ranks that were refused.
        self._least: dict[tuple[int, str], list[_Rank]] = {}

    @contextmanager
    def remembered(self, infos: Iterable[WorkerInfo]) -> Iterator[None]:
        """For the body, in which `infos` are those of all workers that take requests."""
        self._kinds = list({kind_of(info): info for info in infos}.values())
        try:
            yield
        finally:
            self._kinds = []
            self.forget()

    def forget(self) -> None:
        """Something got free."""
        self._least.clear()

    def add(self, question: str, need: Need, since: int = 0) -> None:
        """No worker's answer to `question` was yes, for that need and without leases `since`."""
        for kind, rank in self._ranks(need, since):
            others = self._least.get((kind, question), ())
            self._least[kind, question] = [
                rank,
                *(other for other in others if not _at_least(other, rank)),
            ]

    def cover(self, question: str, need: Need, since: int = 0) -> bool:
        """Whether no worker's answer can be yes. False for a need that no worker could run."""
        ranks = self._ranks(need, since)
        return bool(ranks) and all(
            any(_at_least(rank, least) for least in self._least.get((kind, question), ()))
            for kind, rank in ranks
        )

    def _ranks(self, need: Need, since: int) -> list[tuple[int, _Rank]]:
        return [
            (kind, (need.reads_queries, since, need.slots(info)))
            for kind, info in enumerate(self._kinds)
            if need.fits(info)
        ]


def _at_least(rank: _Rank, other: _Rank) -> bool:
    return rank[0] >= other[0] and rank[1] >= other[1] and rank[2] >= other[2]
