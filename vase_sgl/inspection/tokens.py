"""What each token adds to the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from vase_sgl.inspection.file import InspectionError


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a model's folder, or of a tokenizer.json. Raises `InspectionError`."""
    path = model / "tokenizer.json" if model.is_dir() else model
    if not path.exists():
        raise InspectionError(
            f"there is no tokenizer at {path}; name the model's folder, which holds a "
            "tokenizer.json, or that file"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise InspectionError(f"{path} is not a tokenizer.json: {error}") from error


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str | None]:
    """One text for each token; joined they are the whole text, special tokens included.

    None: the tokenizer has no such token. Models have more ids than their tokenizers, for padding.
    Of a character that several tokens make up the last one has all, the others have "". Of bytes
    that make up none the next token has the replacement characters.
    """
    stream = DecodeStream(skip_special_tokens=False)
    texts: list[str | None] = []
    waiting: list[int] = []  # tokens since the last one that had text
    for token in token_ids:
        if token < 0 or tokenizer.id_to_token(token) is None:
            texts.append(None)
            continue
        waiting.append(token)
        try:
            text = stream.step(tokenizer, token)
        except Exception:  # the library raises nothing more specific
            # Byte fallback decodes a run of bytes as a whole: bytes that are no character take
            # with them those before that were text, and the stream refuses text that changes.
            stream = DecodeStream(skip_special_tokens=False)
            text = "".join(stream.step(tokenizer, each) or "" for each in waiting)
        texts.append(text or "")
        if text:
            waiting.clear()
    return texts
