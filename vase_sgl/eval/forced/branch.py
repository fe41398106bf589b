"""KV rows of one sequence, evicted from as the engine evicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from vase_kernels.reference import chain, evict_reference, format_digest

from vase_sgl.eviction import EvictionParams


@dataclasses.dataclass(frozen=True)
class KVShape:
    """Layers, query heads, KV heads and head_dim of a model, and the dtype of its KV rows."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def ring_slots(self, window: int) -> float:
        """How many slots of K and V are as large as a window of queries of the same dtype."""
        return window * self.query_heads / (2 * self.kv_heads)


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """What a sequence has behind it; field by field what the engine's `meta_info["vase"]` says.

    The newest token has no KV entry yet, as there.
    """

    rounds: int
    evicted_tokens: int
    physical_length: int
    logical_length: int
    digest: str
    round_digests: tuple[str, ...]


class Branch:
    """The KV rows of one sequence in columns [0, length), and what its next round needs.

    keys, values: [layers, columns, kv_heads, head_dim], post-RoPE keys.
    token_positions: int32 [layers, columns, kv_heads], as `evict_reference` keeps them.
    attention_scale: what the model multiplies q.k by, in all layers; None before the first tokens.
    queries: [layers, query_heads, tokens, head_dim], the newest post-RoPE queries, at least those
        of the window.
    params: None, or parameters of a policy that never evicts, keeps every token.
    """

    def __init__(
        self, shape: KVShape, params: EvictionParams | None, prompt_tokens: int, window: int
    ) -> None:
        self.shape = shape
        self.params = params if params is not None and params.policy.evicts else None
        self.prompt_tokens = prompt_tokens
        self.window = window
        self.keys = self._rows(0)
        self.values = self._rows(0)
        self.token_positions = torch.empty(shape.layers, 0, shape.kv_heads, dtype=torch.int32)
        self.queries = torch.empty(
            shape.layers, shape.query_heads, 0, shape.head_dim, dtype=shape.dtype
        )
        self.attention_scale: float | None = None
        self.length = 0
        self.logical_length = 0
        self.evicted_tokens = 0
        self._digest = torch.zeros(1, dtype=torch.int64)
        self.round_digests: list[str] = []
        self._new_queries: list[Tensor] = []

    def fork(self, params: EvictionParams) -> Branch:
        """A copy that goes on under `params`. Only what has never evicted can be forked."""
        if self.round_digests:
            raise ValueError("a sequence that has evicted tokens cannot be forked")
        branch = Branch(self.shape, params, self.prompt_tokens, params.window)
        branch.reserve(params.first_round_length(self.prompt_tokens))
        for name in ("keys", "values"):
            getattr(branch, name)[:, : self.length] = getattr(self, name)[:, : self.length]
        branch.queries = self.queries[:, :, -params.window :].clone()
        branch.attention_scale = self.attention_scale
        branch.length = branch.logical_length = self.length
        return branch

    @property
    def next_round_length(self) -> int | None:
        """Physical length at which the next round is due; None if none ever is."""
        if self.params is None:
            return None
        if self.round_digests:
            return self._kept_length(self.params) + self.params.window
        return self.params.first_round_length(self.prompt_tokens)

    def reserve(self, columns: int) -> None:
        """Make room for `columns` columns."""
        held = self.keys.shape[1]
        if columns <= held:
            return
        columns = max(columns, 2 * held)
        for name in ("keys", "values"):
            larger = self._rows(columns)
            larger[:, : self.length] = getattr(self, name)[:, : self.length]
            setattr(self, name, larger)
        positions = self.token_positions.new_empty(self.shape.layers, columns, self.shape.kv_heads)
        positions[:, : self.length] = self.token_positions[:, : self.length]
        self.token_positions = positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append T tokens to a layer and attend: causally to them, fully to what is cached.

        q: [query_heads, T, head_dim]; k, v: [kv_heads, T, head_dim]; all post-RoPE.
        Returns [T, query_heads, head_dim]. Columns must be reserved; `commit` makes them count.
        Raises ValueError where layers differ in `scale`, which policies score by.
        """
        if self.attention_scale not in (None, scale):
            raise ValueError(
                f"layer {layer} scales attention by {scale:g}, others by {self.attention_scale:g}"
            )
        self.attention_scale = scale
        heads, tokens, _ = k.shape
        end = self.length + tokens
        self.keys[layer, self.length : end] = k.transpose(0, 1)
        self.values[layer, self.length : end] = v.transpose(0, 1)
        self._new_queries.append(q[:, -self.window :])
        group = q.shape[0] // heads
        mask = _causal_mask(tokens, end, q.dtype).repeat(group, 1)
        mixed = F.scaled_dot_product_attention(
            q.reshape(1, heads, group * tokens, -1),
            self.keys[layer, :end].transpose(0, 1)[None],
            self.values[layer, :end].transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
        )
        return mixed.reshape(q.shape).transpose(0, 1)

    def commit(self, tokens: int) -> None:
        """The `tokens` that every layer has just appended are cached from here on."""
        if len(self._new_queries) != self.shape.layers:
            raise RuntimeError(
                f"{len(self._new_queries)} of {self.shape.layers} layers passed their queries on; "
                "the model does not use transformers' attention interface in every layer"
            )
        newest = torch.stack(self._new_queries)
        self._new_queries = []
        self.queries = torch.cat((self.queries, newest), dim=2)[:, :, -self.window :]
        self.length += tokens
        self.logical_length += tokens

    def evict(self) -> None:
        """Carry out the round that is due, by the code that the engine runs on a CPU."""
        params = self.params
        if params is None or self.length != self.next_round_length:
            raise RuntimeError(f"no round is due at {self.length} cached tokens")
        sums = evict_reference(
            params.policy.name,
            self.keys.unbind(0),
            self.values.unbind(0),
            self.token_positions,
            torch.arange(self.length)[None],
            self.queries[None] if params.policy.needs_queries else None,
            budget=params.budget,
            window=params.window,
            pinned=params.pinned(self.prompt_tokens),
            seeds=torch.tensor([params.seed]),
            rounds=torch.tensor([len(self.round_digests) + 1]),
            logical_lengths=torch.tensor([self.logical_length]),
            attention_scale=self.attention_scale,
            **params.policy.fields(),
        )
        self._digest = chain(self._digest, sums)
        self.round_digests.append(format_digest(int(self._digest)))
        kept = self._kept_length(params)
        self.evicted_tokens += self.length - kept
        self.length = kept

    def kept_positions(self) -> Tensor:
        """Token positions of the cached rows, int64 [layers, kv_heads, length], ascending."""
        unmoved = torch.arange(self.length) + (self.logical_length - self.length)
        positions = unmoved.repeat(self.shape.layers, self.shape.kv_heads, 1)
        if self.params is not None and self.round_digests:
            pinned = self.params.pinned(self.prompt_tokens)
            kept = slice(pinned, self._kept_length(self.params))
            positions[..., :pinned] = torch.arange(pinned)
            positions[..., kept] = self.token_positions[:, kept].transpose(1, 2).long()
        return positions.sort(-1).values

    def report(self) -> CacheReport:
        return CacheReport(
            rounds=len(self.round_digests),
            evicted_tokens=self.evicted_tokens,
            physical_length=self.length,
            logical_length=self.logical_length + 1,
            digest=self.round_digests[-1] if self.round_digests else format_digest(0),
            round_digests=tuple(self.round_digests),
        )

    def _kept_length(self, params: EvictionParams) -> int:
        return params.pinned(self.prompt_tokens) + params.budget

    def _rows(self, columns: int) -> Tensor:
        shape = self.shape
        return torch.empty(shape.layers, columns, shape.kv_heads, shape.head_dim, dtype=shape.dtype)


def _causal_mask(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """0 where the i-th of the last `tokens` columns may look, -inf elsewhere: [tokens, columns]."""
    mask = torch.full((tokens, columns), -torch.inf, dtype=dtype)
    return mask.triu(columns - tokens + 1)


def attend_all(
    branches: Sequence[Branch], layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """`Branch.attend` for one row of a batch each; all [rows, heads, T, head_dim]."""
    rows = [
        branch.attend(layer, q[row], k[row], v[row], scale) for row, branch in enumerate(branches)
    ]
    return torch.stack(rows)
