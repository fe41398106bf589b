"""Inspections to show, and what is in a page."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vase_sgl.inspection import Inspection
from vase_sgl.inspection.page import DATA_ID

#: A model's output that would end the data, or run, if it were not escaped.
HOSTILE = "</script><img src=x onerror='window.hacked=1'><!-- @SCRIPT@ \u202e\u2028 'é🦑'\n\tend"


def byte_tokenizer() -> Tokenizer:
    """One token for each byte: characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece's: the token of byte b is b, and 256 onwards are "▁the", "▁cat"."""
    words = ["▁the", "▁cat"]
    vocabulary = {name: i for i, name in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    strip = decoders.Strip(" ", 1)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def sample(
    token_ids: list[int], *, prompt: int = 20, budget: int = 24, window: int = 8, **change: Any
) -> Inspection:
    """A random request under the budget's arithmetic: 3 layers of 2 KV heads."""
    rng = np.random.default_rng(0)
    tokens = len(token_ids)
    lengths = np.arange(max(prompt, budget) + window, tokens - 1, window, dtype=np.int32)
    table = np.zeros((3, 2, tokens), np.uint16)
    for row in table.reshape(-1, tokens):
        for number, length in enumerate(lengths, start=1):
            kept = np.flatnonzero(row[:length] == 0)
            gone = rng.choice(kept[:-window], len(kept) - budget, replace=False)
            row[gone] = number
    made = Inspection(
        request_id="sample",
        model="none",
        params={"budget": budget, "window": window, "policy": "random", "prompt": "evict"},
        prompt_tokens=prompt,
        total_heads=2,
        recorded_rounds=len(lengths),
        token_ids=np.array(token_ids, np.int32),
        round_lengths=lengths,
        heads=np.arange(2, dtype=np.int32),
        evicted_in_round=table,
    )
    return dataclasses.replace(made, **change)


class PageParts(HTMLParser):
    """What an HTML parser sees: tags, attributes, the data and the scripts."""

    def __init__(self, page: Path | str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.contents: dict[str, str] = {}
        self.policy = ""
        self._open: str | None = None
        self.feed(page.read_text("utf-8") if isinstance(page, Path) else page)
        self.close()
        self.data: dict[str, Any] = json.loads(self.contents[DATA_ID])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(given)
        if tag in ("script", "style"):
            self._open = given.get("id") or tag
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.contents[self._open] = self.contents.get(self._open, "") + data
