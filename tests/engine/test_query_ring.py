"""Rings of queries: owned one request at a time, written by what a decode graph may capture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import query_ring, sizing
from vase_sgl.engine.config import EngineConfig
from vase_sgl.engine.limits import UnsupportedConfiguration
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.query_ring import QueryRing, recording_backend
from vase_sgl.engine.sizing import BufferSizes
from vase_sgl.eviction import EvictionLimits

PROMPT = [2 + (11 * i) % 250 for i in range(30)]
ATTNV = {"budget": 24, "window": 8, "policy": "vase-attnv"}


def _ring() -> QueryRing:
    return QueryRing(
        layers=2,
        requests=3,
        request_rows=6,
        window=4,
        heads=2,
        head_dim=8,
        dtype=torch.float32,
        device="cpu",
    )


def test_a_captured_step_replays_with_other_requests() -> None:
    """As a CUDA graph would: trace once, change what the static buffers hold, run again.

    A value read by the host while tracing would be baked in and the second run would be wrong.
    """
    ring = _ring()
    backend = recording_backend(
        lambda runner: SimpleNamespace(forward_decode=lambda q, *rest: q + 1), lambda runner: ring
    )(None)
    rows, positions = torch.tensor([1, 2, 0]), torch.tensor([5, 9, 0])
    batch = SimpleNamespace(req_pool_indices=rows, positions=positions)

    def step(q: torch.Tensor) -> torch.Tensor:
        layers = [SimpleNamespace(layer_id=index) for index in range(2)]
        return sum(backend.forward_decode(q + i, q, q, layers[i], batch) for i in range(2))

    q = torch.randn(3, 16)
    graph = make_fx(step)(q)
    rows.copy_(torch.tensor([4, 5, 3]))
    positions.copy_(torch.tensor([2, 7, 12]))
    ring.row_of_request.copy_(torch.tensor([0, 1, 2, 0, 3, 1], dtype=torch.int32))
    ring.data.fill_(7.0)
    fresh = torch.randn(3, 16)
    graph(fresh)
    expected = torch.full_like(ring.data, 7.0)
    for layer in range(2):
        for token, (ring_row, place) in enumerate([(3, 2), (1, 3), (0, 0)]):
            expected[layer, ring_row, place] = (fresh[token] + layer).view(2, 8)
    assert torch.equal(ring.data, expected)


def test_requests_wait_for_a_ring(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rings: of four requests that score by attention two run; all are answered."""
    ring = BudgetPool.of(stepped.scheduler.req_to_token_pool).query_ring
    monkeypatch.setattr(ring, "_owners", [None] * 2)
    stepped.answers.clear()
    with torch.inference_mode():
        for index in range(4):
            stepped.submit(f"q{index}", PROMPT, max_new_tokens=40, vase={**ATTNV, "seed": index})
        stepped.submit("free", PROMPT, max_new_tokens=40, vase={**ATTNV, "policy": "random"})
        most = 0
        while not stepped.idle:
            stepped.step()
            most = max(most, sum(req.rid.startswith("q") for req in stepped.running))
        stepped.run()
    assert most == 2
    for rid in ("q0", "q1", "q2", "q3", "free"):
        assert len(stepped.answers[rid].tokens) == 40


def test_who_waits_for_slots_holds_no_ring(stepped: SteppedScheduler) -> None:
    """Each try would take one more, and then nobody got in any more."""
    ring = BudgetPool.of(stepped.scheduler.req_to_token_pool).query_ring
    stepped.answers.clear()
    with torch.inference_mode():
        large = {"budget": 370, "window": 8, "policy": "streaming"}
        stepped.submit("large", PROMPT, max_new_tokens=500, vase=large)
        stepped.step()
        stepped.submit("waits", PROMPT, max_new_tokens=40, vase=ATTNV)
        for _ in range(12):
            stepped.step()
        assert [req.rid for req in stepped.scheduler.waiting_queue] == ["waits"]
        assert all(map(query_ring._is_gone, ring._owners))
        stepped.abort("large")
        stepped.run()
    assert len(stepped.answers["waits"].tokens) == 40


def test_a_ring_is_its_owners_until_the_slots_are_back(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overlap loop has a step of an aborted owner in flight, which writes the ring."""
    ring = BudgetPool.of(stepped.scheduler.req_to_token_pool).query_ring
    monkeypatch.setattr(ring, "_owners", [None])
    stepped.answers.clear()
    with torch.inference_mode():
        stepped.configure(overlap=True)
        stepped.submit("owner", PROMPT, max_new_tokens=40, vase=ATTNV)
        for _ in range(4):
            stepped.step()
        (req,) = stepped.running
        stepped.abort("owner")
        seen = []
        while not stepped.idle:
            seen.append(req.kv.holds_kv)
            assert ring.has_room() == (not req.kv.holds_kv)
            stepped.step()
        stepped.configure()
    assert seen[0] and ring.has_room()


def test_who_takes_a_former_owners_row_writes_no_ring(stepped: SteppedScheduler) -> None:
    """Without a budget it is mapped nowhere when it begins to decode: nobody asks for rings."""
    pool = stepped.scheduler.req_to_token_pool
    ring = BudgetPool.of(pool).query_ring
    stepped.answers.clear()
    with torch.inference_mode():
        stepped.configure()
        stepped.submit("alone", PROMPT[:20], max_new_tokens=40, vase=ATTNV)
        stepped.run()
        alone = stepped.answers["alone"]
        row = ring._mapped.index(1)
        stepped.submit("stock", PROMPT, max_new_tokens=60)
        for _ in range(4):
            stepped.step()
        assert [req.kv.req_pool_idx for req in stepped.running] == [row]
        stepped.submit("beside", PROMPT[:20], max_new_tokens=40, vase=ATTNV)
        stepped.run()
    beside = stepped.answers["beside"]
    assert (beside.tokens, beside.statistics) == (alone.tokens, alone.statistics)
    assert beside.statistics is not None and beside.statistics["rounds"] > 0


def _sizes(
    *, layers: int = 40, kv_heads: int = 8, heads: int = 40, head_dim: int = 128, **change: Any
) -> BufferSizes:
    model = SimpleNamespace(
        num_hidden_layers=layers,
        get_num_kv_heads=lambda tp_size: kv_heads // tp_size,
        num_attention_heads=heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        context_len=40960,
    )
    arguments: dict[str, Any] = {
        "kv_dtype": torch.bfloat16,
        "query_dtype": torch.bfloat16,
        "max_running_requests": None,
        "device_type": "cpu",
    }
    config = change.pop("config", EngineConfig())
    return BufferSizes.of(model, config, **(arguments | change))


class TestSizes:
    """Qwen3-14B shapes: 160 KiB of KV per slot, 26 MB of ring per request."""

    def test_of_one_slot_and_one_request(self, stepped: SteppedScheduler) -> None:
        sizes = _sizes()
        assert sizes.slot_kv_bytes == 40 * 8 * 128 * 2 * 2 == 160 * 1024
        assert sizes.slot_position_bytes == 40 * 8 * 4
        assert sizes.ring_row_bytes == 40 * 64 * 40 * 128 * 2
        assert sizes.ring_row_slots == 64 * 40 / (2 * 8)

    def test_of_a_ring_is_as_the_page_on_performance_has_it(
        self, stepped: SteppedScheduler
    ) -> None:
        smollm2 = _sizes(layers=30, kv_heads=3, heads=9, head_dim=64).ring_row_slots
        page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
        assert f"ring takes as much as {smollm2:g} slots" in page
        assert f"(With Qwen3-14B and budget 2048: as\n{_sizes().ring_row_slots:g}," in page

    @pytest.mark.parametrize(
        "sizes",
        [
            {},
            {"max_running_requests": 100},
            {"config": EngineConfig(max_requests=7)},
            {"config": EngineConfig(default={"budget": 512})},
            {"config": EngineConfig(EvictionLimits(max_window=256))},
            {"device_type": "cuda"},
        ],
        ids=["derived", "running", "explicit", "default-budget", "large-window", "cuda"],
    )
    def test_pool_and_buffers_fill_the_memory_and_no_more(
        self, stepped: SteppedScheduler, sizes: dict[str, Any]
    ) -> None:
        available = 45 * 2**30
        found = _sizes(**sizes)
        slots = found.kv_bytes(available) // found.slot_kv_bytes
        used = (
            slots * (found.slot_kv_bytes + found.slot_position_bytes)
            + (1 + found.ring_requests(slots)) * found.ring_row_bytes
            + found.scratch_bytes
        )
        assert (found.scratch_bytes > 0) == (sizes.get("device_type") == "cuda")
        assert 0.999 * available < used <= available

    def test_explicit_wins_over_running_wins_over_derived(self, stepped: SteppedScheduler) -> None:
        config = EngineConfig(max_requests=7)
        assert _sizes(config=config, max_running_requests=9).ring_requests(10**6) == 7
        assert _sizes(max_running_requests=9).ring_requests(10**6) == 9
        assert _sizes().ring_requests(10 * (2048 + 64) + 5) == 10
        assert _sizes().ring_requests(5) == 1

    def test_buffers_that_leave_no_memory_are_named(self, stepped: SteppedScheduler) -> None:
        """Else SGLang says that the weights leave none."""
        configurator = stepped.scheduler.tp_worker.model_runner.kv_cache_configurator
        left: list[int] = []

        def note(_: object, budget_bytes: int) -> None:
            left.append(budget_bytes)

        sizing.leave_room_for_buffers(note, configurator, 2**30)
        assert 0 < left[0] < 2**30
        with pytest.raises(UnsupportedConfiguration, match="lower --vase-max-requests"):
            sizing.leave_room_for_buffers(note, configurator, 2**10)

    def test_buffers_that_are_there_are_not_counted_again(self, stepped: SteppedScheduler) -> None:
        """SGLang may size the pool a second time, after the graphs, by the memory then free."""
        configurator = stepped.scheduler.tp_worker.model_runner.kv_cache_configurator
        given: list[tuple[int, int | None]] = []

        def note(_: object, budget_bytes: int, *, cap_tokens: int | None = None) -> None:
            given.append((budget_bytes, cap_tokens))

        sizing.leave_room_for_buffers(note, configurator, 2**30)
        sizing.leave_room_for_buffers(note, configurator, 2**30, cap_tokens=1000)
        sizing.leave_room_for_buffers(note, configurator, 2**10, cap_tokens=1000)
        assert given[0][0] < 2**30 and given[0][1] is None
        assert given[1:] == [(2**30, 1000), (2**10, 1000)]


def test_the_engine_sizes_its_ring_to_the_running_requests(stepped: SteppedScheduler) -> None:
    pool = BudgetPool.of(stepped.scheduler.req_to_token_pool)
    assert pool.query_ring.requests == 8
    assert pool.query_ring.data.shape[1] == 9
