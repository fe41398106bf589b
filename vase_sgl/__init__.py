"""vase_sgl: fixed KV-cache budgets per request on SGLang, with replayable answers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vase-sgl")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

__all__ = ["__version__"]
