"""Has a model fallen into a repetition loop?

Three rules over any sequence of hashable units: token ids, or the words of a text.
Long words come in pieces, so that digits or unspaced script without an end are many units.

**Exact suffix repeat.** The sequence *ends* in copies of one block, the last of which may be cut
off, even within a word: at least `MIN_COPIES` copies and `MIN_LENGTH` units, or `MANY_COPIES`
copies and `MANY_LENGTH` units. The loop's start and period are known exactly.

**A word without end.** Of one character or a few that repeat without blanks (`2222`, `haha`) a
piece is as good as many words: `MANY_COPIES` copies of it, 240 characters, are enough. Marks of
which lines are ruled (`-_=.*#~+`) have longer pieces, and need 2,400.

**N-gram repetition.** Of the n-grams (n = `NGRAM`) in the last `TAIL` units, more than
`MAX_REPETITION` occurred before in that tail; judged from `TAIL / 2` units on. It sees loops that
vary here and there; they have no period.

None sees a loop that counts (`12. Luna`, `13. Luna`), which cannot be told from a list, one of
blanks alone, nor one that the text has left again. The thresholds favour precision: a loop that is
missed early is found later, because it does not end. They were set on 83 labelled texts and
measured on 24 others (`tests/eval/data/loops.jsonl`: answers of real models, most of at most 320
tokens, and tables, code, logs, songs and long numbers): precision 16/16 and 9/9, recall 16/23 and
9/11. Every miss there is a loop in its first copies or one just left.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Hashable, Sequence

MIN_COPIES, MIN_LENGTH = 3, 80
MANY_COPIES, MANY_LENGTH = 10, 30

NGRAM = 6
TAIL = 200
MAX_REPETITION = 0.75

#: Longest piece of a word. Most words are shorter, and many periods divide it: copies of a block
#: without spaces then have the same pieces.
_PIECE = 24
#: A ruled line of one punctuation mark is a single unit, unless it has no end.
_WORD = re.compile(rf"[^\W_]{{1,{_PIECE}}}|([-_=.*#~+])\1{{0,79}}|([^\w\s])\2{{0,{_PIECE - 1}}}")


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
    """The units of a text in lower case: words and runs of an equal punctuation mark, in pieces of
    up to 24 characters; of marks of which lines are ruled, of up to 80."""
    return [match[0] for match in _WORD.finditer(text.casefold())]


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
    """The loop of whole units, or one whose last unit is cut off."""
    whole = _whole_suffix_repeat(units)
    if whole is not None or not units:
        return whole
    cut = _whole_suffix_repeat(units[:-1])
    if cut is None or cut.period is None:
        return None
    return cut if _begins(units[-1], units[-1 - cut.period]) else None


def _begins(part: Hashable, whole: Hashable) -> bool:
    return isinstance(part, str) and isinstance(whole, str) and whole.startswith(part)


def _whole_suffix_repeat(units: Sequence[Hashable]) -> Loop | None:
    best: tuple[int, int] | None = None
    matches = _matches_with_own_end(units)
    for period in range(1, len(units) // MIN_COPIES + 1):
        length = period + matches[period]
        endless = period == 1 and length >= MANY_COPIES and _repeats(units[-1])
        if (endless or _is_loop(period, length)) and (best is None or length > best[0]):
            best = (length, period)
    if best is None:
        return None
    length, period = best
    return Loop(start=len(units) - length, period=period, copies=length // period)


def _is_loop(period: int, length: int) -> bool:
    return length >= max(MIN_COPIES * period, MIN_LENGTH) or length >= max(
        MANY_COPIES * period, MANY_LENGTH
    )


def _repeats(unit: Hashable) -> bool:
    """Whether it is a whole piece of a word, and its second half is as its first."""
    return isinstance(unit, str) and len(unit) == _PIECE and unit == unit[: _PIECE // 2] * 2


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
