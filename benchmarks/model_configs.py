"""Models by shape: a `config.json` is all that SGLang needs with `--load-format dummy`.

Dimensions are those of the published Qwen3 configurations. `tiny` is for trials on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a dense Qwen3: grouped-query attention, SwiGLU, RMSNorm on queries and keys."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    head_dim: int = 128
    vocabulary: int = 151_936
    context: int = 40_960

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers, bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads: all weights but the embedding table, bfloat16."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate
        return 2 * (self.layers * block + self.hidden * self.vocabulary)

    def floor_seconds(self, batch: int, cached: float, bytes_per_second: float) -> float:
        """Time to read the weights once and every request's `cached` K and V: a decode step."""
        moved = self.weight_bytes + batch * cached * self.kv_bytes_per_token
        return moved / bytes_per_second

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "max_window_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1_000_000,
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        }


SHAPES = {
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": Shape(4096, 12288, 36, 32, 8, tied=False),
    "qwen3-14b": Shape(5120, 17408, 40, 40, 8, tied=False),
    "tiny": Shape(64, 96, 2, 4, 2, tied=True, head_dim=16, vocabulary=256),
}


def write_config(name: str, folder: Path) -> Path:
    """Write `folder/NAME/config.json`; returns that folder. Raises ValueError for unknown names."""
    if name not in SHAPES:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(SHAPES)}")
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(SHAPES[name].config(), indent=1) + "\n")
    return target


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape of any model whose `config.json` has these keys, for byte counts."""
    heads = config["num_attention_heads"]
    return Shape(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
    )
