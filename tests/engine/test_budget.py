"""What a budget does, read from the engine: rounds, lengths, slots, admission, neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers import schedule_batch, schedule_policy

from tests.engine.scheduler_harness import Answer, SteppedScheduler
from tests.engine.test_schedules import expected_rounds
from vase_sgl import eviction
from vase_sgl.engine import admission
from vase_sgl.engine.config import EngineConfig

POOL = 400
PROMPT = [2 + (11 * i) % 250 for i in range(30)]
POLICIES = ["vase-attnv", "vase-dkv", "random", "streaming"]
BUDGET: dict[str, Any] = {"budget": 24, "window": 8, "seed": 3}


@pytest.fixture(autouse=True)
def _clean(stepped: SteppedScheduler) -> Any:
    stepped.answers.clear()
    with torch.inference_mode():
        yield
        if not stepped.idle:
            for req in [*stepped.running, *stepped.scheduler.waiting_queue]:
                stepped.abort(req.rid)
            stepped.run()
    assert stepped.free_slots == POOL


def _answer(
    stepped: SteppedScheduler,
    vase: dict[str, Any] | None,
    *,
    prompt: list[int] | None = None,
    new: int = 100,
    **sampling: Any,
) -> Answer:
    stepped.answers.clear()
    stepped.submit("only", prompt or PROMPT, max_new_tokens=new, vase=vase, **sampling)
    stepped.run()
    return stepped.answers["only"]


@pytest.mark.parametrize(
    "policy", [name for name, policy in eviction.POLICIES.items() if policy.evicts]
)
def test_rounds_really_happen(stepped: SteppedScheduler, policy: str) -> None:
    answer = _answer(stepped, {**BUDGET, "policy": policy}, prompt=PROMPT[:10])
    statistics = answer.statistics
    assert statistics is not None
    rounds, evicted = expected_rounds(10, 100, {**BUDGET, "policy": policy})
    assert rounds > 5
    assert (statistics["rounds"], statistics["evicted_tokens"]) == (rounds, evicted)
    assert statistics["reserved_slots"] == 32
    assert statistics["logical_length"] == 110
    assert len(statistics["round_digests"]) == rounds
    assert len(set(statistics["round_digests"])) == rounds
    assert statistics["digest"] == statistics["round_digests"][-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_larger_than_everything_equals_full(
    stepped: SteppedScheduler, policy: str
) -> None:
    large = _answer(stepped, {"budget": 300, "window": 8, "policy": policy})
    full = _answer(stepped, {"policy": "full"})
    stock = _answer(stepped, None)
    assert large.tokens == full.tokens == stock.tokens
    assert large.statistics is not None and large.statistics["rounds"] == 0
    assert full.statistics is not None and full.statistics["rounds"] == 0
    assert stock.statistics is None


def test_an_evicting_budget_changes_the_answer(stepped: SteppedScheduler) -> None:
    """Guards the equality above: eviction is visible in this model's tokens."""
    small = _answer(stepped, {**BUDGET, "policy": "random"})
    assert small.tokens != _answer(stepped, None).tokens


def test_an_answer_may_be_longer_than_the_pool(stepped: SteppedScheduler) -> None:
    answer = _answer(stepped, BUDGET, new=450)
    assert len(answer.tokens) == 450 > POOL
    assert answer.finish == {"type": "length", "length": 450}


def test_output_is_bounded_by_the_context(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = 150  # steps through the model's own would take long
    monkeypatch.setattr(stepped.scheduler.model_config, "context_len", context)
    answer = _answer(stepped, {**BUDGET, "policy": "streaming"}, new=10 * context)
    assert len(answer.tokens) == context - 2 - len(PROMPT)


def test_output_is_bounded_by_the_operator(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLANG_MAX_NEW_TOKENS_LIMIT."""
    monkeypatch.setattr(stepped.scheduler, "max_new_tokens_limit", 50)
    assert len(_answer(stepped, BUDGET, new=100).tokens) == 50


def test_a_long_prompt_shrinks_and_reopens_admission(stepped: SteppedScheduler) -> None:
    """Prompt 150 holds 158 slots, then 32; requests waiting for that room enter at once."""
    long_prompt = [2 + i for i in range(150)]
    for index in range(3):
        stepped.submit(f"long{index}", long_prompt, max_new_tokens=60, vase=BUDGET)
    stepped.step()
    waiting = len(stepped.scheduler.waiting_queue)
    assert waiting == 1
    for _ in range(12):
        stepped.step()
    assert not stepped.scheduler.waiting_queue
    stepped.run()
    for index in range(3):
        statistics = stepped.answers[f"long{index}"].statistics
        assert statistics is not None
        assert statistics["evicted_tokens"] == expected_rounds(150, 60, {**BUDGET, "policy": ""})[1]


def test_admission_reserves_the_budget_and_nothing_more(stepped: SteppedScheduler) -> None:
    """Each of 8 requests wants 1000 tokens; full KV would fit none, budgets of 48 fit all."""
    for index in range(8):
        vase = {"budget": 40, "window": 8, "policy": "streaming", "seed": index}
        stepped.submit(f"many{index}", PROMPT, max_new_tokens=1000, vase=vase)
    for _ in range(60):
        stepped.step()
    assert len(stepped.running) == 8
    assert stepped.free_slots == POOL - 8 * 48
    for _ in range(20):
        stepped.step()
        assert stepped.free_slots == POOL - 8 * 48  # steady: nothing is allocated any more
    assert all(req.retraction_count == 0 for req in stepped.running)
    for index in range(8):
        stepped.abort(f"many{index}")
    stepped.run()


def test_growth_beyond_upstreams_clip_is_reserved_too(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream counts on at most CLIP_MAX_NEW_TOKENS (4096) more tokens; a budget may be larger."""
    monkeypatch.setattr(schedule_policy, "CLIP_MAX_NEW_TOKENS", 4)
    for index in range(2):
        vase = {"budget": 240, "window": 8, "policy": "streaming"}
        stepped.submit(f"large{index}", PROMPT, max_new_tokens=1000, vase=vase)
    for _ in range(4):
        stepped.step()
    assert len(stepped.running) == len(stepped.scheduler.waiting_queue) == 1
    assert schedule_policy.CLIP_MAX_NEW_TOKENS == 4


def test_full_length_neighbours_do_not_wait_for_budgets_to_end(stepped: SteppedScheduler) -> None:
    """Without a prefix cache SGLang simulates how all grow to their ends, budgets to 1500 here."""
    stepped.submit("budget", PROMPT, max_new_tokens=1500, vase=BUDGET)
    stepped.step()
    for index in range(3):
        stepped.submit(f"stock{index}", PROMPT, max_new_tokens=60 + index, ignore_eos=True)
    stepped.submit("later", PROMPT, max_new_tokens=20, vase=BUDGET)
    for _ in range(4):
        stepped.step()
    assert not stepped.scheduler.waiting_queue
    assert all(req.sampling_params.ignore_eos for req in stepped.running)
    for _ in range(70):
        stepped.step()
    assert [len(stepped.answers[f"stock{index}"].tokens) for index in range(3)] == [60, 61, 62]
    assert [req.rid for req in stepped.running] == ["budget"]
    stepped.abort("budget")
    stepped.run()


@pytest.mark.parametrize("new", [367, 368, 500])
def test_the_largest_request_of_full_length_is_let_in(stepped: SteppedScheduler, new: int) -> None:
    """SGLang bounds it to 368 tokens, and its simulation then asks for one slot more."""
    stepped.submit("large", PROMPT, max_new_tokens=new, ignore_eos=True)
    stepped.submit("behind", PROMPT[:4], max_new_tokens=3, ignore_eos=True)
    stepped.submit("budget", PROMPT[:4], max_new_tokens=30, vase=BUDGET)
    stepped.run()
    lengths = {rid: len(answer.tokens) for rid, answer in stepped.answers.items()}
    assert lengths == {"large": min(new, 368), "behind": 3, "budget": 30}


@pytest.mark.parametrize("budget", [390, 391])
def test_the_largest_budget_that_the_pool_can_run(stepped: SteppedScheduler, budget: int) -> None:
    """One that upstream would never let in is refused, else it would wait for ever."""
    vase = {"budget": budget, "window": 8, "policy": "streaming"}
    answer = _answer(stepped, vase, prompt=(PROMPT * 14)[:389], new=12)
    assert answer.finish is not None and answer.finish["type"] == (
        "length" if budget == 390 else "abort"
    )


def test_a_full_pool_of_saturated_budgets_retracts_nobody(stepped: SteppedScheduler) -> None:
    """8 x 49 = 392 of 400 slots: upstream's estimate (one slot a request) would retract here."""
    for index in range(8):
        vase = {"budget": 41, "window": 8, "policy": "random", "seed": index}
        stepped.submit(f"full{index}", PROMPT, max_new_tokens=300, vase=vase)
    running = 0
    while not stepped.idle:
        stepped.step()
        running = max(running, len(stepped.running))
        assert all(req.retraction_count == 0 for req in stepped.running)
    assert running == 8
    assert all(len(answer.tokens) == 300 for answer in stepped.answers.values())


def test_a_retraction_counts_what_those_that_stay_need(stepped: SteppedScheduler) -> None:
    """Counting all again, it would find no end before one is left."""
    for name, vase in (("one", None), ("budget", BUDGET), ("two", None)):
        stepped.submit(name, PROMPT, max_new_tokens=60, vase=vase)
    for _ in range(20):
        stepped.step()
    batch = stepped.scheduler.running_batch
    needed = [batch.new_tokens_required_next_decode([index]) for index in range(3)]
    assert [req.rid for req in batch.reqs] == ["one", "budget", "two"] and needed == [1, 0, 1]
    assert batch.new_tokens_required_next_decode() == 2
    stepped.run()


def test_full_kv_neighbours_are_retracted_first_and_budgets_never(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unbudgeted requests, admitted on an optimistic estimate, outgrow the pool; budgets run on."""
    ratio = stepped.scheduler.new_token_ratio_tracker
    monkeypatch.setattr(ratio, "current", 0.0)
    monkeypatch.setattr(ratio, "min", 0.0)
    for index in range(3):
        vase = {"budget": 40, "window": 8, "policy": "random", "seed": index}
        stepped.submit(f"budget{index}", PROMPT, max_new_tokens=400, vase=vase)
    for index in range(5):
        stepped.submit(f"stock{index}", PROMPT, max_new_tokens=150, ignore_eos=False)
    retracted: set[str] = set()
    while not stepped.idle:
        stepped.step()
        waiting = stepped.scheduler.waiting_queue
        retracted |= {req.rid for req in waiting if req.retraction_count}
    assert retracted and all(rid.startswith("stock") for rid in retracted)
    for index in range(3):
        answer = stepped.answers[f"budget{index}"]
        assert len(answer.tokens) == 400 and answer.finish == {"type": "length", "length": 400}


def test_stock_requests_are_untouched_by_budgeted_neighbours(stepped: SteppedScheduler) -> None:
    alone = _answer(stepped, None, new=60)
    stepped.answers.clear()
    stepped.submit("stock", PROMPT, max_new_tokens=60)
    for index in range(4):
        stepped.submit(f"other{index}", PROMPT[index:], max_new_tokens=90, vase=BUDGET)
    stepped.run()
    assert stepped.answers["stock"].tokens == alone.tokens
    assert stepped.answers["stock"].statistics is None


@pytest.mark.parametrize("steps", [0, 1, 5, 9, 10, 11, 40])
def test_abort_at_any_point_frees_every_slot(stepped: SteppedScheduler, steps: int) -> None:
    """Before the prefill, while growing, in the round's step (9 steps after it), after it."""
    stepped.submit("gone", PROMPT[:24], max_new_tokens=100, vase=BUDGET)
    for _ in range(steps):
        stepped.step()
    stepped.abort("gone")
    stepped.step()
    stepped.step()
    assert stepped.free_slots == POOL
    assert stepped.idle


@pytest.mark.parametrize("new", [9, 10, 17, 18])
def test_finish_in_the_step_of_a_round_frees_once(stepped: SteppedScheduler, new: int) -> None:
    answer = _answer(stepped, BUDGET, prompt=PROMPT[:24], new=new)
    assert len(answer.tokens) == new


@pytest.mark.parametrize("prompt", [1, 23, 24, 25, 31, 32, 33, 200, 256, 257, 300])
def test_every_prompt_length_around_the_bounds(stepped: SteppedScheduler, prompt: int) -> None:
    """Also prompts of several prefill chunks (256), and budgets far below one chunk."""
    tokens = [2 + (5 * i) % 250 for i in range(prompt)]
    answer = _answer(stepped, {**BUDGET, "policy": "vase-dkv"}, prompt=tokens, new=50)
    assert answer.statistics is not None
    rounds, evicted = expected_rounds(prompt, 50, {**BUDGET, "policy": "vase-dkv"})
    assert (answer.statistics["rounds"], answer.statistics["evicted_tokens"]) == (rounds, evicted)


def test_reserved_slots_of_a_short_answer_are_its_length(stepped: SteppedScheduler) -> None:
    answer = _answer(stepped, {"budget": 300, "window": 8}, prompt=PROMPT[:5], new=7)
    assert answer.statistics is not None and answer.statistics["reserved_slots"] == 12


class TestRefusals:
    """Bad parameters: a 400 that names field and cure; the scheduler goes on."""

    @pytest.mark.parametrize(
        ("vase", "text"),
        [
            ({"budget": 24, "policy": "h2o"}, "unknown policy 'h2o'; choose one of vase-attnv"),
            ({"budget": 24, "recent": 8}, "unknown key recent in vase"),
            ({"budget": 8, "window": 8}, "budget 8 must be greater than window 8"),
            ({"budget": 100000, "window": 8}, "budget must be an integer from 1 to 16384"),
            ({"budget": 64, "window": 65}, "window must be an integer from 1 to 64"),
            ({"budget": "64"}, "budget must be an integer"),
            ({"budget": True}, "budget must be an integer"),
            ({"window": 8}, "vase.budget is missing"),
            ({"budget": 24, "window": 8, "seed": -1}, "seed must be an integer from 0"),
            ({"budget": 24, "window": 8, "prompt": "drop"}, "prompt must be one of evict, keep"),
            ({"budget": 20, "window": 16, "protected_share": 0.5}, "protects 10 tokens"),
            ({"budget": 24, "window": 8, "pool_width": 4}, "pool_width must be odd"),
            ({"budget": 24, "window": 22}, "num_sinks 4 does not fit"),
            ({"budget": 24, "window": 8, "policy": "random", "pool_width": 5}, "unknown key pool"),
            ({"budget": 390, "window": 20}, "but the pool holds 400; lower the budget"),
            ("64", "vase must be an object"),
        ],
    )
    def test_refused(self, stepped: SteppedScheduler, vase: Any, text: str) -> None:
        answer = _answer(stepped, vase, new=500)
        assert answer.finish is not None
        assert answer.finish["type"] == "abort"
        assert answer.finish["status_code"] == 400
        assert text in answer.finish["message"]
        assert len(_answer(stepped, BUDGET, new=20).tokens) == 20

    @pytest.mark.parametrize("length", [395, 400, 450])
    def test_prompt_beyond_the_pool(self, stepped: SteppedScheduler, length: int) -> None:
        """It waits for no slots: neither while others hold them, nor for more than there are."""
        stepped.submit("other", PROMPT, max_new_tokens=60, vase=BUDGET)
        stepped.step()
        stepped.submit("large", [5] * length, max_new_tokens=60, vase=BUDGET)
        stepped.submit("behind", PROMPT, max_new_tokens=4)
        for _ in range(20):
            stepped.step()
        answer = stepped.answers["large"]
        assert answer.finish is not None and answer.finish["type"] == "abort"
        assert f"prompt {length}" in answer.finish["message"]
        assert "shorten the prompt" in answer.finish["message"]
        assert stepped.answers["behind"].finish is not None
        stepped.run()
        assert len(stepped.answers["other"].tokens) == 60


def test_the_default_is_not_for_probes(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle worker answers `/health` by a token; it must not look like answers with a budget."""
    config = EngineConfig(default=BUDGET)
    monkeypatch.setattr(admission, "engine_config", lambda: config)
    for rid in ("asked", f"{HEALTH_CHECK_RID_PREFIX}_1"):
        stepped.submit(rid, [0], max_new_tokens=1)
        stepped.run()
        assert stepped.answers[rid].finish == {"type": "length", "length": 1}
        assert (stepped.answers[rid].statistics is None) == (rid != "asked")


@pytest.mark.parametrize("asked", [None, {"policy": "full"}])
def test_what_cannot_have_the_default_is_served_as_by_stock(
    stepped: SteppedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: dict[str, Any] | None,
) -> None:
    """As the image with which SGLang warms up models that see, and which must be answered."""
    config = EngineConfig(default=BUDGET)
    monkeypatch.setattr(admission, "engine_config", lambda: config)
    admission._warn_of_full_cache.cache_clear()
    for rid in ("beams", "more"):
        stepped.submit(rid, PROMPT, max_new_tokens=20, vase=asked, beam_width=2)
        stepped.run()
        assert stepped.answers[rid].finish == {"type": "length", "length": 20}
        assert stepped.answers[rid].statistics is None
    told = [line for line in caplog.messages if "beam_width keeps the full KV cache" in line]
    assert len(told) == (asked is None)


def test_what_upstream_refuses_waits_for_nobody_either(stepped: SteppedScheduler) -> None:
    """A grammar, which this worker has no backend for: refused after the budget was attached."""
    stepped.submit("other", PROMPT * 10, max_new_tokens=60, vase={**BUDGET, "prompt": "keep"})
    stepped.step()
    stepped.submit("bad", PROMPT * 5, max_new_tokens=60, vase=BUDGET, regex="a+")
    stepped.submit("behind", PROMPT[:2], max_new_tokens=2)
    for _ in range(4):
        stepped.step()
    finish = stepped.answers["bad"].finish
    assert finish is not None and finish["status_code"] == 400
    assert "--grammar-backend none" in finish["message"]
    assert stepped.answers["bad"].statistics is None
    assert stepped.answers["behind"].finish == {"type": "length", "length": 2}
    assert stepped.answers["other"].finish is None
    stepped.run()


@pytest.mark.parametrize("new", [None, 20])
def test_what_upstream_refuses_before_it_bounds_the_length(
    stepped: SteppedScheduler, new: int | None
) -> None:
    """`return_sampling_mask` without a top_k: its answer leaves at once."""
    mask = {"return_sampling_mask": True}
    stepped.submit("bad", PROMPT, max_new_tokens=new, vase=BUDGET, temperature=1.0, fields=mask)
    finish = stepped.answers["bad"].finish
    assert finish is not None and finish["status_code"] == 400
    assert "return_sampling_mask requires top_k=1" in finish["message"]
    assert len(_answer(stepped, BUDGET, new=20).tokens) == 20


def test_beam_search_beside_a_budget(stepped: SteppedScheduler) -> None:
    """A stock beam request brings rows that belong to no request; a budget leaves them alone."""
    stepped.submit("alone", PROMPT, max_new_tokens=20, beam_width=3)
    stepped.run()
    beams = stepped.answers["alone"].finish
    stepped.submit("budget", PROMPT, max_new_tokens=60, vase=BUDGET)
    stepped.step()
    stepped.submit("beside", PROMPT, max_new_tokens=20, beam_width=3)
    stepped.run()
    assert stepped.answers["beside"].finish == beams == {"type": "length", "length": 20}
    assert len(stepped.answers["budget"].tokens) == 60


@pytest.mark.parametrize("overlap", [False, True])
def test_beams_are_given_up_before_budgets(stepped: SteppedScheduler, overlap: bool) -> None:
    """Beams take a slot each in every step, but admission has counted on one request."""
    stepped.configure(overlap=overlap, prefix_cache=True)
    for index in range(3):
        vase = {"budget": 90, "window": 8, "policy": "random", "seed": index}
        stepped.submit(f"budget{index}", PROMPT, max_new_tokens=150, vase=vase)
    stepped.submit("beams", PROMPT[5:], max_new_tokens=75, beam_width=5)
    stepped.run()
    stepped.configure()
    finish = stepped.answers["beams"].finish
    assert finish is not None and "Beam search group aborted" in finish["message"]
    for index in range(3):
        answer = stepped.answers[f"budget{index}"]
        assert answer.finish == {"type": "length", "length": 150}


def test_who_is_retracted_first(stepped: SteppedScheduler) -> None:
    stepped.submit("stock", PROMPT, max_new_tokens=20)
    stepped.submit("beams", PROMPT, max_new_tokens=20, beam_width=3)
    stepped.submit("budget", PROMPT, max_new_tokens=60, vase=BUDGET)
    stepped.submit("other", PROMPT, max_new_tokens=20)
    for _ in range(3):
        stepped.step()
    reqs = stepped.running
    order = schedule_batch.beam_retraction_order([3, 2, 1, 0], reqs)
    assert [reqs[index].rid for index in order] == ["budget", "beams", "other", "stock"]
    stepped.run()


def test_slots_that_beams_have_left_are_free_before_others_go(stepped: SteppedScheduler) -> None:
    stepped.configure(overlap=True)
    stepped.submit("beams", PROMPT, max_new_tokens=60, beam_width=6)
    freed = 0
    for _ in range(40):
        stepped.step()
        before = stepped.free_slots
        admission.free_orphans_of_beams(stepped.scheduler.running_batch)
        freed += stepped.free_slots - before
    stepped.run()
    stepped.configure()
    assert freed > 20
    assert stepped.answers["beams"].finish == {"type": "length", "length": 60}


def test_beam_search_with_a_budget_is_refused(stepped: SteppedScheduler) -> None:
    answer = _answer(stepped, BUDGET, beam_width=2)
    assert (
        answer.finish is not None and "cannot be used with beam_width" in answer.finish["message"]
    )


@pytest.mark.parametrize("vase", [None, BUDGET], ids=["stock", "budget"])
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([5, 10**6], "1000000 is no token; ids are from 0 to 255"),
        ([5, -3], "-3 is no token"),
        ([], "the prompt is empty"),
    ],
    ids=["beyond the vocabulary", "negative", "empty"],
)
def test_a_prompt_that_would_end_the_scheduler_is_refused(
    stepped: SteppedScheduler, prompt: list[int], text: str, vase: dict[str, Any] | None
) -> None:
    stepped.submit("bad", prompt, max_new_tokens=5, vase=vase)
    stepped.run()
    finish = stepped.answers["bad"].finish
    assert finish is not None and finish["status_code"] == 400
    assert text in finish["message"]
