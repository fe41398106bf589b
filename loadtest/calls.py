"""One call to the gateway, measured from the client's side.

Through `vase_sgl.client`, not the bare stubs: what is measured is what a user of the SDK gets, and
errors and retry hints have one reading. Retries are off, or a refusal would look like a slow call.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Literal

from vase_sgl.client import Client, Prompt, RateLimited, VaseError
from vase_sgl.client.messages import Options

#: Errors are counted by their text; ids and lengths would make each one its own.
_ID = re.compile(r"[0-9a-f]{32}")
_LONGEST_ERROR = 200


@dataclasses.dataclass(frozen=True)
class Generated:
    """A generation. Durations in seconds, from the moment of the call.

    ttft_seconds: until the first message with tokens was here. tpot_seconds: from there to the
    last, per token after the first message, which may hold several; None where that held them all.
    seconds: until the record was durable.
    queue_seconds: until a worker had it, by the gateway's clock. What is absent did not happen.
    output_tokens, ttft_seconds: of what arrived, also of a call that failed.
    """

    status: Literal["completed", "rejected", "failed"]
    seconds: float
    error: str = ""
    retry_seconds: float | None = None
    record_id: str = ""
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: float | None = None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A replay; `error` is empty unless it failed or was refused."""

    status: Literal["MATCH", "DIVERGED", "INCOMPARABLE", "rejected", "failed"]
    seconds: float
    error: str = ""
    retry_seconds: float | None = None


def generate(
    client: Client,
    prompt: Prompt,
    max_new_tokens: int,
    timeout: float,
    options: Options,
    on_tokens: Callable[[int], None],
) -> Generated:
    """Generate and read to the end; `on_tokens` hears how many tokens arrived, as they do.

    Leaving early, by any exception, cancels the call.
    """
    start = time.perf_counter()
    ttft: float | None = None
    last = start
    tokens = first_tokens = 0
    text = ""
    try:
        call = client.generate(prompt, max_new_tokens=max_new_tokens, timeout=timeout, **options)
        with call as stream:
            for chunk in stream:
                if chunk.token_ids:
                    last = time.perf_counter()
                    if ttft is None:
                        ttft, first_tokens = last - start, len(chunk.token_ids)
                    tokens += len(chunk.token_ids)
                    on_tokens(len(chunk.token_ids))
                text += chunk.text
            result, record_id = stream.result, stream.request_id
    except VaseError as error:
        # A limit that strikes when output has come is no refusal.
        status: Literal["rejected", "failed"] = (
            "rejected" if isinstance(error, RateLimited) and not tokens else "failed"
        )
        return Generated(
            status,
            time.perf_counter() - start,
            _short(error),
            retry_seconds=error.retry_seconds,
            output_tokens=tokens,
            ttft_seconds=ttft,
        )
    seconds = time.perf_counter() - start
    later_tokens = tokens - first_tokens
    if tokens != result.usage.completion_tokens:
        lost = f"{tokens} of {result.usage.completion_tokens} tokens of the answer arrived"
        return Generated("failed", seconds, lost, output_tokens=tokens, ttft_seconds=ttft)
    return Generated(
        "completed",
        seconds,
        record_id=record_id,
        text=text,
        prompt_tokens=result.usage.prompt_tokens,
        output_tokens=tokens,
        queue_seconds=result.timings.queue_seconds,
        ttft_seconds=ttft,
        tpot_seconds=(
            (last - start - ttft) / later_tokens if ttft is not None and later_tokens else None
        ),
    )


def replay(client: Client, record_id: str, timeout: float) -> Replayed:
    """Replay a record and wait for the verdict."""
    start = time.perf_counter()
    running = client.replay(record_id, timeout=timeout)
    try:
        verdict = running.verdict
    except VaseError as error:
        status: Literal["rejected", "failed"] = (
            "rejected" if isinstance(error, RateLimited) else "failed"
        )
        return Replayed(status, time.perf_counter() - start, _short(error), error.retry_seconds)
    finally:
        running.cancel()
    return Replayed(verdict.outcome, time.perf_counter() - start)


def _short(error: VaseError) -> str:
    return _ID.sub("<id>", f"{error.code}: {error}")[:_LONGEST_ERROR]
