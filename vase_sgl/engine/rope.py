"""LongRoPE (Phi-3, Phi-4-mini with a long context): one rotation for the worker's whole life.

Upstream chooses between the factors for short and for long contexts anew in every forward, by the
longest request in the batch. A token's K then depends on its company, and a cache that was rotated
one way is read with queries rotated the other.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.rotary_embedding.rope_variant import Phi3LongRoPEScaledRotaryEmbedding


def choose_long_rope(result: None, runner: Any) -> None:
    """AFTER `ModelRunner.load_model`, before a graph is captured."""
    for rope in _long_ropes(runner.model):
        _choose(rope, runner.model_config.context_len)


def chosen_rope(model: torch.nn.Module) -> dict[str, str]:
    """The fingerprint's entry of models that have the choice."""
    chosen = {rope.chosen for rope in _long_ropes(model)}
    return {"long_rope": ",".join(sorted(chosen))} if chosen else {}


def _long_ropes(model: torch.nn.Module) -> list[Phi3LongRoPEScaledRotaryEmbedding]:
    """Layers of one shape share one module, which is listed once."""
    return [part for part in model.modules() if type(part) is Phi3LongRoPEScaledRotaryEmbedding]


def _choose(rope: Phi3LongRoPEScaledRotaryEmbedding, context_length: int) -> None:
    """The long factors if a request may become longer than the model was first trained for.

    As the model's authors and vLLM do for a context of that length.
    """
    is_long = context_length > rope.original_max_position_embeddings
    rope.chosen = "long" if is_long else "short"
    rope.long_short_cos_sin_cache = rope.long_cos_sin_cache if is_long else rope.short_cos_sin_cache
    # No position is beyond it, so upstream's forward adds no offset.
    rope.original_max_position_embeddings = rope.max_position_embeddings
