"""A tiny Llama with random weights: enough for slots and lengths, not for meaning."""

from __future__ import annotations

import json
from pathlib import Path

VOCAB = 256
CONTEXT = 2048

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def write_tiny_model(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
