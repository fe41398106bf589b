"""What must be equal for an answer to be replayable bit for bit."""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vase_sgl import __version__
from vase_sgl.engine import platform_cpu
from vase_sgl.engine.pool import BudgetPool

_CHUNK = 1 << 20


def fingerprint(scheduler: Any) -> dict[str, str]:
    """Everything beside the request that decides its tokens. Keys and values are strings."""
    args = scheduler.server_args
    runner = scheduler.tp_worker.model_runner
    return {
        "model": Path(args.model_path).name,
        "weights_digest": _weights_digest(args.model_path, str(args.load_format)),
        "vase_sgl": __version__,
        "sglang": version("sglang"),
        "kernels": f"{BudgetPool.of(scheduler.req_to_token_pool).kernels}-5",
        "torch": torch.__version__,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(runner.token_to_kv_pool.dtype).removeprefix("torch."),
        "attention_backend": type(runner.attn_backend).__name__,
        "deterministic": str(_is_deterministic(args)).lower(),
        "device": _device_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "tp_size": str(args.tp_size),
        **_prefill_layout(scheduler),
    }


def _prefill_layout(scheduler: Any) -> dict[str, str]:
    """How prompts are cut and stored, which decides rounding in accelerators' attention kernels.

    Not on our CPU platform, where tests show the same bits for every layout.
    """
    if platform_cpu.is_active():
        return {}
    return {
        "chunked_prefill_size": str(scheduler.chunked_prefill_size),
        "page_size": str(scheduler.tree_cache.page_size),
        "prefix_cache": "off" if scheduler.tree_cache.disable else "on",
    }


def _is_deterministic(args: Any) -> bool:
    # Our CPU platform always brings batch-invariant layers and seeded sampling.
    return bool(args.enable_deterministic_inference) or platform_cpu.is_active()


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@functools.cache
def _weights_digest(model_path: str, load_format: str) -> str:
    """SHA-256 over the names and bytes of configuration and weights, 32 hex digits of it."""
    if load_format == "dummy":
        return "dummy"
    digest = hashlib.sha256()
    for path in sorted(Path(model_path).glob("*")):
        if path.suffix in (".safetensors", ".bin", ".gguf") or path.name == "config.json":
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()[:32]
