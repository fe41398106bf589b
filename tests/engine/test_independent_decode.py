"""Engine tokens against a decoder that shares nothing with it: own attention, RoPE, cache, oracle.

It keeps an explicit list of (key, value, position) per layer and head, evicts with the float64
oracle, and rotates by logical position. Equal greedy tokens over many rounds mean that slots,
positions, queries, victims and overwrites are all right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tiny_model import CONFIG
from tests.kernels import oracle
from vase_sgl.eviction.policies import POLICIES

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
Row = tuple[torch.Tensor, torch.Tensor, int]


class IndependentDecoder:
    def __init__(
        self, stepped: SteppedScheduler, vase: dict[str, Any], rope_shift: int = 0
    ) -> None:
        runner = stepped.scheduler.tp_worker.model_runner
        self.weights = {name: p.detach().float() for name, p in runner.model.named_parameters()}
        self.vase = vase
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
                self.rows[layer][head].append((k[head], v[head], self.position))
            for head in range(HEADS):
                rows = self.rows[layer][head * KV_HEADS // HEADS]
                keys = torch.stack([row[0] for row in rows])
                values = torch.stack([row[1] for row in rows])
                mixed.append((keys @ q[head] / DIM**0.5).softmax(0) @ values)
            x = x + w[name + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            h = self._norm(x, name + "post_attention_layernorm.weight")
            gate, up = (w[name + "mlp.gate_up_proj.weight"] @ h).chunk(2)
            x = x + w[name + "mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        self.position += 1
        return w["model.embed_tokens.weight"] @ self._norm(x, "model.norm.weight")

    def _evict(self) -> None:
        self.round += 1
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
            )
            count = len(unpinned[0]) - budget
            for head, gone in enumerate(oracle.victims(key, positions, count)):
                self._overwrite(unpinned[head], gone, budget, window)
                self.rows[layer][head][self.pinned :] = unpinned[head]

    @staticmethod
    def _overwrite(rows: list[Row], gone: list[int], budget: int, window: int) -> None:
        """The i-th victim's column receives the i-th row from beyond the budget."""
        candidates = len(rows) - window
        moved = [rows[c] for c in range(budget, candidates) if c not in gone] + rows[candidates:]
        for column, row in zip([c for c in gone if c < budget], moved, strict=True):
            rows[column] = row
        del rows[budget:]


def _engine_tokens(
    stepped: SteppedScheduler, vase: dict[str, Any], prompt: list[int], new: int
) -> list[int]:
    stepped.answers.clear()
    stepped.submit("compared", prompt, max_new_tokens=new, vase=vase)
    stepped.run()
    answer = stepped.answers["compared"]
    assert answer.statistics is not None and answer.statistics["rounds"] >= 4
    return answer.tokens


@torch.inference_mode()
@pytest.mark.parametrize(
    ("prompt_mode", "length", "production"),
    [("evict", 12, False), ("evict", 45, True), ("keep", 45, True)],
)
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.evicts])
def test_tokens_equal_the_independent_decoder(
    stepped: SteppedScheduler, policy: str, prompt_mode: str, length: int, production: bool
) -> None:
    """`production`: overlap loop and prefix cache on, and the prompt already in the tree."""
    assert CONFIG["num_hidden_layers"] == LAYERS
    vase = {"budget": 24, "window": 8, "policy": policy, "prompt": prompt_mode, "seed": 2**40 + 7}
    prompt = [2 + (17 * i + length) % 250 for i in range(length)]
    expected = IndependentDecoder(stepped, vase).generate(prompt, 70)
    stepped.configure(overlap=production, prefix_cache=production)
    if production:
        stepped.submit("before", prompt, max_new_tokens=2)
        stepped.run()
    found = _engine_tokens(stepped, vase, prompt, 70)
    assert (stepped.answers["compared"].cached_tokens > 0) == production
    stepped.configure()
    assert found == expected


@torch.inference_mode()
@pytest.mark.parametrize(
    ("change", "shift"), [({"seed": 8}, 0), ({"policy": "streaming"}, 0), ({}, 1)]
)
def test_a_wrong_decoder_is_told_apart(
    stepped: SteppedScheduler, change: dict[str, Any], shift: int
) -> None:
    """The comparison above can fail: other seed, other policy, positions off by one."""
    vase = {"budget": 24, "window": 8, "policy": "random", "seed": 7}
    prompt = [2 + (17 * i) % 250 for i in range(20)]
    wrong = IndependentDecoder(stepped, vase | change, shift).generate(prompt, 70)
    assert _engine_tokens(stepped, vase, prompt, 70) != wrong
