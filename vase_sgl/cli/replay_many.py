"""Replays of a sample of records: which ones, their verdicts, and the report."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from vase_sgl.client import AsyncClient
    from vase_sgl.client.types import RecordSummary, Verdict

#: Exit status of a bulk replay. 1 is also any error before it began.
MATCHED, FAILED, DIVERGED, INCOMPARABLE, NOTHING, INTERRUPTED = 0, 1, 3, 4, 5, 130
#: Longest wait before a replay that was refused for want of room is asked for again.
_ASK_AGAIN_SECONDS = 5.0
#: Lines of first differences that are shown; the report has all.
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Sample:
    """The records of a time that are replayed.

    listed: completed records in that time. not_known: others, of which the gateway does not know
    how they ended: a newer one wrote them. not_kept: completed ones of the sample without content,
    which cannot be replayed. chosen: the others, oldest first.
    """

    listed: int
    not_known: int
    not_kept: int
    chosen: tuple[RecordSummary, ...]


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One record of the sample. Exactly one of verdict and error is there."""

    record_id: str
    seconds: float
    verdict: Verdict | None
    error: str | None

    @property
    def outcome(self) -> str:
        """MATCH, DIVERGED, INCOMPARABLE or FAILED."""
        return "FAILED" if self.verdict is None else self.verdict.outcome


def share(text: str) -> float:
    """A share such as `5%` as a number up to 1. Raises `typer.BadParameter`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if match is None or not 0 < float(match[1]) <= 100:
        raise typer.BadParameter(
            f"{text!r} is not a share; one looks like 5%, up to 100%", param_hint="--sample"
        )
    return float(match[1]) / 100


def is_chosen(record_id: str, sample: float, seed: int) -> bool:
    """Whether a record is in the sample: a function of its id and the seed alone.

    So two runs choose the same records, and a larger share contains the smaller.
    """
    digest = hashlib.sha256(f"{seed}:{record_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < sample * 2**64


async def choose(records: AsyncIterator[RecordSummary], sample: float, seed: int) -> Sample:
    """The sample of `records`."""
    listed, not_known, not_kept = 0, 0, 0
    chosen: list[RecordSummary] = []
    async for record in records:
        if record.status != "completed":
            not_known += record.status == "unknown"
            continue
        listed += 1
        if not is_chosen(record.record_id, sample, seed):
            continue
        if record.retention == "hash":
            not_kept += 1
        else:
            chosen.append(record)
    return Sample(listed, not_known, not_kept, tuple(reversed(chosen)))


async def replay_all(
    client: AsyncClient,
    records: Sequence[RecordSummary],
    *,
    parallel: int,
    on_done: Callable[[Replayed], None],
) -> list[Replayed]:
    """Replay every record, `parallel` at once; results in the order of `records`.

    Cancelled, it gives up what runs and returns the results there are, fewer than the records;
    without any it raises `CancelledError`.
    """
    results: dict[str, Replayed] = {}
    left = iter(records)

    async def work() -> None:
        for record in left:
            results[record.record_id] = await _replay(client, record.record_id)
            on_done(results[record.record_id])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(work())
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        if not results:
            raise
        task.uncancel()
    return [results[r.record_id] for r in records if r.record_id in results]


async def _replay(client: AsyncClient, record_id: str) -> Replayed:
    """A replay that may not wait at the gateway, for so many wait there, waits here."""
    from vase_sgl.client import RateLimited, VaseError

    begun = time.monotonic()
    verdict, error = None, None
    while verdict is None and error is None:
        try:
            verdict = await client.replay(record_id).verdict()
        except RateLimited as refusal:
            if refusal.retry_seconds is None:
                error = str(refusal)
            else:
                await asyncio.sleep(min(refusal.retry_seconds, _ASK_AGAIN_SECONDS))
        except VaseError as failure:
            error = str(failure)
    return Replayed(record_id, time.monotonic() - begun, verdict, error)


def exit_status(results: Sequence[Replayed]) -> int:
    """The worst there is."""
    outcomes = {result.outcome for result in results}
    for outcome, status in (
        ("DIVERGED", DIVERGED),
        ("FAILED", FAILED),
        ("INCOMPARABLE", INCOMPARABLE),
    ):
        if outcome in outcomes:
            return status
    return MATCHED if results else NOTHING


def summarize(results: Sequence[Replayed], seconds: float) -> dict[str, object]:
    """Counts and rates, for the report."""
    verdicts = [result.verdict for result in results if result.verdict is not None]
    tokens = sum(verdict.tokens_compared for verdict in verdicts)
    return {
        "outcomes": dict(collections.Counter(result.outcome for result in results)),
        "seed_checks": dict(collections.Counter(verdict.seed_check for verdict in verdicts)),
        "seconds": round(seconds, 3),
        "tokens_compared": tokens,
        "records_per_second": round(len(results) / seconds, 3) if seconds else None,
        "tokens_per_second": round(tokens / seconds, 3) if seconds else None,
    }


def show(console: Console, sample: Sample, results: Sequence[Replayed], seconds: float) -> None:
    """The summary as tables."""
    from rich.table import Table

    table = Table("verdict", "records", "share", "tokens equal", "rounds equal")
    for outcome in ("MATCH", "DIVERGED", "INCOMPARABLE", "FAILED"):
        group = [result for result in results if result.outcome == outcome]
        if not group:
            continue
        verdicts = [result.verdict for result in group if result.verdict is not None]
        table.add_row(
            outcome,
            str(len(group)),
            f"{len(group) / len(results):.1%}",
            str(sum(verdict.tokens_compared for verdict in verdicts)),
            str(sum(verdict.rounds_compared for verdict in verdicts)),
        )
    console.print(table)
    differing = [result for result in results if result.outcome != "MATCH"]
    for result in differing[:_SHOWN]:
        console.print(f"{result.record_id} {result.outcome}: {first_difference(result)}")
    if len(differing) > _SHOWN:
        console.print(f"and {len(differing) - _SHOWN} more; --report writes all")
    wrong = [r for r in results if r.verdict and r.verdict.seed_check == "MISMATCH"]
    if wrong:
        console.print(
            f"{len(wrong)} of them hold seeds that the tenant's master secret does not give, "
            f"{wrong[0].record_id} first"
        )
    tokens = sum(r.verdict.tokens_compared for r in results if r.verdict is not None)
    console.print(
        f"{len(results)} of {sample.listed} completed records replayed in {seconds:.1f} s: "
        f"{len(results) / seconds:.2f} records/s, {tokens / seconds:.0f} tokens/s"
        + (f"; {sample.not_kept} more hold digests only" if sample.not_kept else "")
        + (f"; {sample.not_known} are of a newer gateway" if sample.not_known else "")
    )


def first_difference(result: Replayed) -> str:
    """Where a record first differs, in a few words."""
    verdict = result.verdict
    if verdict is None:
        return str(result.error)
    places = [difference.key for difference in verdict.differences]
    if verdict.first_differing_token is not None:
        places.append(f"token {verdict.first_differing_token}")
    if verdict.first_differing_round is not None:
        places.append(f"eviction round {verdict.first_differing_round}")
    return ", ".join(places)
