"""Where a prompt is cut — chunks, neighbours, a cached prefix — changes no bit of its KV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.scheduler_harness import SteppedScheduler

PROMPT = [2 + (19 * i + i * i) % 250 for i in range(310)]
VASE = {"budget": 24, "window": 8, "policy": "vase-attnv", "seed": 3, "num_sinks": 2}
NEIGHBOUR = [2 + (7 * i) % 250 for i in range(40)]


@pytest.fixture
def cold(stepped: SteppedScheduler) -> Iterator[SteppedScheduler]:
    chunk = stepped.scheduler.chunked_prefill_size
    stepped.answers.clear()
    with torch.inference_mode():
        stepped.scheduler.chunked_prefill_size = 512
        stepped.configure()
        yield stepped
        stepped.scheduler.chunked_prefill_size = chunk
        stepped.configure()


def _outcome(stepped: SteppedScheduler) -> tuple[list[bytes], list[int], dict[str, Any]]:
    """KV of the prompt once prefilled, tokens and statistics of the answer."""
    stepped.answers.clear()
    stepped.submit("target", PROMPT, max_new_tokens=40, vase=VASE)
    for _ in range(40):
        stepped.step()
        if found := [req for req in stepped.running if req.rid == "target"]:
            break
    (req,) = found
    rows = stepped.scheduler.req_to_token_pool.req_to_token
    slots = rows[req.kv.req_pool_idx, : len(PROMPT)].long()
    pool = stepped.scheduler.tp_worker.model_runner.token_to_kv_pool
    kv = [
        buffer[slots].view(torch.uint8).numpy().tobytes()
        for buffer in (*pool.k_buffer, *pool.v_buffer)
    ]
    stepped.run()
    answer = stepped.answers["target"]
    assert answer.statistics is not None and answer.statistics["rounds"] >= 3
    return kv, answer.tokens, answer.statistics


def test_chunks_and_neighbours_change_nothing(cold: SteppedScheduler) -> None:
    whole = _outcome(cold)
    for chunk in (16, 80, 192, 256):
        cold.scheduler.chunked_prefill_size = chunk
        assert _outcome(cold) == whole, chunk
    # A neighbour takes the first tokens of a chunk, so the prompt is cut elsewhere.
    cold.scheduler.chunked_prefill_size = 128
    cold.submit("neighbour", NEIGHBOUR, max_new_tokens=8)
    assert _outcome(cold) == whole


@pytest.mark.parametrize("cached", [1, 16, 64, 150, 300, 309])
def test_a_cached_prefix_changes_nothing(cold: SteppedScheduler, cached: int) -> None:
    whole = _outcome(cold)
    cold.configure(overlap=True, prefix_cache=True)
    cold.submit("other", [*PROMPT[:cached], 1, 2, 3], max_new_tokens=2)
    cold.run()
    assert _outcome(cold) == whole
    page_size = cold.scheduler.tree_cache.page_size
    assert cold.answers["target"].cached_tokens == cached // page_size * page_size


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("new", [1, 2, 60])
def test_a_next_turn_does_not_meet_what_decode_computed(
    cold: SteppedScheduler, new: int, overlap: bool
) -> None:
    """A conversation's next turn answers as on a worker that has not seen the last one."""

    def second_turn(prompt: list[int]) -> tuple[list[int], dict[str, Any], int]:
        cold.submit("second", prompt, max_new_tokens=40, vase=VASE)
        cold.run()
        answer = cold.answers.pop("second")
        assert answer.statistics is not None
        return answer.tokens, answer.statistics, answer.cached_tokens

    first = PROMPT[:64]
    cold.configure(overlap=overlap, prefix_cache=True)
    cold.submit("first", first, max_new_tokens=new)
    cold.run()
    prompt = [*first, *cold.answers["first"].tokens, 5, 9, 77]
    *live, cached = second_turn(prompt)
    assert cached == len(first)
    cold.configure(overlap=overlap, prefix_cache=True)  # nothing cached, as after a restart
    *replayed, cached = second_turn(prompt)
    assert cached == 0 and replayed == live


def test_an_answer_that_ends_with_its_prefill_leaves_its_prompt(cold: SteppedScheduler) -> None:
    """The overlap loop has decoded a token more by then."""
    cold.configure()
    cold.submit("probe", NEIGHBOUR, max_new_tokens=1)
    cold.run()
    (token,) = cold.answers["probe"].tokens
    cold.configure(overlap=True, prefix_cache=True)
    stop = {"stop_token_ids": [token], "ignore_eos": False}
    cold.submit("stopped", NEIGHBOUR, max_new_tokens=9, **stop)
    cold.run()
    assert cold.answers["stopped"].tokens == [token]
    page_size = cold.scheduler.tree_cache.page_size
    whole_pages = len(NEIGHBOUR) // page_size * page_size
    assert cold.scheduler.tree_cache.evictable_size() == whole_pages
    assert cold.free_slots == 400
