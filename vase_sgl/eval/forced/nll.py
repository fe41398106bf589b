"""Teacher-forced negative log-likelihood of recorded text, arm by arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from vase_sgl.eval.forced.model import ForcedModel
from vase_sgl.eval.forced.session import Session
from vase_sgl.eviction import EvictionParams

Arms = Mapping[str, EvictionParams | None]


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
    model: ForcedModel, chunks: Sequence[TextChunk], arms: Arms
) -> Iterator[dict[str, Any]]:
    """One JSON-able row per chunk and arm, chunk by chunk; arms of a chunk run side by side.

    `nll_sum` (nats) is over all `nll_tokens` forced tokens, also those before the first round,
    so that sums of different arms compare token by token.
    """
    for chunk in chunks:
        session = model.start(chunk.prompt, list(arms.values()))
        losses = session.force(chunk.forced)
        for index, name in enumerate(arms):
            yield arm_fields(name, arms[name]) | {
                "task": "nll",
                "item_id": chunk.item_id,
                **loss_fields(losses[index]),
                **cache_fields(session, index, len(chunk.prompt)),
            }


def arm_fields(name: str, params: EvictionParams | None) -> dict[str, Any]:
    """What identifies an arm in a row; without parameters it is the full cache."""
    if params is None:
        return {"arm": name, "policy": "full", "budget": None, "window": None, "prompt": None}
    return {"arm": name, **params.to_mapping(), "eviction_seed": params.seed}


def loss_fields(losses: Tensor) -> dict[str, Any]:
    """Sum, in float64, and number of the losses of one arm."""
    return {"nll_sum": float(losses.double().sum()), "nll_tokens": len(losses)}


def cache_fields(session: Session, arm: int, prompt_tokens: int) -> dict[str, Any]:
    """What the engine's `meta_info["vase"]` would say, and the number of tokens."""
    report = session.report(arm)
    return {
        "prompt_tokens": prompt_tokens,
        "output_tokens": report.logical_length - prompt_tokens,
        "rounds": report.rounds,
        "evicted_tokens": report.evicted_tokens,
        "physical_length": report.physical_length,
        "logical_length": report.logical_length,
        "digest": report.digest,
    }
