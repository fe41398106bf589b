"""The tiny Llama as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.engine.tiny_model import VOCAB, write_weights


def write_tiny_folder(folder: Path) -> Path:
    """Weights, configuration and a tokenizer of one word per id: w0 ... w255."""
    write_weights(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
