"""The gateway counts the slots of a request as the engine that runs it reserves them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.server_info import describe
from vase_sgl.eviction import EvictionParams
from vase_sgl.gateway.need import Need
from vase_sgl.gateway.worker_http import worker_info
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
