"""Failures published by other systems that evict while decoding, one test each, named after it.

Item numbers and sources: R-KV's ports for SGLang and vLLM, TriAttention's vLLM shims, Random
Attention, Zipage, VeloxQuant-MLX. Item 17 (a grader's error read as a model's result) belongs to
the evaluation, not to the engine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from sglang.srt.managers.schedule_batch import ScheduleBatch

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.test_schedules import expected_rounds
from vase_sgl.engine import integrity, integrity_log, limits, prometheus
from vase_sgl.engine.config import engine_config
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.prometheus import EngineMetrics
from vase_sgl.engine.query_ring import QueryRing
from vase_sgl.engine.request_cache import RequestCache
from vase_sgl.eviction import EvictionParams, ParameterError

POOL = 400
PROMPT = [2 + (23 * i) % 250 for i in range(30)]
BUDGET: dict[str, Any] = {"budget": 24, "window": 8, "policy": "vase-attnv", "seed": 3}


@pytest.fixture(autouse=True)
def production(stepped: SteppedScheduler) -> Iterator[None]:
    """Overlap loop and prefix cache on."""
    stepped.answers.clear()
    with torch.inference_mode():
        stepped.configure(overlap=True, prefix_cache=True)
        yield
        for req in [*stepped.running, *stepped.scheduler.waiting_queue]:
            stepped.abort(req.rid)
        stepped.run()
        assert stepped.free_slots == POOL
        stepped.configure()


def _tokens(stepped: SteppedScheduler, rid: str, **request: Any) -> list[int]:
    prompt = request.pop("prompt", PROMPT)
    stepped.submit(rid, prompt, **{"max_new_tokens": 70, "vase": BUDGET, **request})
    stepped.run()
    return stepped.answers[rid].tokens


def test_01_the_token_in_flight_has_a_slot_of_its_own(stepped: SteppedScheduler) -> None:
    for index in range(6):
        vase = {**BUDGET, "seed": index, "prompt": ("evict", "keep")[index % 2]}
        stepped.submit(f"r{index}", PROMPT[: 5 * index + 1], max_new_tokens=80, vase=vase)
    rows = stepped.scheduler.req_to_token_pool.req_to_token
    allocator = stepped.scheduler.token_to_kv_pool_allocator
    checked = 0
    while not stepped.idle:
        stepped.step()
        batch = stepped.scheduler.running_batch
        if batch.is_empty() or not batch.forward_mode.is_decode() or batch.out_cache_loc is None:
            continue
        if len(batch.out_cache_loc) != len(batch.reqs):
            continue  # filtered since it ran
        slots = batch.out_cache_loc.tolist()
        assert len(set(slots)) == len(slots)
        assert not set(slots) & set(integrity._free_slots(allocator).tolist())
        lengths = batch.seq_lens_cpu.tolist()
        for req, length, slot in zip(batch.reqs, lengths, slots, strict=True):
            if not req.finished():
                assert rows[req.kv.req_pool_idx, length - 1] == slot
                checked += 1
    assert checked > 300


def _positions_seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    seen: list[list[int]] = []
    write = QueryRing.write

    def spy(ring: QueryRing, layer_id: int, rows: Any, positions: Any, q: Any) -> None:
        if layer_id == 0:
            seen.append(positions.tolist())
        write(ring, layer_id, rows, positions, q)

    monkeypatch.setattr(QueryRing, "write", spy)
    return seen


@pytest.mark.parametrize("mode", ["evict", "keep"])
def test_02_and_07_positions_count_on_by_one_through_every_round(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Offsets mixing lengths of two steps; rotary position off by one; physical positions."""
    seen = _positions_seen(monkeypatch)
    _tokens(stepped, "one", vase={**BUDGET, "prompt": mode})
    assert seen == [[position] for position in range(len(PROMPT), len(PROMPT) + 69)]


def test_03_a_round_is_fenced_against_looking_ahead(stepped: SteppedScheduler) -> None:
    """One step ahead plans the same rounds as step by step, and the answer never shows more."""
    ahead = _tokens(stepped, "ahead")
    stepped.configure(overlap=False, prefix_cache=False)
    assert _tokens(stepped, "stepwise") == ahead
    assert stepped.answers["stepwise"].statistics == stepped.answers["ahead"].statistics


def test_03_an_answer_tells_the_slots_of_its_own_length() -> None:
    """The first round is planned when the token before it is answered."""
    cache = RequestCache(EvictionParams.parse(BUDGET), 30, page_size=1, prefix_cache=True)
    stepwise = cache.statistics(9, 70)
    assert (stepwise["rounds"], stepwise["reserved_slots"]) == (0, 38 + 30)
    cache.plan_round()
    assert cache.max_slots(70) == 32
    assert cache.statistics(9, 70) == stepwise


def test_04_budget_equal_to_length_is_no_event(stepped: SteppedScheduler) -> None:
    prompt = PROMPT[:24]
    _tokens(stepped, "at", prompt=prompt, max_new_tokens=9)  # 24 + 8 entries, never more
    statistics = stepped.answers["at"].statistics
    assert statistics is not None and statistics["rounds"] == 0
    _tokens(stepped, "over", prompt=prompt, max_new_tokens=10)
    statistics = stepped.answers["over"].statistics
    assert statistics is not None
    assert (statistics["rounds"], statistics["evicted_tokens"]) == (1, 8)


def test_05_an_evicted_request_is_not_rebuilt_by_a_prefill(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        stepped.submit(name, PROMPT, max_new_tokens=60, vase=BUDGET)
    for _ in range(20):
        stepped.step()
    checks = iter([False])  # no room once, whatever the pool says
    monkeypatch.setattr(ScheduleBatch, "check_decode_mem", lambda *_, **__: next(checks, True))
    stepped.run()
    finishes = [stepped.answers[name].finish or {} for name in ("first", "second")]
    assert sorted(finish["type"] for finish in finishes) == ["abort", "length"]
    assert [f["status_code"] for f in finishes if f["type"] == "abort"] == [503]


def test_06_no_state_leaks_between_runs(stepped: SteppedScheduler) -> None:
    first = _tokens(stepped, "first")
    for index in range(5):
        stepped.submit(
            f"other{index}", PROMPT[index:], max_new_tokens=40, vase={**BUDGET, "seed": 9}
        )
    stepped.run()
    assert _tokens(stepped, "again") == first


def test_08_every_request_has_its_own_query_window(stepped: SteppedScheduler) -> None:
    """Four requests in four phases of the window, each as if it were alone."""
    alone = [
        _tokens(stepped, f"alone{i}", prompt=PROMPT[i:], vase={**BUDGET, "seed": i})
        for i in range(4)
    ]
    for index in range(4):
        stepped.submit(
            f"phase{index}", PROMPT[index:], max_new_tokens=70, vase={**BUDGET, "seed": index}
        )
        stepped.step()
        stepped.step()
    stepped.run()
    assert [stepped.answers[f"phase{index}"].tokens for index in range(4)] == alone


def test_09_nothing_is_allocated_or_freed_inside_a_forward(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = stepped.scheduler.token_to_kv_pool_allocator
    worker = stepped.scheduler.model_worker
    forward = worker.forward_batch_generation
    calls = {"forwards": 0, "rounds": 0}
    inside = False

    def guarded(name: str) -> Any:
        original = getattr(allocator, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            assert not inside, f"{name} during a forward"
            return original(*args, **kwargs)

        return call

    def spied(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = True
        calls["forwards"] += 1
        try:
            return forward(*args, **kwargs)
        finally:
            inside = False

    for name in ("alloc", "free"):
        monkeypatch.setattr(allocator, name, guarded(name))
    monkeypatch.setattr(worker, "forward_batch_generation", spied)
    before = BudgetPool.of(stepped.scheduler.req_to_token_pool).compaction.rounds
    for index in range(4):
        vase = {**BUDGET, "seed": index, "prompt": ("evict", "keep")[index % 2]}
        stepped.submit(f"r{index}", PROMPT, max_new_tokens=60, vase=vase)
    stepped.run()
    assert calls["forwards"] > 50
    assert BudgetPool.of(stepped.scheduler.req_to_token_pool).compaction.rounds > before + 10


def test_10_a_slot_owned_twice_is_noticed(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the next worker counts it: this one would be gone before its metrics are read."""
    for index in range(2):
        stepped.submit(f"r{index}", PROMPT[index:], max_new_tokens=60, vase=BUDGET)
    for _ in range(30):
        stepped.step()
    rows = stepped.scheduler.req_to_token_pool.req_to_token
    first, second = (req.kv.req_pool_idx for req in stepped.running)
    integrity.check_bookkeeping(stepped.scheduler.invariant_checker)
    saved = int(rows[first, 3])
    rows[first, 3] = rows[second, 3]
    log = tmp_path / "integrity.log"
    config = dataclasses.replace(engine_config(), integrity_log=log)
    monkeypatch.setattr(integrity_log, "engine_config", lambda: config)
    assert integrity_log.logged_errors() == 0
    with pytest.raises(integrity_log.IntegrityError, match="owned twice"):
        integrity.check_bookkeeping(stepped.scheduler.invariant_checker)
    rows[first, 3] = saved
    assert re.fullmatch(r"\S+ dp_rank=0 tp_rank=0 a slot is owned twice\n", log.read_text())
    with log.open("a") as more:
        more.write("2026-11-01T00:00:00+00:00 dp_rank=1 tp_rank=0 of another rank\n")
    assert integrity_log.logged_errors() == 1
    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus, "EngineMetrics", partial(EngineMetrics, registry=registry))
    monkeypatch.setattr(prometheus, "_metrics", None)
    reporter = stepped.scheduler.metrics_reporter
    monkeypatch.setattr(reporter, "current_scheduler_metrics_enabled", True)
    prometheus.start_metrics(stepped.scheduler)
    labels = {"model_name": str(stepped.scheduler.server_args.served_model_name), "dp_rank": "0"}
    assert registry.get_sample_value("vase:integrity_errors_total", labels) == 1


def test_11_every_unsafe_flag_is_refused_by_name() -> None:
    safe = {name: required for name, (required, _) in limits._REQUIRED.items()}
    safe |= dict.fromkeys(limits._REFUSED, "other")
    safe |= {
        flag: False for name, (other, _) in limits._ONLY_WITH.items() for flag in (name, other)
    }

    class Flags:
        def __init__(self, **change: object) -> None:
            vars(self).update(safe | change)

    limits.refuse_unsupported_flags(Flags())
    wrong = [
        (name, {True: False, False: True}.get(required, "other"), cure)  # type: ignore[call-overload]
        for name, (required, cure) in limits._REQUIRED.items()
    ]
    for name, (values, cure) in limits._REFUSED.items():
        wrong += [(name, value, cure) for value in values]
    for name, value, cure in wrong:
        with pytest.raises(limits.UnsupportedConfiguration) as error:
            limits.refuse_unsupported_flags(Flags(**{name: value}))
        assert cure in str(error.value) and name in str(error.value)


def test_12_buffers_are_sized_to_the_requests_that_can_run(stepped: SteppedScheduler) -> None:
    """Not to upstream's 2048 request rows, of which most can never run."""
    pool = BudgetPool.of(stepped.scheduler.req_to_token_pool)
    assert pool.query_ring.requests == stepped.scheduler.max_running_requests == 8


def test_13_a_budget_that_never_evicts_is_visible() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics({"model_name": "m", "dp_rank": "0"}, registry)
    params = EvictionParams.parse({"budget": 300, "window": 8})
    metrics.count_request(params)
    metrics.count_finished(RequestCache(params, 30, page_size=1, prefix_cache=True), rounds=0)
    labels = {"model_name": "m", "dp_rank": "0", "policy": "vase-attnv"}

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(name, labels | more)

    assert value("vase:requests_total", prompt="evict") == 1
    assert value("vase:finished_requests_total", evicted="false") == 1
    assert value("vase:finished_requests_total", evicted="true") is None


def test_14_freed_room_is_refilled_at_once(stepped: SteppedScheduler) -> None:
    """Two prompts of 150 fill the pool; their first round frees 118 + 24 slots each."""
    prompts = [[2 + (i * 7 + k) % 250 for i in range(150)] for k in (0, 31, 67)]
    for index, prompt in enumerate(prompts):
        stepped.submit(f"long{index}", prompt, max_new_tokens=80, vase=BUDGET)
    entered: list[int] = []
    while stepped.scheduler.waiting_queue or not entered:
        stepped.step()
        entered.append(len(stepped.running))
        assert len(entered) < 20
    rounds = BudgetPool.of(stepped.scheduler.req_to_token_pool).compaction
    assert entered[5] == 2 and rounds.rounds >= 2
    stepped.run()
    assert all(len(stepped.answers[f"long{index}"].tokens) == 80 for index in range(3))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 23, 24, 25, 31, 32, 33])
def test_15_queries_and_keys_of_different_number(stepped: SteppedScheduler, length: int) -> None:
    """A window longer than the prompt, a first round of any size: scores have the right shape."""
    _tokens(stepped, f"p{length}", prompt=PROMPT * 2 if length > 30 else PROMPT[:length])
    statistics = stepped.answers[f"p{length}"].statistics
    assert statistics is not None and statistics["rounds"] >= 4


@pytest.mark.parametrize("new", range(1, 22))
def test_16_finish_near_a_round_frees_once(stepped: SteppedScheduler, new: int) -> None:
    """Ends before, in and after the steps of the first two rounds, one step of which may be lost
    to the look-ahead; the fixture checks that every slot came back."""
    tokens = _tokens(stepped, "ends", max_new_tokens=new)
    assert len(tokens) == new
    statistics = stepped.answers["ends"].statistics
    assert statistics is not None
    assert statistics["rounds"] == expected_rounds(len(PROMPT), new, BUDGET)[0]


def test_18_unknown_options_are_errors() -> None:
    with pytest.raises(ParameterError, match="unknown key use_similarity"):
        EvictionParams.parse({**BUDGET, "use_similarity": True})


@pytest.mark.parametrize("steps", [0, 3, 9, 12, 18, 19, 20, 33])
@pytest.mark.parametrize("mode", ["evict", "keep"])
def test_19_abort_at_any_point_of_a_long_chunked_prompt(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, steps: int, mode: str
) -> None:
    """A prompt of ten chunks, budget below one chunk; the fixture checks that slots come back."""
    monkeypatch.setattr(stepped.scheduler, "chunked_prefill_size", 32)
    prompt = [2 + (i * 7) % 250 for i in range(310)]
    stepped.submit("long", prompt, max_new_tokens=50, vase={**BUDGET, "prompt": mode})
    stepped.submit("short", PROMPT, max_new_tokens=50, vase=BUDGET)
    for _ in range(steps):
        stepped.step()
    stepped.abort("long")
    stepped.run()
    assert len(stepped.answers["short"].tokens) == 50


@pytest.mark.parametrize("mode", ["evict", "keep"])
def test_19_a_prompt_of_many_chunks_is_answered_within_its_peak(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Peak: prompt + budget + window. In mode evict the row then falls to budget + window."""
    prompt = [2 + (i * 7) % 250 for i in range(310)]
    vase = {**BUDGET, "prompt": mode}
    whole = _tokens(stepped, "whole", prompt=prompt, vase=vase)
    stepped.configure(overlap=True, prefix_cache=True)
    monkeypatch.setattr(stepped.scheduler, "chunked_prefill_size", 32)
    stepped.submit("chunks", prompt, max_new_tokens=70, vase=vase)
    peak, chunks = 0, 0
    while not stepped.idle:
        stepped.step()
        chunks += not stepped.running
        peak = max(peak, POOL - stepped.unowned_slots)
    assert chunks >= 9
    assert peak == 310 + 24 + 8
    assert stepped.answers["chunks"].tokens == whole


@pytest.mark.parametrize("budgeted", [False, True], ids=["stock", "budgeted"])
def test_a_flood_that_makes_stock_retract_runs_through(
    stepped: SteppedScheduler, budgeted: bool
) -> None:
    """Twelve answers of up to 150 tokens in 400 slots. The stock arm shows that it is a flood."""
    retracted = 0
    for index in range(12):
        vase = {**BUDGET, "budget": 40, "seed": index} if budgeted else None
        prompt = [2 + (i * 7 + index) % 250 for i in range(20)]
        # Without ignore_eos, upstream admits by an estimate of the length.
        stepped.submit(f"flood{index}", prompt, max_new_tokens=150, vase=vase, ignore_eos=False)
    while not stepped.idle:
        stepped.scheduler.metrics_reporter.num_retracted_reqs = 0
        stepped.step()
        retracted += stepped.scheduler.metrics_reporter.num_retracted_reqs
    finishes = [answer.finish["type"] for answer in stepped.answers.values() if answer.finish]
    assert len(finishes) == 12 and set(finishes) <= {"length", "stop"}
    assert retracted == 0 if budgeted else retracted > 0
