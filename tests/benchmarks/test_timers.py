"""Timers: what was inside is told from what was called."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from benchmarks.timers import Timers, decode_seconds, difference, shares


def _wait(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_own_time_is_without_the_time_of_timed_callees() -> None:
    timers = Timers()
    inner = timers.wrap("inner", _wait)

    def outer() -> float:
        time.sleep(0.02)
        return inner(0.03) + inner(0.01)

    assert timers.wrap("outer", outer)() == pytest.approx(0.04)
    calls, inside, own = timers.totals["outer"]
    assert calls == 1 and timers.totals["inner"][0] == 2
    assert own == pytest.approx(inside - timers.totals["inner"][1])
    assert own >= 0.02 and timers.totals["inner"][1] >= 0.04


def test_what_an_around_hook_calls_upstream_is_stock() -> None:
    timers = Timers()
    hook = timers.around("hook", lambda original, seconds: original(seconds) + 1)
    assert hook(_wait, 0.02) == 1.02
    assert timers.totals["stock"][1] >= 0.02 > timers.totals["hook"][2]


def test_a_call_that_raises_is_counted_and_leaves_no_trace() -> None:
    timers = Timers()

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        timers.wrap("outer", timers.wrap("inner", fail))()
    assert timers.totals["outer"][0] == timers.totals["inner"][0] == 1
    assert timers.call_named(lambda n: f"n{n}", lambda: 3) == 3
    assert timers.totals["n3"][0] == 1


def test_a_method_is_replaced_in_place_and_must_exist() -> None:
    timers, owner = Timers(), SimpleNamespace(work=_wait)
    timers.prefix = "prefill."
    timers.method("work", owner, "work")
    owner.work(0.0)
    assert timers.totals["prefill.work"][0] == 1
    with pytest.raises(AttributeError):
        timers.method("gone", owner, "gone")


def test_threads_do_not_meet() -> None:
    timers = Timers()
    part = timers.wrap("part", _wait)

    def whole() -> None:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(part, [0.02] * 6))

    timers.wrap("whole", whole)()
    calls, inside, own = timers.totals["part"]
    assert calls == 6 and inside == own >= 0.12
    assert timers.totals["whole"][2] == timers.totals["whole"][1]


def test_a_difference_counts_what_came_in_between() -> None:
    before = {"a": [1, 1.0, 0.5]}
    after = {"a": [3, 4.0, 1.5], "b": [1, 2.0, 2.0]}
    assert difference(after, before) == {"a": [2, 3.0, 1.0], "b": [1, 2.0, 2.0]}


def test_prefill_is_no_part_of_the_decode_time() -> None:
    totals = {
        "step.run": [1, 2.0, 2.0],
        "prefill.step.run": [1, 9.0, 9.0],
        "linear": [1, 1.0, 1.0],
        "prefill.linear": [1, 5.0, 5.0],
    }
    assert decode_seconds(totals) == 2.0
    assert shares(totals)["linear"] == 0.5
    with pytest.raises(ValueError, match="no decode step was timed"):
        shares({"prefill.step.run": [1, 9.0, 9.0]})
