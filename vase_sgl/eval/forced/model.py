"""A transformers causal LM whose attention reads KV rows that are evicted as the engine evicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vase_sgl.engine.linear_cpu import Linear, has_fast_products, in_float32, tiled
from vase_sgl.eval.forced.branch import Branch, KVShape, attend_all
from vase_sgl.eval.forced.session import Session
from vase_sgl.eviction import EvictionParams

_ATTENTION = "vase_sgl_forced"
#: Rows times vocabulary of one block of logits, which are float32.
_LOGITS_PER_BLOCK = 1 << 24
#: Most rows of one matrix product. Equal tokens must give equal rows wherever they stand: layer 0's
#: values depend on the token alone, and ties between them are broken by position, not by rounding.
_TILE = 128


class ForcedModel:
    """Runs token sequences through a causal LM under a static KV budget, in this process.

    Works with models of transformers that send post-RoPE queries, keys and values of every layer
    through its attention interface and cache plain multi-head or grouped-query attention (Llama,
    Qwen2, Qwen3, Granite). Their forward code is used as it is.

    Determinism: on one machine and with one number of threads, the same prompt, tokens and arms
    give the same results. Linear layers are batch-invariant, as in the engine on a CPU. Attention
    is computed for several tokens at once, so its rounding is not that of single decode steps, and
    depends on where the rounds of the other arms cut the text.
    """

    def __init__(self, model_path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Load weights and tokenizer from a local folder.

        Raises ValueError for a model whose cache is not plain full attention.
        """
        _declare_torchvision()
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        AttentionInterface.register(_ATTENTION, _attention)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, attn_implementation=_ATTENTION, local_files_only=True
        ).eval()
        _make_batch_invariant(self._model)
        config = self._model.config
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise ValueError(f"{model_path} uses sliding-window attention; a budget needs full")
        query_heads = config.num_attention_heads
        self.shape = KVShape(
            layers=config.num_hidden_layers,
            query_heads=query_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
            dtype=dtype,
        )
        self.max_tokens: int = config.max_position_embeddings

    def start(self, prompt: Sequence[int], arms: Sequence[EvictionParams | None]) -> Session:
        """A session over `prompt` with one sequence per arm; see `Session`.

        Raises ValueError for an empty prompt or no arms.
        """
        return Session(self, prompt, arms)

    @torch.inference_mode()
    def forward(self, branches: Sequence[Branch], tokens: Tensor, position: int) -> Tensor:
        """Feed tokens [rows, T] at positions `position` on; one branch a row.

        Returns hidden states [rows, T, hidden]. Raises ValueError past the model's context.
        """
        count = tokens.shape[1]
        if position + count > self.max_tokens:
            raise ValueError(
                f"{position + count} tokens do not fit the model's context of {self.max_tokens}"
            )
        for branch in branches:
            branch.reserve(branch.length + count)
        hidden: Tensor = self._model.model(
            input_ids=tokens,
            position_ids=torch.arange(position, position + count)[None],
            use_cache=False,
            vase_branches=branches,
        ).last_hidden_state
        for branch in branches:
            branch.commit(count)
        return hidden

    @torch.inference_mode()
    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p(targets) in nats, float32 [rows, T], of hidden states [rows, T, hidden]."""
        rows, goals = hidden.flatten(0, 1), targets.flatten()
        step = max(1, _LOGITS_PER_BLOCK // self._model.config.vocab_size)
        losses = [
            torch.nn.functional.cross_entropy(
                self.logits(rows[start : start + step]),
                goals[start : start + step],
                reduction="none",
            )
            for start in range(0, len(rows), step)
        ]
        return torch.cat(losses).view(targets.shape)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., vocabulary]."""
        logits: Tensor = self._model.lm_head(hidden)
        return logits.float()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    vase_branches: Sequence[Branch],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface: [rows, heads, T, head_dim] in."""
    if attention_mask is not None:
        raise ValueError("the harness brings its own causal mask")
    return attend_all(vase_branches, module.layer_idx, query, key, value, scaling), None


class _TiledLinear(torch.nn.Module):
    """A linear layer whose rows do not depend on how many there are."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        linear: Linear = self.linear
        if not has_fast_products(x.dtype):
            linear = in_float32(self.linear.weight, self.linear.bias)
        rows = tiled(linear, x.flatten(0, -2), self.linear.weight, _TILE)
        return rows.view(*x.shape[:-1], -1)


def _make_batch_invariant(model: torch.nn.Module) -> None:
    """Replace every linear layer in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, _TiledLinear(child))


def _declare_torchvision() -> None:
    """transformers imports torchvision, whose CUDA build fails beside a CPU build of torch."""
    from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

    declare_torchvision_operators()
