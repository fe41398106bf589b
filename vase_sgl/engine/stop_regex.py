"""How long `stop_regex` may take: Python's `re` tries every way in which a pattern can match.

SGLang searches an answer for it after every token, in the scheduler, where all requests wait: as
many of the last tokens as a match can have characters, or all where that has no bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# The parser by which SGLang bounds how much of an answer a pattern may need; `MAX_LEN`: all.
from sglang.srt.sampling.sampling_params import MAX_LEN
from sglang.srt.sampling.sampling_params import sre_parse as parser

#: From one character of the answer, by all patterns of a request.
MAX_STEPS = 1000
#: A step of patterns that search the whole answer counts as so many.
WHOLE_ANSWER = 10
#: Characters in ranges of all patterns of a request: compiling looks at each, most of a second for
#: four million.
MAX_IN_RANGES = 2**17

_ONE_CHARACTER = (parser.LITERAL, parser.NOT_LITERAL, parser.ANY, parser.IN)
_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)
_ASSERTIONS = (parser.ASSERT, parser.ASSERT_NOT)


class _TooLong(Exception):
    """It takes more steps, or as many as the answer has characters."""


def are_quick(patterns: Iterable[str], searched: int) -> bool:
    """Whether from any character all patterns take at most `MAX_STEPS` steps.

    patterns: that SGLang has parsed. searched: tokens of an answer that it searches for them all,
    those that the longest match may need. So a search takes time linear in the answer's length,
    and compiling them a bounded one.
    """
    parsed = [parser.parse(one) for one in patterns]
    if sum(map(_in_ranges, parsed)) > MAX_IN_RANGES:
        return False
    try:
        steps = sum(_sequence(one, is_last=True)[1] for one in parsed)
    except _TooLong:
        return False
    return steps * (WHOLE_ANSWER if searched >= MAX_LEN else 1) <= MAX_STEPS


def _in_ranges(part: Any) -> int:
    """Characters of all ranges in a parsed pattern."""
    match part:
        case (parser.RANGE, (first, last)):
            return int(last - first + 1)
        case tuple() | list() | parser.SubPattern():
            return sum(map(_in_ranges, part))
    return 0


def _sequence(parts: Iterable[tuple[Any, Any]], *, is_last: bool) -> tuple[int, int]:
    """In how many ways it can match at most, and in how many steps all are tried."""
    parts = list(parts)
    ways, steps = 1, 0
    for index, (kind, value) in enumerate(parts):
        more_ways, more_steps = _part(kind, value, is_last=is_last and index == len(parts) - 1)
        # Where what follows does not match, the next way is tried.
        steps += ways * more_steps
        ways *= more_ways
    return ways, steps


def _part(kind: Any, value: Any, *, is_last: bool) -> tuple[int, int]:
    """`is_last`: nothing follows that may fail, so the first way is the only one."""
    if kind in _ONE_CHARACTER or kind is parser.AT:
        return 1, 1
    if kind is parser.SUBPATTERN:
        return _sequence(value[-1], is_last=is_last)
    if kind is parser.ATOMIC_GROUP:
        return _sequence(value, is_last=is_last)
    if kind is parser.BRANCH:
        found = [_sequence(branch, is_last=is_last) for branch in value[1]]
        return sum(ways for ways, _ in found), sum(steps for _, steps in found)
    if kind in _ASSERTIONS:
        return 1, _sequence(value[1], is_last=False)[1]
    if kind in _REPEATS:
        least, most, repeated = value
        if most == parser.MAXREPEAT:
            if not is_last:
                raise _TooLong
            most = least + 1  # all further ones cannot fail the match
        return _repeat(least, most, _sequence(repeated, is_last=False))
    raise _TooLong  # a back-reference, or what only a later Python has


def _repeat(least: int, most: int, once: tuple[int, int]) -> tuple[int, int]:
    of_times, steps = 1, 0  # ways of the first so many times
    ways = int(least == 0)
    for times in range(1, most + 1):
        steps += of_times * max(1, once[1])  # nothing at all takes a step too
        if steps > MAX_STEPS:
            raise _TooLong
        of_times *= once[0]
        if times >= least:
            ways += of_times
    return ways, steps
