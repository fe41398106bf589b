"""A GGUF file as a folder of bfloat16 safetensors, for SGLang's GGUF path needs CUDA kernels."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf`, its tokenizer included, to bfloat16 in the folder `target`.

    The folder appears by one rename, so an interrupted conversion leaves nothing half-made. Prints
    progress to stderr.
    """

    def say(text: str) -> None:
        print(f"  model: {text}", file=sys.stderr, flush=True)

    # At once: a folder that cannot be made must not show after the conversion.
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        import torch

        from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

        declare_torchvision_operators()
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        say("reading and dequantising the GGUF weights")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
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
