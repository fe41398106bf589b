"""Where the model's thoughts begin and end in its text, for a gateway that tells them apart."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from sglang.srt.runtime_context import get_serving

logger = logging.getLogger(__name__)

#: What a detector finds thoughts with. One that overrides any of it goes by more than two markers.
_PARSING = (
    "detect_and_parse",
    "_detect_and_parse_impl",
    "parse_streaming_increment",
    "_parse_streaming_increment_impl",
    "finish",
)
#: Blank tokens that a chat template may write behind the marker that opens a thought.
_BLANK_TOKENS = 8


@functools.cache
def markers(parser: str, tokenizer: Any) -> tuple[str, str] | None:
    """The texts before and after a thought, of SGLang's `--reasoning-parser`.

    None: they do not tell it. Some parsers go by more than these; for some a request chooses them;
    and some tokenizers leave them out of the text, as special tokens.
    """
    # Where the plugin is loaded, SGLang may not be yet.
    from sglang.srt.parser.reasoning_parser import BaseReasoningFormatDetector, ReasoningParser

    kind = ReasoningParser.DetectorMap[parser.lower()]
    if any(getattr(kind, n) is not getattr(BaseReasoningFormatDetector, n) for n in _PARSING):
        return None
    detector = ReasoningParser(parser, tokenizer=tokenizer).detector
    if hasattr(detector, "request_selectable_think_end_tokens"):
        return None
    found = (
        detector.think_start_token + detector.think_start_self_label,
        detector.think_end_token,
    )
    return found if all(_is_text(marker, tokenizer) for marker in found) else None


def _is_text(marker: str, tokenizer: Any) -> bool:
    """Whether an answer's text shows it."""
    token_ids = tokenizer.encode(marker, add_special_tokens=False)
    return marker in tokenizer.decode(token_ids, skip_special_tokens=True)


def describe(parser: str | None, tokenizer: Any, prompt: Sequence[int]) -> dict[str, Any] | None:
    """The markers, whether the prompt ends in an opened thought, and the end's token ids.

    None: as for `markers`.
    """
    found = markers(parser, tokenizer) if parser else None
    if found is None:
        return None
    start, end = found
    # A token of the marker has a byte at least.
    last = prompt[-(len(start.encode()) + _BLANK_TOKENS) :]
    text = tokenizer.decode(last, skip_special_tokens=False)
    return {
        "start": start,
        "end": end,
        "begun": text.rstrip().endswith(start.rstrip()),
        "end_ids": tokenizer.encode(end, add_special_tokens=False),
    }


def warn_of_whole_text(scheduler: Any) -> None:
    """At start: a gateway cannot do what the worker's own `/v1/chat/completions` does."""
    parser, tokenizer = get_serving().reasoning_parser, scheduler.tokenizer
    if parser and tokenizer and markers(parser, tokenizer) is None:
        logger.warning(
            "--reasoning-parser %s: a gateway cannot tell thoughts from answers by two markers in "
            "their text, and gives both as content",
            parser,
        )
