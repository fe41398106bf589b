"""What a report compares: the value a sample has under each measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vase_sgl.eval import statistics
from vase_sgl.eval.cells import Cell
from vase_sgl.eval.rows import Row
from vase_sgl.eval.statistics import Estimate

Pairs = Mapping[tuple[str, Any], float]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A value per sample. share: it is 0 or 1. value: None where a sample has none.

    of_answers: samples without an answer do not count, nor do other seeds of their items, for
    items have the same weight. Otherwise they count as what their rows say, as wrong for instance.
    """

    title: str
    share: bool
    higher_is_better: bool
    value: Callable[[Row], float | None]
    of_answers: bool = False

    def applies(self, cells: Sequence[Cell]) -> bool:
        """Whether every sample that counts has a value, in every cell."""
        return all(self.value(row) is not None for cell in cells for row in self._rows(cell))

    def pairs(self, cell: Cell) -> Pairs:
        """The value of each sample that counts, by `Row.unit`. The measure must apply."""
        values = {row.unit: self.value(row) for row in self._rows(cell)}
        return {pair: value for pair, value in values.items() if value is not None}

    def estimate(self, cell: Cell) -> Estimate | None:
        """The mean with its interval: `statistics.share` or `statistics.mean`.

        None if no sample that counts has an answer. Raises `IncompleteCellError` for the mean of a
        single item, unless it is a share.
        """
        values = self.pairs(cell)
        if not values:
            return None
        return statistics.share(values) if self.share else statistics.mean(values)

    def difference(self, cell: Cell, base: Cell) -> Estimate | None:
        """Mean of the paired differences `cell` minus `base`; None if too few have an answer."""
        compare = statistics.paired_share_difference if self.share else statistics.paired_difference
        mine, other = self.pairs(cell), self.pairs(base)
        if self.of_answers:
            both = mine.keys() & other.keys()
            if len({item for item, _ in both}) < 2:
                return None
            mine, other = ({pair: side[pair] for pair in both} for side in (mine, other))
        return compare(mine, other)

    def _rows(self, cell: Cell) -> Sequence[Row]:
        if not self.of_answers:
            return cell.rows
        lost = {row.unit[0] for row in cell.rows if row.status != "completed"}
        return [row for row in cell.rows if row.unit[0] not in lost]


def _share(value: Callable[[Row], bool | None]) -> Callable[[Row], float | None]:
    def number(row: Row) -> float | None:
        found = value(row)
        return None if found is None else float(found)

    return number


def _nll_per_token(row: Row) -> float | None:
    if row.nll_sum is None or not row.nll_tokens:
        return None
    return row.nll_sum / row.nll_tokens


def _output(row: Row, value: bool) -> bool | None:
    """Only what the model wrote itself can loop or be malformed."""
    return None if row.nll_sum is not None else value


ACCURACY = Measure("correct", True, True, _share(lambda row: row.correct))
LOOPS = Measure("loops", True, False, _share(lambda row: _output(row, row.loop)), of_answers=True)
MALFORMED = Measure(
    "malformed", True, False, _share(lambda row: _output(row, bool(row.malformed))), of_answers=True
)
NLL = Measure("NLL per token", False, False, _nll_per_token)

#: What counts as the quality of a task: the first that applies.
QUALITY = (ACCURACY, NLL)


def quality_of(cells: Sequence[Cell]) -> Sequence[Measure]:
    """The measures of quality that a task has: accuracy, NLL, or both."""
    return [measure for measure in QUALITY if measure.applies(cells)]


def pareto_front(cells: Sequence[Cell], measure: Measure) -> list[Cell]:
    """The cells that no other beats: as few slots and as good, and better in one of the two.

    Cells without an answered sample have no place among them: what they take is not known.
    """
    places = []
    for cell in cells:
        slots, estimate = cell.mean(cell.slots), measure.estimate(cell)
        if slots is not None and estimate is not None:
            value = estimate.value
            places.append((cell, (slots, -value if measure.higher_is_better else value)))
    return [
        cell
        for cell, mine in places
        if not any(
            other != mine and other[0] <= mine[0] and other[1] <= mine[1] for _, other in places
        )
    ]
