"""SGLang streams the whole output or what is new; the gateway understands both."""

from __future__ import annotations

import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import run_gateway
from tests.gateway.scripted_worker import ScriptedWorker
from vase_sgl.gateway.errors import WorkerUnavailable
from vase_sgl.gateway.worker_answers import MAX_TOKEN_CHARS, NOT_UNDERSTOOD, Output
from vase_sgl.gateway.worker_http import HttpWorker


def _event(text: str, token_ids: list[int], total: int, reason: str | None = None) -> Any:
    finish = None if reason is None else {"type": reason}
    meta = {"completion_tokens": total, "finish_reason": finish}
    return {"text": text, "output_ids": token_ids, "meta_info": meta}


def encoded(event: Any) -> bytes:
    return json.dumps(event).encode()


@pytest.mark.parametrize(
    "events",
    [
        [_event("a", [1], 1), _event("abc", [1, 2, 3], 3), _event("abcd", [1, 2, 3, 4], 4, "stop")],
        [_event("a", [1], 1), _event("bc", [2, 3], 3), _event("d", [4], 4, "stop")],
        [_event("", [], 0), _event("abc", [1, 2, 3], 3), _event("d", [4], 4, "stop")],
    ],
    ids=["cumulative", "incremental", "incremental after an empty event"],
)
def test_both_add_up_to_the_same(events: list[Any]) -> None:
    output = Output(10)
    chunks = [chunk for event in events for chunk in output.chunks([encoded(event)])]
    assert (chunks[-2].text, tuple(chunks[-2].token_ids)) == ("abc", (1, 2, 3))
    assert (chunks[-1].text, tuple(chunks[-1].token_ids)) == ("abcd", (1, 2, 3, 4))
    assert chunks[-1].finish is not None


def test_what_came_together_is_one_chunk_and_an_error_ends_it() -> None:
    output = Output(10)
    (first,) = output.chunks([encoded(_event("a", [1], 1)), encoded(_event("bc", [2, 3], 3))])
    assert (first.text, tuple(first.token_ids)) == ("abc", (1, 2, 3))
    assert list(output.chunks([b"[DONE]"])) == []
    error = b'{"error": {"message": "m", "code": 503}}'
    seen: list[str] = []
    with pytest.raises(WorkerUnavailable, match="gave up: m"):
        for chunk in output.chunks([encoded(_event("d", [4], 4)), error, b"{"]):
            seen.append(chunk.text)
    assert seen == ["abcd"]
    with pytest.raises(ValueError):
        list(output.chunks([b"{"]))


def test_every_round_is_seen_however_much_comes_together() -> None:
    events = []
    for total in range(1, 7):
        event = _event("w", [total], total)
        rounds = total // 2
        event["meta_info"]["vase"] = {
            "rounds": rounds,
            "evicted_tokens": 0,
            "physical_length": 1,
            "logical_length": total,
            "reserved_slots": 9,
            "digest": f"{rounds:016x}",
        }
        events.append(encoded(event))
    chunks = list(Output(10).chunks(events))
    assert [(c.cache.rounds, len(c.token_ids)) for c in chunks if c.cache] == [
        (1, 2),
        (2, 4),
        (3, 6),
    ]


def test_lost_output_is_an_error() -> None:
    output = Output(10)
    list(output.chunks([encoded(_event("a", [1], 1))]))
    with pytest.raises(WorkerUnavailable, match="lost output"):
        list(output.chunks([encoded(_event("d", [4], 4))]))


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize(
    ("text", "tokens", "problem"),
    [("d", 4, "more tokens than max_new_tokens=3"), ("é" * 3 * MAX_TOKEN_CHARS, 3, "more text")],
    ids=["tokens", "text"],
)
def test_more_than_was_asked_for_is_an_error(
    incremental: bool, text: str, tokens: int, problem: str
) -> None:
    """What came before it stays as it was."""
    output = Output(3)
    ids = list(range(tokens))
    bad = _event(text, ids[2:], tokens) if incremental else _event("ab" + text, ids, tokens)
    seen: list[Any] = []
    with pytest.raises(WorkerUnavailable, match=problem):
        for chunk in output.chunks([encoded(_event("ab", [0, 1], 2)), encoded(bad)]):
            seen.append((chunk.text, tuple(chunk.token_ids)))
    assert seen == [("ab", (0, 1))]


@pytest.mark.parametrize("incremental", [False, True])
def test_tokens_may_be_long(incremental: bool) -> None:
    output, text = Output(3), " " * MAX_TOKEN_CHARS
    events = [_event(text, [0], 1), _event(3 * text, [0, 1, 2], 3, "length")]
    if incremental:
        events[1] = _event(2 * text, [1, 2], 3, "length")
    (chunk,) = output.chunks(map(encoded, events))
    assert chunk.text == 3 * text


@pytest.mark.parametrize("wrong", [None, "1", 1.5, 2**31], ids=str)
def test_what_is_no_token_is_not_understood(wrong: Any) -> None:
    output = Output(10)
    list(output.chunks([encoded(_event("a", [1], 1))]))
    seen: list[Any] = []
    with pytest.raises(NOT_UNDERSTOOD):
        for chunk in output.chunks(
            [encoded(_event("b", [2], 2)), encoded(_event("cd", [3, wrong], 4))]
        ):
            seen.append((chunk.text, tuple(chunk.token_ids)))
    assert seen == [("ab", (1, 2))]


def test_a_long_answer_takes_few_bytes_a_token() -> None:
    """A gateway holds as many of them as it has calls."""
    tokens, output = 20_000, Output(20_000)
    tracemalloc.start()
    try:
        for end in range(100, tokens + 1, 100):
            ids = list(range(100_000 + end, 100_100 + end))
            for chunk in output.chunks([encoded(_event("x" * 100, ids, end))]):
                assert len(chunk.token_ids) == end
        del ids, chunk
        assert tracemalloc.get_traced_memory()[0] < 8 * tokens
    finally:
        tracemalloc.stop()


async def test_both_give_one_answer_and_the_dear_one_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = []
    async with run_gateway(tmp_path) as running:
        for incremental in (False, True):
            running.worker.incremental = incremental
            await running.worker.noticed()
            answers.append(await running.client.generate_once("tell me", max_new_tokens=20, seed=1))
    assert (answers[0].text, answers[0].token_ids) == (answers[1].text, answers[1].token_ids)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    (warning,) = (text for text in told if "--incremental-streaming-output" in text)
    assert running.worker.url in warning


async def test_no_warning_of_a_worker_that_sends_what_is_new(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with ScriptedWorker() as worker:
        http = HttpWorker(worker.url, stall_seconds=1)
        for incremental, warnings in ((True, 0), (False, 1), (False, 1), (True, 1), (False, 2)):
            worker.incremental = incremental
            await http.info()
            assert caplog.text.count("--incremental-streaming-output") == warnings
        await http.close()
