"""From a worker's cumulative output to what is new, without ever taking text back."""

from __future__ import annotations

from collections.abc import Sequence


class OutputDeltas:
    """What of a growing output has not been sent yet. `take_*` mutate the state.

    A worker cuts a stop string off the text when it is complete; until then its beginning is in
    the cumulative text. So the end of the text is held back while it may be one's beginning.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._text_sent = 0
        self._tokens_sent = 0

    def take_text(self, text: str, *, final: bool) -> str:
        """The new part of cumulative `text` that is safe to send; all of it if `final`."""
        end = len(text) if final else len(text) - beginning_at_end(text, self._stop)
        new = text[self._text_sent : end]
        self._text_sent = max(self._text_sent, end)
        return new

    def take_tokens(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The new part of cumulative `token_ids`."""
        new = token_ids[self._tokens_sent :]
        self._tokens_sent = max(self._tokens_sent, len(token_ids))
        return new


def beginning_at_end(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the strings."""
    longest = 0
    for string in strings:
        for length in range(min(len(string), len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
