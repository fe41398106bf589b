"""A decoder that shares nothing with the engine: own attention, RoPE, cache, float64 oracle.

It keeps an explicit list of (key, value, position) per layer and head and rotates by logical
position. Slow and plain, for the tiny model alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from vase_kernels.reference import chain, format_digest, round_sum

from tests.kernels import oracle

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
#: Relative distance of two keys that no rounding in float32 bridges.
_CLEAR = 1e-5
Row = tuple[torch.Tensor, torch.Tensor, int]


class IndependentDecoder:
    """weights: by SGLang's parameter names. forgotten: token positions of the victims of each
    round, [layers][kv heads], kept for digests."""

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        vase: dict[str, Any],
        rope_shift: int = 0,
        kv_dtype: torch.dtype = torch.float32,
        attention_scale: float = DIM**-0.5,
    ) -> None:
        self.kv_dtype = kv_dtype
        self.attention_scale = attention_scale
        self.weights = weights
        self.vase = vase
        self.forgotten: list[list[list[list[int]]]] = []
        self.rope_shift = rope_shift  # only the wrong decoder of the control test sets it
        self.rows: list[list[list[Row]]] = [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
        self.queries: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
        self.position = 0
        self.round = 0
        self.pinned = 0

    def generate(self, prompt: list[int], new: int) -> list[int]:
        for token in prompt:
            logits = self._forward(token)
        tokens = [int(logits.argmax())]
        budget, window = self.vase["budget"], self.vase["window"]
        trigger = max(len(prompt), budget) + window
        if self.vase.get("prompt") == "keep":
            self.pinned = len(prompt)
            trigger = self.pinned + budget + window
        while len(tokens) < new:
            if len(self.rows[0][0]) == trigger:
                self._evict()
                trigger = self.pinned + budget + window
            tokens.append(int(self._forward(tokens[-1]).argmax()))
        return tokens

    def digest(self) -> str:
        """The digest of the rounds so far, as the engine reports it."""
        digest = torch.zeros(1, dtype=torch.int64)
        for number, victims in enumerate(self.forgotten, 1):
            places = torch.arange(LAYERS), torch.arange(KV_HEADS)
            positions = torch.tensor(victims)[None]
            digest = chain(digest, round_sum(positions, torch.tensor([number]), *places))
        return format_digest(int(digest))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean() + 1e-5) * self.weights[name]

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        half = DIM // 2
        frequency = 10000.0 ** -(torch.arange(half).float() / half)
        shift = self.rope_shift if self.round else 0
        angle = (self.position - shift) * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _forward(self, token: int) -> torch.Tensor:
        w = self.weights
        x = w["model.embed_tokens.weight"][token]
        for layer in range(LAYERS):
            name = f"model.layers.{layer}."
            h = self._norm(x, name + "input_layernorm.weight")
            qkv = w[name + "self_attn.qkv_proj.weight"] @ h
            q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM])
            q, k = self._rope(q.view(HEADS, DIM)), self._rope(k.view(KV_HEADS, DIM))
            v = v.view(KV_HEADS, DIM)
            self.queries[layer].append(q)
            mixed = []
            for head in range(KV_HEADS):
                stored = (x[head].to(self.kv_dtype).float() for x in (k, v))
                self.rows[layer][head].append((*stored, self.position))
            for head in range(HEADS):
                rows = self.rows[layer][head * KV_HEADS // HEADS]
                keys = torch.stack([row[0] for row in rows])
                values = torch.stack([row[1] for row in rows])
                mixed.append((keys @ q[head] * self.attention_scale).softmax(0) @ values)
            x = x + w[name + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            h = self._norm(x, name + "post_attention_layernorm.weight")
            gate, up = (w[name + "mlp.gate_up_proj.weight"] @ h).chunk(2)
            x = x + w[name + "mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        self.position += 1
        return w["model.embed_tokens.weight"] @ self._norm(x, "model.norm.weight")

    def _evict(self) -> None:
        self.round += 1
        self.forgotten.append([])
        budget, window = self.vase["budget"], self.vase["window"]
        for layer in range(LAYERS):
            unpinned = [rows[self.pinned :] for rows in self.rows[layer]]
            older = [rows[:-window] for rows in unpinned]
            positions = torch.tensor([[row[2] for row in rows] for rows in older])
            key = oracle.retention_keys(
                self.vase["policy"],
                torch.stack([torch.stack([row[0] for row in rows]) for rows in older]),
                torch.stack([torch.stack([row[1] for row in rows]) for rows in older]),
                torch.stack(self.queries[layer][-window:]).transpose(0, 1),
                positions,
                budget=budget,
                seed=self.vase["seed"],
                layer=layer,
                first_head=0,
                round=self.round,
                attention_scale=self.attention_scale,
            )
            count = len(unpinned[0]) - budget
            self._refuse_near_ties(key, count)
            victims = oracle.victims(key, positions, count)
            self.forgotten[-1].append(
                [[int(positions[head][c]) for c in gone] for head, gone in enumerate(victims)]
            )
            for head, gone in enumerate(victims):
                self._overwrite(unpinned[head], gone, budget, window)
                self.rows[layer][head][self.pinned :] = unpinned[head]

    def _refuse_near_ties(self, key: oracle.FloatArray, count: int) -> None:
        """Where the last victim and the first that stays differ by rounding, each CPU has its own
        answer. A token that comes twice has keys of one norm in the first layer, for instance."""
        ordered = numpy.sort(key, axis=1)
        last, first = ordered[:, count - 1], ordered[:, count]
        near = first - last < _CLEAR * abs(first)
        if self.kv_dtype != torch.float32:
            near &= first != last  # rounded to the same number on every CPU
        if near.any():
            raise NearTie(f"round {self.round} of {self.vase}")

    @staticmethod
    def _overwrite(rows: list[Row], gone: list[int], budget: int, window: int) -> None:
        """The i-th victim's column receives the i-th row from beyond the budget."""
        candidates = len(rows) - window
        moved = [rows[c] for c in range(budget, candidates) if c not in gone] + rows[candidates:]
        for column, row in zip([c for c in gone if c < budget], moved, strict=True):
            rows[column] = row
        del rows[budget:]


class NearTie(Exception):
    """Rounding would decide who stays."""


def clear_answer(
    make: Callable[[], IndependentDecoder], length: int, new: int
) -> tuple[list[int], list[int], IndependentDecoder]:
    """A prompt of `length` tokens without near ties, its answer, and the decoder that gave it."""
    for start in range(length, length + 50):
        prompt = [2 + (17 * i + start) % 250 for i in range(length)]
        decoder = make()
        with contextlib.suppress(NearTie):
            return prompt, decoder.generate(prompt, new), decoder
    raise AssertionError(f"50 prompts of {length} tokens, each with a near tie")


def answer_length(prompt_mode: str, length: int) -> int:
    """Tokens of an answer to such a prompt with four rounds or more, if the budget is 24."""
    return 45 if (prompt_mode, length) == ("evict", 45) else 70


def weights_of(stepped: Any) -> dict[str, torch.Tensor]:
    """What the harness' model runs with."""
    runner = stepped.scheduler.tp_worker.model_runner
    return {name: p.detach().float() for name, p in runner.model.named_parameters()}


def weights_in(checkpoint: Any) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under the names SGLang gives them (fused projections)."""
    weights = load_file(checkpoint)
    for layer in range(LAYERS):
        for fused, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            name = f"model.layers.{layer}."
            weights[f"{name}{fused}.weight"] = torch.cat(
                [weights.pop(f"{name}{part}.weight") for part in parts]
            )
    return weights
