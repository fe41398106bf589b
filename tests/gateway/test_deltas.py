"""Cumulative output to deltas: nothing is lost, repeated or taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vase_sgl.gateway.deltas import OutputDeltas
from vase_sgl.gateway.workers import TokenPrefix

LETTERS = st.text(alphabet="abc", max_size=40)


@given(text=LETTERS, stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3))
def test_what_was_sent_is_the_final_text(text: str, stop: list[str]) -> None:
    """The worker checks stop strings letter by letter and cuts the one it finds."""
    deltas = OutputDeltas(stop)
    sent = ""
    final = text
    for end in range(1, len(text) + 1):
        found = [text[:end].index(s) for s in stop if s in text[:end]]
        if found:
            final = text[: min(found)]
            break
        sent += deltas.take_text(text[:end], final=False)
    sent += deltas.take_text(final, final=True)
    assert sent == final


def test_text_flows_when_no_stop_string_begins() -> None:
    deltas = OutputDeltas(["END"])
    assert deltas.take_text("hello", final=False) == "hello"
    assert deltas.take_text("hello E", final=False) == " "
    assert deltas.take_text("hello EN", final=False) == ""
    assert deltas.take_text("hello ENter", final=False) == "ENter"


def test_tokens_are_cut_where_they_were() -> None:
    deltas = OutputDeltas()
    assert deltas.take_tokens((1, 2)) == (1, 2)
    assert deltas.take_tokens((1, 2)) == ()
    assert deltas.take_tokens((1, 2, 3)) == (3,)


def test_a_prefix_of_a_list_that_grows_stays_as_it_was() -> None:
    growing = [5, 6, 7]
    prefix = TokenPrefix(growing)
    growing += [8, 9]
    assert (len(prefix), list(prefix), prefix[-1], prefix[0]) == (3, [5, 6, 7], 7, 5)
    assert (prefix[1:], prefix[:10], prefix[::-1], prefix[3:]) == ([6, 7], [5, 6, 7], [7, 6, 5], [])
    assert prefix and not TokenPrefix([])
    with pytest.raises(IndexError):
        prefix[3]
    deltas = OutputDeltas()
    assert deltas.take_tokens(prefix) == [5, 6, 7]
    assert deltas.take_tokens(TokenPrefix(growing)) == [8, 9]
