"""What a scorer is given: the tokens that a round may evict."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from vase_kernels.reference.philox import Words, philox4x32, seed_key


class Layers(Protocol):
    """Rows by layer: a tuple of tensors, or something that gathers a layer when asked for it."""

    def __getitem__(self, layer: int, /) -> Tensor: ...


class Candidates(NamedTuple):
    """The tokens a round may evict, of N requests, L layers, H KV heads, C candidates each.

    keys, values : Layers or None
        Tensor [N, H, C, D] for each of the L layers, any float dtype; None where the policy does
        not read them. A tensor x [N, L, H, C, D] is given as `x.unbind(1)`.
    queries : Tensor [N, L, Hq, W, D] or None
        Post-RoPE queries of the window; query head h reads KV head h // (Hq // H).
    positions : int64 Tensor [N, L, H, C]
        Token positions, distinct within a head, below 2**31.
    seed, round : int64 Tensor [N]
        Eviction seed (63 bits) and round number, counted from 1.
    layers : int64 Tensor [L]
    heads : int64 Tensor [H]
        Global indices, so that a draw does not depend on which rank owns the head.
    attention_scale : float or None
        What the model multiplies q.k by; None for 1/sqrt(D).
    """

    keys: Layers | None
    values: Layers | None
    queries: Tensor | None
    positions: Tensor
    seed: Tensor
    round: Tensor
    layers: Tensor
    heads: Tensor
    attention_scale: float | None = None

    def words(self, last: Tensor, round: Tensor | None = None) -> Words:
        """Philox words at counter (layer, head, round, `last`), `last` [..., K] -> [N, L, H, K].

        `round` [N] replaces the candidates' own; rounds count from 1, so no round draws from 0.
        """
        round = self.round if round is None else round
        k0, k1 = seed_key(self.seed[:, None, None, None])
        counter = (
            self.layers[None, :, None, None],
            self.heads[None, None, :, None],
            round[:, None, None, None],
            last,
        )
        return philox4x32((k0, k1), counter)
