"""Text whose last character has not all of its tokens yet."""

from __future__ import annotations

#: What tokenizers make of bytes that are no character, or none yet.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def complete(text: str) -> str:
    """REPLACE the detokenizer's `find_printable_text`: what of `text` more tokens leave as it is.

    With more of them it is the same or goes on. SGLang's ends after a Chinese character or else at
    the last blank, so it may end sooner, and the detokenizer, which goes by the length of the last
    one, sends again what is beyond.
    """
    return text.rstrip(INCOMPLETE)
