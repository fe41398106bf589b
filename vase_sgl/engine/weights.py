"""Which bytes a model is: the digest that ties an answer to its weights."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_CONFIG = "config.json"


class WeightsNotFound(Exception):
    """The weights are not on this machine's disk, or not where they are looked for."""


@functools.cache
def weights_digest(
    model_path: str, *, revision: str | None = None, download_dir: str | None = None
) -> str:
    """SHA-256 over the names and bytes of config.json and the weights, 32 hex digits of it.

    model_path, revision, download_dir: as SGLang takes them: a folder, one file, or a Hugging Face
    name whose files lie in `download_dir` or in the cache. A folder and a snapshot of the same
    files have one digest. Read once per process.

    Raises:
        WeightsNotFound: there are no such files here.
    """
    digest = hashlib.sha256()
    for path in _files(model_path, revision, download_dir):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:32]


def _files(model_path: str, revision: str | None, download_dir: str | None) -> list[Path]:
    """config.json, where there is one, and at least one file of weights, by name."""
    here = Path(model_path)
    if here.is_file():
        return [here]
    folders = [here] if here.is_dir() else _snapshots(model_path, revision, download_dir)
    for folder in folders:
        weights = [path for path in folder.iterdir() if path.suffix in _WEIGHTS]
        if weights:
            # SGLang reads a hub model's configuration from the cache, whatever `download_dir` says.
            configs = [path for path in (f / _CONFIG for f in (folder, *folders)) if path.exists()]
            return sorted([*weights, *configs[:1]], key=lambda path: path.name)
    raise WeightsNotFound(
        f"no weights ({', '.join(_WEIGHTS)}) in {' or '.join(map(str, folders)) or model_path}"
    )


def _snapshots(name: str, revision: str | None, download_dir: str | None) -> list[Path]:
    """Folders of this revision on this disk, in the order in which SGLang looks into them."""
    found = []
    for cache in dict.fromkeys((download_dir, None)):
        try:
            found.append(
                snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True)
            )
        except (LocalEntryNotFoundError, HFValidationError):
            continue
    return [Path(folder) for folder in found]
