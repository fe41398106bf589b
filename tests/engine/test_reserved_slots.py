"""The gateway counts the slots of a request as the engine that runs it reserves them."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.engine.scheduler_harness import SteppedScheduler
from tests.engine.tiny_model import CONTEXT
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.prometheus import EngineMetrics
from vase_sgl.engine.server_info import describe
from vase_sgl.engine.slots import Slots
from vase_sgl.eviction import EvictionParams
from vase_sgl.gateway.need import Need, max_prompt_tokens
from vase_sgl.gateway.worker_answers import worker_info
from vase_sgl.gateway.workers import WorkerRequest


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("mode", ["evict", "keep"])
@pytest.mark.parametrize("prompt_tokens", [10, 60])
@pytest.mark.parametrize("output", [5, 80])
def test_gateway_and_engine_agree(
    stepped: SteppedScheduler, prefix_cache: bool, mode: str, prompt_tokens: int, output: int
) -> None:
    stepped.configure(prefix_cache=prefix_cache)
    fields: dict[str, Any] = {"budget": 24, "window": 8, "policy": "vase-attnv", "prompt": mode}
    prompt = tuple(2 + (7 * i) % 250 for i in range(prompt_tokens))
    request = WorkerRequest(
        "a" * 32, prompt, {"max_new_tokens": output}, EvictionParams.parse(fields).to_mapping()
    )

    def info() -> Any:
        return worker_info({"internal_states": [{"vase": describe(stepped.scheduler)}]})

    idle = info()
    assert idle.reserved_slots == 0 and idle.unreserved_slots == idle.total_slots
    assert (idle.max_running_requests, idle.max_query_requests) == (8, 8)
    pool = BudgetPool.of(stepped.scheduler.req_to_token_pool)
    slot = sum(x[0].nbytes for x in (*pool.k_buffers, *pool.v_buffers))
    assert idle.query_ring_slots == pool.query_ring.data[:, 0].nbytes / slot
    stepped.submit(request.request_id, prompt, vase=fields, max_new_tokens=output)
    stepped.step()
    stepped.step()
    assert info().running_requests == 1
    assert info().reserved_slots == Need.of(request).slots(idle)
    stepped.run()
    assert info().reserved_slots == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_what_does_not_decode_yet_is_told(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Replays make way for it, whichever gateway it is from."""
    stepped.configure(overlap=overlap)
    monkeypatch.setattr(stepped.scheduler, "chunked_prefill_size", 32)

    def told() -> tuple[int, int, int | None]:
        state = worker_info({"internal_states": [{"vase": describe(stepped.scheduler)}]})
        return state.running_requests, state.waiting_requests, state.query_requests

    assert told() == (0, 0, 0)
    stepped.submit("a" * 32, [3] * 80, max_new_tokens=10)
    stepped.submit("b" * 32, [4] * 10, max_new_tokens=10, vase={"budget": 32, "window": 8})
    seen = [told()]
    while not stepped.idle:
        stepped.step()
        seen.append(told())
    assert seen[0] == (0, 2, 0)
    assert {(0, 2, 0), (2, 0, 1)} <= set(seen) and (0, 0, 0) not in seen[:5]
    stepped.run()
    assert told() == (0, 0, 0)


@pytest.mark.parametrize("vase", [None, {"policy": "full"}], ids=["stock", "full"])
def test_nothing_is_reserved_without_eviction(
    stepped: SteppedScheduler, vase: dict[str, Any] | None
) -> None:
    """Or a few of them with long answers allowed would keep an empty worker from everybody."""
    stepped.configure()
    for number in range(2):
        stepped.submit(f"{number}" * 32, (number + 2,) * 20, vase=vase, max_new_tokens=100)
    for _ in range(6):
        stepped.step()
    slots = Slots.of(stepped.scheduler)
    seen = [len(req.origin_input_ids) + len(req.output_ids) for req in stepped.running]
    assert len(seen) == 2 and max(seen) < 30
    assert (slots.reserved, slots.logical) == (sum(seen), 0)
    stepped.run()


def test_gauges_follow_what_runs(stepped: SteppedScheduler) -> None:
    """Autoscaler, alert and dashboard of the chart go by them."""
    stepped.configure()
    registry = CollectorRegistry()
    metrics = EngineMetrics({"model_name": "m", "dp_rank": "0"}, registry)

    def gauges() -> dict[str, float]:
        metrics._refreshed = -float("inf")  # now, not after a second
        metrics.refresh(stepped.scheduler)
        return {
            family.name.removeprefix("vase:"): sample.value
            for family in registry.collect()
            for sample in family.samples
            if family.type == "gauge"
        }

    total = stepped.free_slots
    idle = {
        "total_slots": total,
        "available_slots": total,
        "reserved_slots": 0,
        "owned_slots": 0,
        "physical_to_logical_ratio": 1,
    }
    assert gauges() == idle
    budget = {"budget": 24, "window": 8, "policy": "vase-attnv"}
    for number, vase in enumerate((budget, budget, None)):
        stepped.submit(f"{number}" * 32, [number + 2] * 20, vase=vase, max_new_tokens=60)
    for _ in range(21):
        stepped.step()
    busy = gauges()
    stepped.run()
    # All had seen 41 tokens. Two had evicted 8 of them, and held and reserved 32 slots; nothing is
    # reserved for the third, which held a slot for each but the newest.
    assert busy == {
        "total_slots": total,
        "available_slots": total - 104,
        "reserved_slots": 105,
        "owned_slots": 104,
        "physical_to_logical_ratio": 33 / 41,
    }
    assert gauges() == idle


@pytest.mark.parametrize("context", [100, CONTEXT], ids=["bound by context", "bound by slots"])
def test_the_longest_prompt_runs_and_a_longer_one_does_not(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    stepped.configure()
    stepped.answers.clear()
    scheduler = stepped.scheduler
    for owner in (scheduler, scheduler.tp_worker):
        monkeypatch.setattr(owner.model_config, "context_len", context)
    max_req_len, max_req_input_len = scheduler.tp_worker.get_worker_info()[4:6]
    monkeypatch.setattr(scheduler, "max_req_len", max_req_len)
    monkeypatch.setattr(scheduler, "max_req_input_len", max_req_input_len)
    longest = max_prompt_tokens(worker_info({"internal_states": [{"vase": describe(scheduler)}]}))
    for name, length in (("longest", longest), ("longer", longest + 1)):
        prompt = [2 + (7 * i) % 250 for i in range(length)]
        stepped.submit(name, prompt, max_new_tokens=1)
        for _ in range(5):
            stepped.step()
        stepped.abort("")  # what waits would wait for ever
        stepped.run()
    ends = {
        name: answer.finish and answer.finish["type"] for name, answer in stepped.answers.items()
    }
    assert ends == {"longest": "length", "longer": "abort"}
