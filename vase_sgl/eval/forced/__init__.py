"""Teacher-forced evaluation: recorded text goes through a KV cache that is evicted as it grows."""

from __future__ import annotations

from vase_sgl.eval.forced.branch import CacheReport
from vase_sgl.eval.forced.model import ForcedModel
from vase_sgl.eval.forced.nll import ForcedArm, TextChunk, nll_rows, text_chunks
from vase_sgl.eval.forced.session import Session
from vase_sgl.eval.forced.tasks import ForcedItem, passkey_items, state_items, task_rows

__all__ = [
    "CacheReport",
    "ForcedArm",
    "ForcedItem",
    "ForcedModel",
    "Session",
    "TextChunk",
    "nll_rows",
    "passkey_items",
    "state_items",
    "task_rows",
    "text_chunks",
]
