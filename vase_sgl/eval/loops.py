"""Has a model fallen into a repetition loop?

Two rules over any sequence of hashable units: token ids, or the words of a text.

**Exact suffix repeat.** The sequence *ends* in copies of one block: at least `MIN_COPIES` copies,
which together are at least `MIN_LENGTH` units (`MIN_LENGTH_SHORT` for a block of up to
`SHORT_PERIOD` units). The last copy may be cut off. The loop's start and period are known exactly.

**N-gram repetition.** Of the n-grams (n = `NGRAM`) in the last `TAIL` units, more than
`MAX_REPETITION` occurred before in that tail; judged from `TAIL / 2` units on. It sees loops that
vary a little, as by a counter; they have no period.

The thresholds were set on labelled samples of a real model (`tests/eval/data/loops.jsonl`), where
the test prints precision and recall. Lists, tables and refrains repeat too; they vary, or end.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Hashable, Sequence

MIN_COPIES = 3
MIN_LENGTH = 30
SHORT_PERIOD = 3
MIN_LENGTH_SHORT = 12

NGRAM = 6
TAIL = 200
MAX_REPETITION = 0.6

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Where a sequence started to repeat itself. Positions count units from 0."""

    #: First unit of the first copy; for a loop found by its n-grams, the first repeated n-gram of
    #: the tail.
    start: int
    #: Units of one copy; None for a loop with variations.
    period: int | None
    #: Whole copies at the end of the sequence; None for a loop with variations.
    copies: int | None


def words(text: str) -> list[str]:
    """The units of a text: words and single punctuation marks, in lower case."""
    return _WORD.findall(text.casefold())


def detect_loop(units: Sequence[Hashable]) -> Loop | None:
    """The loop that `units` ends in, or None.

    Of several periods the one whose repetition reaches back furthest is reported, the shortest of
    equals. Linear in the number of units.
    """
    return _suffix_repeat(units) or _varied_repeat(units)


def repetition(units: Sequence[Hashable]) -> float:
    """Share of the n-grams in the last TAIL units that occurred before in them, 0 to 1."""
    grams = _tail_ngrams(units)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _suffix_repeat(units: Sequence[Hashable]) -> Loop | None:
    best: tuple[int, int] | None = None
    matches = _matches_with_own_end(units)
    for period in range(1, len(units) // MIN_COPIES + 1):
        length = period + matches[period]
        enough = MIN_LENGTH_SHORT if period <= SHORT_PERIOD else MIN_LENGTH
        if length >= max(MIN_COPIES * period, enough) and (best is None or length > best[0]):
            best = (length, period)
    if best is None:
        return None
    length, period = best
    return Loop(start=len(units) - length, period=period, copies=length // period)


def _matches_with_own_end(units: Sequence[Hashable]) -> list[int]:
    """For every shift, how many of the last units equal those that many places before them.

    The Z function of the reversed sequence (Gusfield, Algorithms on Strings, 1997, section 1.4).
    """
    reverse = list(reversed(units))
    n = len(reverse)
    matches = [0] * n
    left = right = 0
    for shift in range(1, n):
        length = min(right - shift, matches[shift - left]) if shift < right else 0
        while shift + length < n and reverse[length] == reverse[shift + length]:
            length += 1
        matches[shift] = length
        if shift + length > right:
            left, right = shift, shift + length
    return matches


def _varied_repeat(units: Sequence[Hashable]) -> Loop | None:
    if len(units) < TAIL // 2 or repetition(units) <= MAX_REPETITION:
        return None
    grams = _tail_ngrams(units)
    counts = Counter(grams)
    first = next(place for place, gram in enumerate(grams) if counts[gram] > 1)
    return Loop(start=max(0, len(units) - TAIL) + first, period=None, copies=None)


def _tail_ngrams(units: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
    tail = units[-TAIL:]
    return [tuple(tail[place : place + NGRAM]) for place in range(len(tail) - NGRAM + 1)]
