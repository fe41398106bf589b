"""Teacher-forced negative log-likelihood of recorded text, arm by arm."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from vase_sgl.eval.forced.branch import CacheReport
from vase_sgl.eval.forced.model import ForcedModel
from vase_sgl.eviction import EvictionParams


@dataclasses.dataclass(frozen=True)
class ForcedArm:
    """One way to keep the cache; None keeps all of it. `seed_index` tells repetitions apart."""

    name: str
    params: EvictionParams | None
    seed_index: int = 0


@dataclasses.dataclass(frozen=True)
class TextChunk:
    """One item: `prompt` is cached whole, `forced` is scored as if it had been generated."""

    item_id: str
    prompt: tuple[int, ...]
    forced: tuple[int, ...]


def text_chunks(
    name: str, tokens: Sequence[int], *, prompt_tokens: int, forced_tokens: int, count: int
) -> list[TextChunk]:
    """The first `count` consecutive, disjoint chunks of a tokenised text.

    Raises ValueError if the text is too short: fewer items would pair with nothing.
    """
    if min(prompt_tokens, forced_tokens, count) < 1:
        raise ValueError("prompt_tokens, forced_tokens and count must be at least 1")
    size = prompt_tokens + forced_tokens
    if len(tokens) < count * size:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, but {count} chunks of {prompt_tokens} + "
            f"{forced_tokens} need {count * size}; ask for fewer or shorter ones"
        )
    parts = [tuple(tokens[index * size : (index + 1) * size]) for index in range(count)]
    return [
        TextChunk(f"{name}/{index}", part[:prompt_tokens], part[prompt_tokens:])
        for index, part in enumerate(parts)
    ]


def nll_rows(
    model: ForcedModel, chunks: Sequence[TextChunk], arms: Sequence[ForcedArm], run_id: str
) -> Iterator[dict[str, Any]]:
    """One JSON-able row per chunk and arm, chunk by chunk; arms of a chunk run side by side.

    `nll_sum` (nats) is over all `nll_tokens` forced tokens, also those before the first round,
    so that sums of different arms compare token by token.
    """
    for chunk in chunks:
        started, start = time.time(), time.monotonic()
        session = model.start(chunk.prompt, [arm.params for arm in arms])
        losses = session.force(chunk.forced)
        seconds = time.monotonic() - start
        for index, arm in enumerate(arms):
            yield {
                "run_id": run_id,
                "task": "nll",
                "item_id": chunk.item_id,
                "started": started,
                "total_seconds": seconds,
                **row_fields(arm, session.report(index), len(chunk.prompt)),
                **loss_fields(losses[index]),
            }


def row_fields(arm: ForcedArm, report: CacheReport, prompt_tokens: int) -> dict[str, Any]:
    """The arm, and what its cache has behind it, by the names of the evaluation's rows.

    `reserved_slots` are those at the end; nothing is shared, so without a prefix cache. Seconds are
    those of all arms of a session together: they run side by side.
    """
    params = arm.params
    output_tokens = report.logical_length - prompt_tokens
    slots = report.logical_length
    if params is not None and report.rounds:
        slots = params.steady_slots(prompt_tokens)
    evicts = params is not None and params.policy.evicts
    return {
        "arm": arm.name,
        "policy": "full" if params is None else params.policy.name,
        "budget": params.budget if params is not None and evicts else None,
        "window": params.window if params is not None and evicts else None,
        "prompt_mode": params.prompt if params is not None and evicts else None,
        "worker": "in-process",
        "seed_index": arm.seed_index,
        "seeds": {} if params is None else {"eviction": params.seed},
        "status": "completed",
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rounds": report.rounds,
        "evicted_tokens": report.evicted_tokens,
        "physical_length": report.physical_length,
        "reserved_slots": slots,
        "full_kv_slots": report.logical_length,
        "digest": report.digest,
    }


def loss_fields(losses: Tensor) -> dict[str, Any]:
    """Sum, in float64, and number of the losses of one arm."""
    return {"nll_sum": float(losses.double().sum()), "nll_tokens": len(losses)}
