"""The load generator, against a worker that keeps a set pace."""

from __future__ import annotations

import pytest

from benchmarks import load
from tests.benchmarks.scripted_worker import ScriptedWorker, scripted


def _requests(count: int, tokens: int) -> list[load.Request]:
    return [load.Request(ids, tokens) for ids in load.prompts(count, 4, 100, seed=0)]


async def test_every_token_is_counted_at_its_time() -> None:
    async with scripted(ScriptedWorker(seconds=0.02)) as worker:
        burst = await load.burst(worker.url, _requests(3, 10))
    assert burst.complete
    assert [one.tokens for one in burst.arrivals] == [10, 10, 10]
    assert {one.finish for one in burst.arrivals} == {"length"}
    assert worker.peak == 3  # all at once
    assert burst.tokens_between(-1, burst.seconds) == 30 == sum(burst.tokens_by_second())
    for one in burst.arrivals:
        assert one.first is not None and one.first >= 0.02
        assert (per_token := one.per_token()) is not None and per_token >= 0.02
        half = one.before(one.messages[4][0])
        assert (half.tokens, half.finish) == (5, None)


async def test_after_the_window_the_rest_is_aborted_and_the_worker_is_idle() -> None:
    async with scripted(ScriptedWorker(seconds=0.05)) as worker:
        burst = await load.burst(worker.url, _requests(2, 1000), seconds=0.3)
        assert worker.running == 0
    assert not burst.complete and worker.aborts >= 1
    assert burst.seconds < 5
    for one in burst.arrivals:
        assert 0 < one.tokens < 1000 and one.finish is None


async def test_a_refused_request_is_an_error() -> None:
    async with scripted(ScriptedWorker(refuse=400)) as worker:
        with pytest.raises(RuntimeError, match="HTTP 400: no room"):
            await load.burst(worker.url, _requests(2, 5))


async def test_retractions_are_those_of_the_run() -> None:
    worker = ScriptedWorker(seconds=0.01)
    worker.retracted = 7  # of runs before
    async with scripted(worker):
        burst = await load.burst(worker.url, _requests(1, 3))
    assert burst.retractions == 0


def test_a_metric_is_read_by_its_whole_name() -> None:
    text = 'a:b{x="1"} 2.0\na:b{x="2"} 3.0\na:bc{x="1"} 50\n# a:b 9\n'
    assert load.metric(text, "a:b") == 5
    assert load.metric(text, "a:d") == 0


def test_a_request_carries_what_it_is_given() -> None:
    vase = {"budget": 8, "window": 4}
    request = load.Request((1, 2), 5, vase, temperature=0.5, seed=3, logprobs=True)
    assert request.body(stream=False) == {
        "input_ids": [1, 2],
        "stream": False,
        "return_logprob": True,
        "sampling_params": {
            "max_new_tokens": 5,
            "temperature": 0.5,
            "ignore_eos": True,
            "sampling_seed": 3,
            "custom_params": {"vase": vase},
        },
    }


def test_prompts_differ_and_repeat_with_their_seed() -> None:
    first = load.prompts(20, 8, 100, seed=1)
    assert len(set(first)) == 20
    assert first == load.prompts(20, 8, 100, seed=1) != load.prompts(20, 8, 100, seed=2)
    assert all(2 <= token < 100 for prompt in first for token in prompt)
