"""Stop strings that SGLang lets through: one beside another, one in unusual tokens, half of one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR

from vase_sgl.engine.detokenizing import INCOMPLETE, complete

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def end_at_the_first(original: Callable[..., bool], req: Req, new_accepted_len: int = 1) -> bool:
    """AROUND `Req._check_str_based_finish`: of several in one token the text ends before the first.

    Upstream ends it before the first of the request's list, and the others stay in the answer.
    """
    found = original(req, new_accepted_len)
    if found and isinstance(req.finished_reason, FINISH_MATCHED_STR):
        text = req.tail_str(new_accepted_len)
        places = {text.find(stop): stop for stop in req.sampling_params.stop_strs if stop in text}
        if places:
            req.finished_reason.matched = places[min(places)]
    return found


def search_far_enough(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `TokenizerManager._create_tokenized_object`: more tokens than a stop string encodes to.

    Upstream searches one more than those, but a model may write the string in smaller ones: as many
    as it has bytes. Twice as many, and a few for short ones, bound what every step decodes.
    """
    if isinstance(result, TokenizedGenerateReqInput) and result.sampling_params.stop_strs:
        params = result.sampling_params
        most = max(len(stop.encode()) for stop in params.stop_strs)
        params.stop_str_max_len = max(
            params.stop_str_max_len, min(most, 2 * params.stop_str_max_len + 4)
        )


def from_a_character_on(original: Callable[..., str], req: Req, new_accepted_len: int = 1) -> str:
    """AROUND `Req.tail_str`: the end of the answer, from where a character begins.

    Where tokens may be single bytes (`byte_fallback`), those behind a half character are no text
    either, and a stop string among them would be missed. A character has four bytes at most: one of
    four beginnings is its own. Of these the text with the fewest bytes that are none; the shortest,
    if several have as few.
    """
    text = original(req, new_accepted_len)
    if not text.startswith(INCOMPLETE) or not _falls_back_to_bytes(req.tokenizer):
        return text
    tokens = req._stop_match_tail_len(new_accepted_len)
    longer = range(tokens + 1, min(tokens + 3, len(req.output_ids)) + 1)
    texts = [text, *(req.tokenizer.decode(req.output_ids[-count:]) for count in longer)]
    return min(texts, key=lambda each: each.count(INCOMPLETE))


@functools.cache
def _falls_back_to_bytes(tokenizer: Any) -> bool:
    """As SentencePiece does. Others decode what is behind half a character."""
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return "<0x41>" in vocabulary


def may_have_begun(req: Req) -> bool:
    """REPLACE `Req.check_match_stop_str_prefix`: before an incomplete character, too.

    Whether the answer's end may begin a stop string, and must not be sent yet. Upstream compares
    it with the incomplete character, which no stop string has, and sends what is before that.
    """
    if not req.sampling_params.stop_strs:
        return False
    tail = req.tail_str()
    text = complete(tail)
    return any(
        stop in tail or any(text.endswith(stop[:length]) for length in range(1, len(stop)))
        for stop in req.sampling_params.stop_strs
        if stop
    )


def hold_back(original: Callable[..., None], accumulator: Any, *, req: Req) -> None:
    """AROUND `_GenerationStreamAccumulator.accept`: of answers that are not streamed, too.

    Every so many tokens these become text as well, which nobody takes back.
    """
    if (
        req.stream
        or req.finished()
        or len(req.output_ids) % accumulator.default_force_stream_interval
        or not req.check_match_stop_str_prefix()
    ):
        original(accumulator, req=req)
