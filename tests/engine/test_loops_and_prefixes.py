"""The overlap loop and the prefix cache change when things happen, never what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.runtime_context import get_exec

from tests.engine.scheduler_harness import Answer, SteppedScheduler
from vase_sgl.engine import lifecycle, platform_cpu

POOL = 400

SHARED = [2 + (19 * i) % 250 for i in range(60)]
MODES = [(False, False), (True, False), (False, True), (True, True)]


def _workload() -> list[tuple[str, dict[str, Any]]]:
    """Stock, keep and evict requests; prompts shorter and longer than the budget; chunks."""
    base = {"budget": 24, "window": 8, "num_sinks": 2}
    requests: list[tuple[str, dict[str, Any]]] = []
    for index, policy in enumerate(["vase-attnv", "vase-dkv", "random", "streaming"]):
        for prompt_mode in ("evict", "keep"):
            vase = {**base, "policy": policy, "prompt": prompt_mode, "seed": index}
            length = 5 + 13 * index
            prompt = SHARED[:length] + ([7 + index] if index % 2 else [])
            request = {"prompt": prompt, "max_new_tokens": 50 + 9 * index, "vase": vase}
            requests.append((f"{policy}-{prompt_mode}", request))
    requests.append(("stock", {"prompt": SHARED[:30], "max_new_tokens": 40, "vase": None}))
    return requests


def _outcomes(stepped: SteppedScheduler, *, twice: bool) -> dict[str, Any]:
    outcome = {}
    for turn in range(2 if twice else 1):
        stepped.answers.clear()
        for index, (rid, request) in enumerate(_workload()):
            stepped.submit(rid, temperature=0.8, sampling_seed=index, **request)
            stepped.step()
        stepped.run()
        for rid, answer in stepped.answers.items():
            assert answer.finish is not None and answer.finish["type"] == "length"
            outcome[rid, turn] = answer.tokens, answer.statistics
    return outcome


@torch.inference_mode()
def test_same_tokens_and_digests_in_every_mode(stepped: SteppedScheduler) -> None:
    """The second turn of a run with the prefix cache hits what the first has left."""
    stepped.configure(overlap=False, prefix_cache=False)
    plain = _outcomes(stepped, twice=False)
    for overlap, prefix_cache in MODES[1:]:
        stepped.configure(overlap=overlap, prefix_cache=prefix_cache)
        found = _outcomes(stepped, twice=prefix_cache)
        for (rid, turn), outcome in found.items():
            expected_tokens, expected = plain[rid, 0]
            tokens, statistics = outcome
            assert tokens == expected_tokens, (rid, turn, overlap, prefix_cache)
            if expected is not None:
                assert statistics is not None
                assert statistics == expected
    stepped.configure()


EVICT: dict[str, Any] = {"budget": 24, "window": 8, "policy": "random", "seed": 3}
KEEP = {**EVICT, "prompt": "keep"}


@pytest.fixture
def production(stepped: SteppedScheduler) -> Iterator[SteppedScheduler]:
    """Overlap loop and prefix cache on, as SGLang starts."""
    stepped.answers.clear()
    with torch.inference_mode():
        stepped.configure(overlap=True, prefix_cache=True)
        yield stepped
        stepped.configure()


def _tree_slots(stepped: SteppedScheduler) -> torch.Tensor:
    """Slots of the tree that a request with the prompt SHARED is given."""
    stepped.submit("probe", SHARED, max_new_tokens=3, vase=None)
    while not any(req.rid == "probe" for req in stepped.running):
        stepped.step()
    (req,) = [req for req in stepped.running if req.rid == "probe"]
    rows = stepped.scheduler.req_to_token_pool.req_to_token
    slots = rows[req.kv.req_pool_idx, : req.kv.cache_protected_len].to(torch.int64)
    stepped.abort("probe")
    return slots


def _bytes(stepped: SteppedScheduler, slots: torch.Tensor) -> list[bytes]:
    kv = stepped.scheduler.tp_worker.model_runner.token_to_kv_pool
    return [buffer[slots].numpy().tobytes() for buffer in (*kv.k_buffer, *kv.v_buffer)]


def _run(stepped: SteppedScheduler, rid: str, prompt: list[int], **request: Any) -> Answer:
    stepped.submit(rid, prompt, **request)
    stepped.run()
    return stepped.answers[rid]


@pytest.mark.parametrize("vase", [EVICT, KEEP], ids=["evict", "keep"])
def test_eviction_leaves_a_shared_prompt_alone(
    production: SteppedScheduler, vase: dict[str, Any]
) -> None:
    """One request evicts hard while another decodes from the same prompt."""
    alone = _run(production, "alone", SHARED, max_new_tokens=80, vase=None)
    assert alone.cached_tokens == 0
    prompt_slots = _tree_slots(production)
    assert len(prompt_slots) == len(SHARED)
    before = _bytes(production, prompt_slots)
    production.run()
    production.submit("evicting", SHARED, max_new_tokens=90, vase=vase)
    production.submit("neighbour", SHARED, max_new_tokens=80, vase=None)
    production.run()
    evicting, neighbour = production.answers["evicting"], production.answers["neighbour"]
    assert evicting.statistics is not None and evicting.statistics["rounds"] >= 4
    assert evicting.cached_tokens == neighbour.cached_tokens == len(SHARED) - 1
    assert neighbour.tokens == alone.tokens != evicting.tokens
    assert torch.equal(_tree_slots(production), prompt_slots)
    assert _bytes(production, prompt_slots) == before
    after = _run(production, "after", SHARED, max_new_tokens=80, vase=None)
    assert after.cached_tokens == len(SHARED) - 1
    assert after.tokens == alone.tokens


@pytest.mark.parametrize("vase", [EVICT, KEEP], ids=["evict", "keep"])
def test_the_tree_keeps_the_prompt_and_nothing_compacted(
    production: SteppedScheduler, vase: dict[str, Any]
) -> None:
    _run(production, "one", SHARED, max_new_tokens=90, vase=vase)
    assert production.scheduler.tree_cache.evictable_size() == len(SHARED)
    assert production.free_slots == POOL
    # Nor what decode computed without a round: a prefill would round it differently.
    short = _run(production, "two", SHARED, max_new_tokens=5, vase=vase)
    assert short.statistics is not None and short.statistics["rounds"] == 0
    assert short.cached_tokens == len(SHARED) - 1
    assert production.scheduler.tree_cache.evictable_size() == len(SHARED)
    assert production.free_slots == POOL


@pytest.mark.parametrize(
    ("cpu", "deterministic", "kept"), [(True, False, 6), (False, True, 6), (False, False, 10)]
)
def test_where_replays_are_promised_the_tree_gets_rows_of_a_prefill_only(
    stepped: SteppedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    cpu: bool,
    deterministic: bool,
    kept: int,
) -> None:
    monkeypatch.setattr(platform_cpu, "is_active", lambda: cpu)
    rows: list[int] = []

    def insert(tree: None, req: object, *, up_to: int) -> None:
        rows.append(up_to)

    with get_exec().deterministic.override(enable_deterministic_inference=deterministic):
        for up_to in (5, 10):
            lifecycle.keep_decoded_out(insert, None, SimpleNamespace(extend_end=6), up_to=up_to)
    assert rows == [5, kept]


def test_what_a_retracted_request_prefills_again_is_of_a_prefill(
    production: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer so far, too: the tree gets it when the request ends."""
    for index in range(2):
        production.submit(f"stock{index}", _prompt(index, 30), max_new_tokens=40)
    for _ in range(20):
        production.step()
    checks = iter([False])  # no room once, whatever the pool says
    monkeypatch.setattr(ScheduleBatch, "check_decode_mem", lambda *_, **__: next(checks, True))
    production.step()
    (retracted,) = production.scheduler.waiting_queue
    again = len(retracted.origin_input_ids) + len(retracted.output_ids)
    assert again > 40
    production.run()
    assert production.scheduler.tree_cache.evictable_size() == 30 + again


@pytest.mark.parametrize("vase", [None, EVICT, KEEP], ids=["stock", "evict", "keep"])
def test_a_cached_prompt_is_found_under_its_salt_alone(
    production: SteppedScheduler, vase: dict[str, Any] | None
) -> None:
    """Gateways give each tenant one, so that none learns from its TTFT what others have sent."""

    def cached(rid: str, salt: str | None) -> tuple[int, list[int]]:
        fields = {"cache_salt": salt}
        answer = _run(production, rid, SHARED, max_new_tokens=40, vase=vase, fields=fields)
        return answer.cached_tokens, answer.tokens

    found = [cached(f"{turn}{salt}", salt) for turn in range(2) for salt in ("a", "b", None)]
    assert [count for count, _ in found] == [0] * 3 + [len(SHARED) - 1] * 3
    assert len({tuple(tokens) for _, tokens in found}) == 1
    assert production.scheduler.tree_cache.evictable_size() == 3 * len(SHARED)
    assert production.free_slots == POOL


def test_keep_holds_on_to_the_shared_slots(production: SteppedScheduler) -> None:
    """Eight requests with one prompt of 60 hold it once: 60 + 8 x 32 slots, not 8 x 92."""
    _run(production, "first", SHARED, max_new_tokens=2, vase=None)
    prompt_slots = _tree_slots(production)
    production.run()
    for index in range(8):
        production.submit(f"keep{index}", SHARED, max_new_tokens=300, vase={**KEEP, "seed": index})
    for _ in range(150):
        production.step()
    assert len(production.running) == 8
    assert production.free_slots == POOL - len(SHARED) - 8 * 32
    rows = production.scheduler.req_to_token_pool.req_to_token
    for req in production.running:
        shared = rows[req.kv.req_pool_idx, : len(SHARED)].to(torch.int64)
        assert torch.equal(shared, prompt_slots)
    production.run()


def test_evict_leaves_the_tree_at_its_first_round(production: SteppedScheduler) -> None:
    """Before it the prompt is locked; after it the row is private and the prompt evictable."""
    production.submit("one", SHARED, max_new_tokens=60, vase=EVICT)
    tree = production.scheduler.tree_cache
    peak = 0
    while not production.running or production.running[0].kv.kv_allocated_len >= len(SHARED):
        production.step()
        peak = max(peak, POOL - production.unowned_slots)
    (req,) = production.running
    assert req.lock is None and req.kv.cache_protected_len == req.kv.cache_inserted_len == 0
    assert tree.protected_size() == 0 and tree.evictable_size() == len(SHARED)
    assert production.free_slots == POOL - 32
    # Stated peak: prompt + budget + window (and one more window within that step).
    assert peak == len(SHARED) + 24 + 8
    production.run()


def _prompt(start: int, length: int) -> list[int]:
    return [2 + (start * 7 + 11 * i) % 250 for i in range(length)]


def test_two_first_rounds_in_one_step_with_room_only_in_the_tree(
    production: SteppedScheduler,
) -> None:
    """What the first gives back in this step is still read by its round: not for the second."""
    prompts = [_prompt(1, 110), _prompt(2, 110)]
    expected = []
    for index, prompt in enumerate(prompts):
        answer = _run(production, f"alone{index}", prompt, max_new_tokens=60, vase=EVICT)
        expected.append(answer.tokens)
    production.configure(overlap=True, prefix_cache=True)
    old = _prompt(3, 150)
    _run(production, "old", old, max_new_tokens=2, vase=None)
    for index, prompt in enumerate(prompts):
        production.submit(f"both{index}", prompt, max_new_tokens=60, vase=EVICT)
    for _ in range(3):
        production.step()
    # Waits, but its look at the tree makes `old` the most recently used part.
    production.submit("waiting", old, max_new_tokens=100, vase=None)
    production.step()
    assert len(production.running) == 2
    assert production.unowned_slots < 2 * 32
    production.run()
    for index in range(2):
        assert production.answers[f"both{index}"].tokens == expected[index]


def test_the_copy_of_a_first_round_is_reserved(production: SteppedScheduler) -> None:
    """118 slots, and 32 more for one moment: the fifth neighbour has to wait for that moment."""
    production.submit("copies", _prompt(1, 110), max_new_tokens=60, vase=EVICT)
    small = {"budget": 8, "window": 3, "policy": "streaming", "prompt": "keep"}
    for index in range(5):
        production.submit(f"keep{index}", _prompt(9 + index, 44), max_new_tokens=40, vase=small)
    for _ in range(6):
        production.step()
    assert len(production.running) == 5
    production.run()
    for rid in ("copies", *(f"keep{index}" for index in range(5))):
        finish = production.answers[rid].finish
        assert finish is not None and finish["type"] == "length", (rid, finish)


def test_full_kv_neighbours_make_way_for_the_copy_of_a_first_round(
    production: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 32 slots at once; without room for them the scheduler would end."""
    ratio = production.scheduler.new_token_ratio_tracker
    monkeypatch.setattr(ratio, "current", 0.0)
    monkeypatch.setattr(ratio, "min", 0.0)
    production.submit("copies", _prompt(1, 110), max_new_tokens=60, vase=EVICT)
    for index in range(3):
        prompt = _prompt(9 + index, 78)
        production.submit(f"stock{index}", prompt, max_new_tokens=11, ignore_eos=False)
        production.step()
        production.step()
    least = POOL
    while not production.idle:
        production.step()
        if production.running and production.running[0].kv.kv_allocated_len > 110:
            least = min(least, production.free_slots)
    assert least < 32
    answer = production.answers["copies"]
    assert answer.finish == {"type": "length", "length": 60}
