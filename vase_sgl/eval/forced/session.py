"""One prompt, several arms: the same text goes through each arm's own KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vase_sgl.eval.forced.branch import Branch, CacheReport
from vase_sgl.eviction import EvictionParams

if TYPE_CHECKING:
    from vase_sgl.eval.forced.model import ForcedModel


class Session:
    """Sequences that share a prompt, one per arm, advanced together.

    The prompt is cached whole. Every later token counts as a decode step: before a token is fed
    to an arm that holds `next_round_length` entries, the arm's round is carried out, as in the
    engine. Between two rounds attention is plain causal attention over the kept rows and the
    newer tokens, so that forced tokens go through in one forward up to the next round of any arm.
    Arms share their cache until their first round, equal ones for good.

    The newest token of each arm has no KV entry yet (the engine's `logical_length` counts it).
    """

    @torch.inference_mode()
    def __init__(
        self, model: ForcedModel, prompt: Sequence[int], arms: Sequence[EvictionParams | None]
    ) -> None:
        if not prompt:
            raise ValueError("the prompt holds no token")
        if not arms:
            raise ValueError("name at least one arm; None is the full KV cache")
        self._model = model
        self._arms = list(arms)
        window = max((arm.window for arm in arms if arm is not None), default=1)
        trunk = Branch(model.shape, None, len(prompt), window)
        self._trunk = trunk
        self._branches = [trunk for _ in arms]
        self._forked: dict[EvictionParams, Branch] = {}
        self._pending = torch.tensor(prompt[-1:]).repeat(len(arms), 1)
        if len(prompt) > 1:
            model.forward([trunk], torch.tensor([prompt[:-1]]), 0)

    @torch.inference_mode()
    def force(self, tokens: Sequence[int]) -> Tensor:
        """Append the same tokens to every arm. Returns -log p of each, float32 [arms, tokens]."""
        losses = [
            self._model.nll(hidden, targets)[rows] for hidden, targets, rows in self._feed(tokens)
        ]
        return torch.cat(losses, dim=1) if losses else torch.empty(len(self._arms), 0)

    @torch.inference_mode()
    def answer(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `force`, and bool [arms, tokens]: whether a token is the most likely one.

        All of them true means that `greedy` would have given `tokens`.
        """
        losses, choices = [], []
        for hidden, targets, rows in self._feed(tokens):
            losses.append(self._model.nll(hidden, targets)[rows])
            choices.append((self._model.logits(hidden).argmax(-1) == targets)[rows])
        if not losses:
            raise ValueError("an answer needs at least one token")
        return torch.cat(losses, dim=1), torch.cat(choices, dim=1)

    @torch.inference_mode()
    def greedy(self, count: int) -> Tensor:
        """Append each arm's own most likely tokens. Returns them, int64 [arms, count]."""
        chosen = []
        for _ in range(count):
            hidden, rows = self._advance(self._pending)
            self._pending = self._model.logits(hidden[:, -1]).argmax(-1)[rows][:, None]
            chosen.append(self._pending)
        return torch.cat(chosen, dim=1) if chosen else torch.empty(len(self._arms), 0).long()

    def report(self, arm: int) -> CacheReport:
        """Rounds, lengths and digests of one arm."""
        return self._branches[arm].report()

    def kept_positions(self, arm: int) -> Tensor:
        """Token positions that one arm holds, int64 [layers, kv_heads, physical length]."""
        return self._branches[arm].kept_positions()

    def _feed(self, tokens: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Append the same tokens to every arm, step by step.

        Yields hidden states [rows, T, hidden], the tokens they predict [rows, T], each arm's row.
        """
        targets = torch.tensor(tokens, dtype=torch.int64).repeat(len(self._arms), 1)
        inputs = torch.cat((self._pending, targets), dim=1)[:, :-1]
        self._pending = torch.cat((self._pending, targets), dim=1)[:, -1:]
        while inputs.shape[1]:
            hidden, rows = self._advance(inputs)
            count, step, _ = hidden.shape
            yield hidden, targets[:count, :step], rows
            inputs, targets = inputs[:, step:], targets[:, step:]

    def _advance(self, inputs: Tensor) -> tuple[Tensor, list[int]]:
        """Carry out due rounds, then feed as many of inputs [arms, T] as fit before the next.

        Returns hidden states [rows, fed, hidden] and each arm's row.
        """
        self._carry_out_rounds()
        branches = list(dict.fromkeys(self._branches))
        rows = [branches.index(branch) for branch in self._branches]
        until_due = [
            due - branch.length
            for arm, branch in zip(self._arms, self._branches, strict=True)
            if (due := self._next_round(arm, branch)) is not None
        ]
        step = min([inputs.shape[1], *until_due])
        first = torch.tensor([rows.index(row) for row in range(len(branches))])
        tokens = inputs[first, :step]
        return self._model.forward(branches, tokens, branches[0].logical_length), rows

    def _carry_out_rounds(self) -> None:
        for index, arm in enumerate(self._arms):
            branch = self._branches[index]
            if arm is None or branch.length != self._next_round(arm, branch):
                continue
            if branch is self._trunk:
                if arm in self._forked:  # the same arm twice, already evicted from
                    self._branches[index] = self._forked[arm]
                    continue
                branch = self._branches[index] = self._forked[arm] = branch.fork(arm)
            branch.evict()

    def _next_round(self, arm: EvictionParams | None, branch: Branch) -> int | None:
        if arm is None or not arm.policy.evicts:
            return None
        if branch is self._trunk:
            return arm.first_round_length(branch.prompt_tokens)
        return branch.next_round_length
