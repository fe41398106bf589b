"""A replay against its record: the first place where they differ, and what that means."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from vase_sgl.gateway.audit import Record
from vase_sgl.gateway.seeds import SeedCheck
from vase_sgl.gateway.workers import CHANGED, RETRACTIONS, Finish, WorkerChunk, weights_are_known

#: Entry of the fingerprint: whether equal requests have equal answers there, in any company.
DETERMINISTIC = "deterministic"
#: Characters of a text that a verdict quotes.
_EXCERPT = 32


class Outcome(enum.Enum):
    """What a replay can find."""

    MATCH = "match"
    DIVERGED = "diverged"
    INCOMPARABLE = "incomparable"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One entry of the fingerprint, or of how the answer ended, that differs. None: not there."""

    key: str
    recorded: str | None
    current: str | None


@dataclasses.dataclass(frozen=True)
class TokenDifference:
    """The first output position that differs. None: that side had ended."""

    position: int
    expected: int | None
    actual: int | None


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a comparison has come; everything so far was equal."""

    tokens_compared: int
    tokens_total: int
    rounds_compared: int
    rounds_total: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a replay. Rounds count from 1. seed_check is set for every verdict sent."""

    outcome: Outcome
    token: TokenDifference | None = None
    round: int | None = None
    differences: tuple[Difference, ...] = ()
    tokens_compared: int = 0
    rounds_compared: int = 0
    seed_check: SeedCheck = SeedCheck.ORIGIN_UNKNOWN


def fingerprint_differences(
    recorded: Mapping[str, str], current: Mapping[str, str]
) -> tuple[Difference, ...]:
    """Every entry of a worker that differs or is on one side only, by key.

    Also that the recorded one was not deterministic: an equal worker need not answer equally. Not
    the folder's name of a model whose weights were read: their digest says more.
    """
    ignored = {RETRACTIONS}
    if weights_are_known(recorded):
        ignored.add("model")
    return tuple(
        Difference(key, recorded.get(key), current.get(key))
        for key in sorted({*recorded, *current} - ignored)
        if recorded.get(key) != current.get(key)
        or (key == DETERMINISTIC and recorded.get(key) == "false")
    )


def under_change(verdict: Verdict, stamp: str) -> Verdict:
    """INCOMPARABLE: the worker had become another, of this stamp, before the replay ended."""
    return dataclasses.replace(
        verdict,
        outcome=Outcome.INCOMPARABLE,
        token=None,
        round=None,
        differences=(Difference(CHANGED, None, stamp),),
    )


class Comparison:
    """Compares a running replay with its record. `see` mutates the state."""

    def __init__(self, record: Record, max_new_tokens: int) -> None:
        """max_new_tokens: what the replay asks for."""
        self._record = record
        self._max_new_tokens = max_new_tokens
        self._tokens = record.output_token_ids
        self._digests = record.round_digests
        self._tokens_compared = 0
        self._rounds_compared = 0

    def progress(self) -> Progress:
        """How far it has come."""
        return Progress(
            self._tokens_compared, len(self._tokens), self._rounds_compared, len(self._digests)
        )

    def see(self, chunk: WorkerChunk) -> Verdict | None:
        """The verdict, as soon as `chunk` decides it."""
        token = self._token_difference(chunk)
        round_ = self._round_difference(chunk)
        differences: tuple[Difference, ...] = ()
        if token is not None or round_ is not None:
            outcome = Outcome.DIVERGED
        elif chunk.finish is None:
            return None
        elif self._clipped(chunk):
            outcome, differences = Outcome.INCOMPARABLE, (self._ends(chunk.finish, chunk),)
        else:
            differences = self._end_differences(chunk.finish, chunk)
            outcome = Outcome.DIVERGED if differences else Outcome.MATCH
        verdict = Verdict(
            outcome,
            token=token,
            round=round_,
            differences=differences,
            tokens_compared=self._tokens_compared,
            rounds_compared=self._rounds_compared,
        )
        return _without_retractions(verdict, self._record, chunk)

    def _clipped(self, chunk: WorkerChunk) -> bool:
        """Whether a ceiling of the worker ended the replay before it had what it asked for."""
        ended_by_length = chunk.finish is not None and chunk.finish.reason == "length"
        return ended_by_length and len(chunk.token_ids) < self._max_new_tokens

    def _ends(self, finish: Finish, chunk: WorkerChunk) -> Difference:
        return Difference(
            "finish_reason",
            f"{self._record.finish_reason} after {len(self._tokens)} tokens",
            f"{finish.reason} after {len(chunk.token_ids)} tokens",
        )

    def _end_differences(self, finish: Finish, chunk: WorkerChunk) -> tuple[Difference, ...]:
        """What differs though all tokens are equal: why the answer ended, and its text."""
        found = []
        if finish.reason != self._record.finish_reason:
            found.append(self._ends(finish, chunk))
        left, right = self._record.text, chunk.text
        if left != right:
            pairs = enumerate(zip(left, right, strict=False))
            start = next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))
            found.append(Difference("text", _excerpt(left, start), _excerpt(right, start)))
        return tuple(found)

    def _token_difference(self, chunk: WorkerChunk) -> TokenDifference | None:
        actual = chunk.token_ids
        end = len(actual)
        if chunk.finish is not None and not self._clipped(chunk):
            end = max(end, len(self._tokens))
        for position in range(self._tokens_compared, end):
            left = self._tokens[position] if position < len(self._tokens) else None
            right = actual[position] if position < len(actual) else None
            if left != right:
                return TokenDifference(position, left, right)
            self._tokens_compared += 1
        return None

    def _round_difference(self, chunk: WorkerChunk) -> int | None:
        """The first round seen to differ.

        Digests are chained: an equal one vouches for every round before it. While the answer
        streams only the latest is known; the last chunk brings them all.
        """
        if chunk.finish is not None:
            actual = chunk.round_digests
            last = len(actual)
            if not self._clipped(chunk):
                last = max(last, len(self._digests))
            for number in range(1, last + 1):
                if actual[number - 1 : number] != self._digests[number - 1 : number]:
                    return number
                self._rounds_compared = max(self._rounds_compared, number)
            return None
        if chunk.cache is None or chunk.cache.rounds <= self._rounds_compared:
            return None
        number = chunk.cache.rounds
        if self._digests[number - 1 : number] != (chunk.cache.digest,):
            return number
        self._rounds_compared = number
        return None


def _excerpt(text: str, start: int) -> str:
    return f"{text[start : start + _EXCERPT]!r} from character {start}"


def _without_retractions(verdict: Verdict, record: Record, chunk: WorkerChunk) -> Verdict:
    """`verdict`, but no DIVERGED where the recorded answer or this one was retracted.

    What a retracted answer goes on from is a prefill of what it had, which rounds differently.
    """
    recorded = record.fingerprint.get(RETRACTIONS)
    current = str(chunk.retractions) if chunk.retractions else None
    retracted = recorded is not None or current is not None
    if verdict.outcome is not Outcome.DIVERGED or not retracted:
        return verdict
    return Verdict(
        Outcome.INCOMPARABLE,
        differences=(Difference(RETRACTIONS, recorded, current),),
        tokens_compared=verdict.tokens_compared,
        rounds_compared=verdict.rounds_compared,
    )
