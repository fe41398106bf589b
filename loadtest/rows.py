"""The rows of a report, in Locust's statistics: they add up over processes by themselves.

Calls are Locust's requests, types `generate` (size: output tokens) and `replay`; `Aggregated` and
the charts count them alone. Everything else is a row beside them: `ttft` (of every generation with
a first token, however it ended; size: prompt tokens of the completed ones), `tpot`, `e2e` and
`queue` (completed generations), `rejected`, `unfinished` (cut by the end of the test; size: output
tokens until then), and the verdicts of replays. A row's name is the tenant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from loadtest.calls import Generated, Replayed
from loadtest.span import Span

VERDICTS = ("MATCH", "DIVERGED", "INCOMPARABLE")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row, read at the end. Times in milliseconds; histogram: calls by time."""

    kind: str
    tenant: str
    count: int
    failures: int
    total_ms: float
    max_ms: float
    size: int
    histogram: Mapping[float, int]


def bucket(milliseconds: float) -> float:
    """Round to three digits, so that a histogram stays small and its error below 0.5 %.

    Locust's own buckets are whole milliseconds, too coarse for the time per token of a GPU.
    """
    if milliseconds < 0.01:
        return 0.0
    return round(milliseconds, 2 - math.floor(math.log10(milliseconds)))


class Recorder:
    """Writes the rows of one tenant."""

    def __init__(self, environment: Any, span: Span, tenant: str) -> None:
        """`environment` is Locust's; each row extends the span."""
        self._environment = environment
        self._span = span
        self._tenant = tenant

    def generated(self, call: Generated) -> None:
        """Record a generation."""
        if call.status == "rejected":
            self._note("rejected", call.seconds)
            return
        self._call("generate", call.seconds, call.output_tokens, call.error)
        # Of failed calls too: those that overload makes fail are the slow ones.
        self._note("ttft", call.ttft_seconds, call.prompt_tokens)
        if call.status == "completed":
            self._note("e2e", call.seconds)
            self._note("tpot", call.tpot_seconds)
            self._note("queue", call.queue_seconds)

    def replayed(self, call: Replayed) -> None:
        """Record a replay. One that does not match is a failure."""
        if call.status == "rejected":
            self._note("rejected", call.seconds)
            return
        self._call(
            "replay", call.seconds, 0, call.error or ("" if call.status == "MATCH" else call.status)
        )
        if call.status in VERDICTS:
            self._note(call.status, call.seconds)

    def unfinished(self, seconds: float, output_tokens: int, ttft_seconds: float | None) -> None:
        """Record a call that the end of the test cut short; no `ttft_seconds`: before a token."""
        self._note("ttft", ttft_seconds)
        self._note("unfinished", seconds, output_tokens)

    def _call(self, kind: str, seconds: float, size: int, error: str) -> None:
        self._span.extend()
        self._environment.events.request.fire(
            request_type=kind,
            name=self._tenant,
            response_time=seconds * 1000,
            response_length=size,
            exception=RuntimeError(error) if error else None,
            context={},
        )

    def _note(self, kind: str, seconds: float | None, size: int = 0) -> None:
        if seconds is not None:
            self._span.extend()
            # To the row itself and not through an event, which would count it as one more request.
            self._environment.stats.get(self._tenant, kind).log(seconds * 1000, size)
