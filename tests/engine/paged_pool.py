"""Slots in pages of 16; run by `test_pool_layouts.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.scheduler_harness import SteppedScheduler

PAGE = 16
POOL = 25 * PAGE
PROMPT = [2 + (11 * i) % 250 for i in range(240)]


@pytest.fixture(autouse=True)
def _clean(stepped: SteppedScheduler) -> Iterator[None]:
    stepped.answers.clear()
    assert stepped.scheduler.page_size == PAGE
    with torch.inference_mode():
        stepped.configure()
        yield
        stepped.abort("")  # whatever it is called
        stepped.run()
        stepped.configure()
    assert stepped.free_slots == POOL


def _vase(budget: int, window: int) -> dict[str, Any]:
    return {"budget": budget, "window": window, "policy": "streaming"}


def _waiting(stepped: SteppedScheduler) -> list[str]:
    return [req.rid for req in stepped.scheduler.waiting_queue]


@pytest.mark.parametrize(
    ("prompt", "budget", "window", "prefix_cache"),
    [
        (150, 30, 8, False),  # what is kept ends in another page than the window after it
        (45, 30, 10, True),  # so does the shared prompt
        (60, 30, 10, True),  # a shared page beyond the row
    ],
)
def test_a_first_round_keeps_the_whole_page_it_ends_in(
    stepped: SteppedScheduler, prompt: int, budget: int, window: int, prefix_cache: bool
) -> None:
    """The integrity check sees what is freed too early."""
    stepped.configure(prefix_cache=prefix_cache)
    stepped.submit("one", PROMPT[:prompt], max_new_tokens=30, vase=_vase(budget, window))
    for _ in range(window + 2):
        stepped.step()
    assert stepped.running[0].kv.kv_allocated_len == budget + window
    assert stepped.free_slots == POOL - 3 * PAGE
    stepped.run()
    assert len(stepped.answers["one"].tokens) == 30


def test_a_request_needs_a_page_where_one_begins(stepped: SteppedScheduler) -> None:
    for name, length, vase in (("grows", 28, _vase(60, 8)), ("stock", 31, None)):
        stepped.submit(name, PROMPT[:length], max_new_tokens=30, vase=vase)
    stepped.step()
    needed = []
    for _ in range(6):
        stepped.step()
        batch = stepped.scheduler.running_batch
        needed.append([batch.new_tokens_required_next_decode([index]) for index in range(2)])
    assert needed == [[0, 16], [0, 0], [0, 0], [16, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(("budget", "waiting"), [(72, []), (73, ["last"])])
def test_admission_reserves_whole_pages_and_nothing_more(
    stepped: SteppedScheduler, budget: int, waiting: list[str]
) -> None:
    """Six requests of 3 pages leave 7 of 25. SGLang wants one more than it needs, and fewer than
    there are: 5 pages are let in, 6 are not."""
    for index in range(6):
        stepped.submit(f"r{index}", PROMPT[:20], max_new_tokens=200, vase=_vase(40, 8))
        stepped.step()
    stepped.submit("last", PROMPT[:20], max_new_tokens=200, vase=_vase(budget, 8))
    stepped.step()
    assert _waiting(stepped) == waiting


@pytest.mark.parametrize(("prompt", "waiting"), [(205, []), (206, ["beside"])])
def test_the_copy_of_a_first_round_is_reserved_in_pages(
    stepped: SteppedScheduler, prompt: int, waiting: list[str]
) -> None:
    """8 pages up to the first round and 3 for its copy leave 14 of 25, 224 slots; SGLang wants more
    than the tokens and a page."""
    stepped.configure(prefix_cache=True)
    stepped.submit("copies", PROMPT[:110], max_new_tokens=60, vase=_vase(40, 8))
    stepped.step()
    stepped.submit("beside", PROMPT[::-1][:prompt], max_new_tokens=2, vase={"policy": "full"})
    stepped.step()
    assert _waiting(stepped) == waiting
