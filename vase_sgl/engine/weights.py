"""Which bytes a model is: the digest that ties an answer to its weights."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_CONFIG = "config.json"
#: How weights are multiplied, of models that ModelOpt quantised.
_QUANTIZATION = "hf_quant_config.json"
#: What decides where an answer ends, and its text: end tokens, stop strings, decoding.
_TOKENIZER = ("generation_config.json", "added_tokens.json", "special_tokens_map.json")
_TOKENIZER_PATTERNS = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")


class WeightsNotFound(Exception):
    """The weights are not on this machine's disk, or not where they are looked for."""


@functools.cache
def weights_digest(
    model_path: str, *, revision: str | None = None, download_dir: str | None = None
) -> str:
    """SHA-256 over the names and bytes of the weights and their configuration, 32 hex digits.

    model_path, revision, download_dir: as SGLang takes them: a folder, one file, or a Hugging Face
    name whose files lie in `download_dir` or in the cache. A folder and a snapshot of the same
    files have one digest. Read once per process.

    Raises:
        WeightsNotFound: there are no such files here.
    """
    return _digest(_files(model_path, revision, download_dir))


@functools.cache
def tokenizer_digest(path: str, *, revision: str | None = None) -> str:
    """The same over the files that decide where an answer ends and what its text is.

    path, revision: of the tokenizer, as SGLang takes them. Of a file with weights, such as GGUF,
    which holds its tokenizer, and of a folder without any such files: the digest of nothing.
    """
    here = Path(path)
    folders = [here] if here.exists() else _snapshots(path, revision, None)
    found: dict[str, Path] = {}
    for folder in folders if not here.is_file() else []:
        for pattern in (*_TOKENIZER, *_TOKENIZER_PATTERNS):
            for file in folder.glob(pattern):
                if file.is_file():
                    found.setdefault(file.name, file)
    return _digest([found[name] for name in sorted(found)])


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:32]


def _files(model_path: str, revision: str | None, download_dir: str | None) -> list[Path]:
    """Configurations, where there are some, and at least one file of weights, by name."""
    here = Path(model_path)
    if here.is_file():
        return [here]
    folders = [here] if here.is_dir() else _snapshots(model_path, revision, download_dir)
    for folder in folders:
        weights = [path for path in folder.iterdir() if path.suffix in _WEIGHTS]
        if weights:
            # SGLang reads a hub model's configuration from the cache, whatever `download_dir` says.
            for name in (_CONFIG, _QUANTIZATION):
                configs = [path for path in (f / name for f in (folder, *folders)) if path.exists()]
                weights += configs[:1]
            return sorted(weights, key=lambda path: path.name)
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
