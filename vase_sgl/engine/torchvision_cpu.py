"""Workaround: PyPI's torchvision is a CUDA build and fails to import beside a CPU build of torch.

SGLang imports torchvision in every process. Its compiled operators cannot load without CUDA, and
then `@register_fake("torchvision::nms")` finds no such operator. Declaring the two schemas first
is enough; nothing in text generation calls them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the declarations live as long as this object


def declare_torchvision_operators() -> bool:
    """Declare torchvision's operator schemas if its own binary cannot. True if it was needed.

    Must run before the first `import torchvision`, `transformers` or `sglang` of the process.
    A matching pair (both CUDA or both CPU builds) is left alone.
    """
    global _library
    if _library is not None:
        return True
    if torch.version.cuda is not None or not _torchvision_is_cuda_build():
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _library = library
    return True


def _torchvision_is_cuda_build() -> bool:
    # Read from the file: importing torchvision is what fails.
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(r"^__version__ = .*\+cu\d+", text, re.MULTILINE) is not None
