"""Run by test_triton_rounds.py in a process of its own, under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vase_kernels.copy_rows import copy_rows
from vase_kernels.evict import POLICIES, Result, evict

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import rounds
from vase_sgl.engine.integrity_log import IntegrityError
from vase_sgl.engine.pool import BudgetPool

PROMPT = [2 + (11 * i) % 250 for i in range(40)]


@torch.inference_mode()
def test_little_scratch_only_means_more_launches(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests are due in one step, of two lengths, one with a kept prompt."""
    pool = BudgetPool.of(stepped.scheduler.req_to_token_pool)
    assert pool.kernels == "triton"
    batches: list[int] = []
    launch = rounds.TritonRounds._launch

    def spied(self: Any, policy: str, pool: BudgetPool, batch: list[Any]) -> None:
        batches.append(len(batch))
        launch(self, policy, pool, batch)

    monkeypatch.setattr(rounds.TritonRounds, "_launch", spied)

    def answers() -> list[Any]:
        stepped.answers.clear()
        batches.clear()
        for index, (length, mode) in enumerate([(40, "evict"), (24, "keep"), (40, "evict")]):
            vase = {"budget": 24, "window": 8, "seed": index, "prompt": mode}
            new = 30 + (24 if mode == "keep" else 0)
            stepped.submit(f"r{index}", PROMPT[:length], max_new_tokens=new, vase=vase)
        stepped.run()
        return [(a.tokens, a.statistics) for a in stepped.answers.values()]

    together = answers()
    assert max(batches) > 1
    runner: Any = pool.compaction._rounds
    largest = runner._bytes(runner._maxima(1, 40 + 8, 24, 8))
    monkeypatch.setattr(runner, "_memory", runner._memory[:largest])
    assert answers() == together
    assert max(batches) == 1


@torch.inference_mode()
def test_shared_prompts_of_a_step_are_copied_at_once(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three leave the prefix tree in one step, one has nothing there. Torch copies the same."""
    pool = BudgetPool.of(stepped.scheduler.req_to_token_pool)
    copied: list[int] = []

    def spied(view: Any, source: torch.Tensor, target: torch.Tensor) -> None:
        copied.append(len(source))
        copy_rows(view, source, target)

    monkeypatch.setattr(rounds, "copy_rows", spied)

    def answers() -> list[Any]:
        stepped.configure(prefix_cache=True)
        stepped.answers.clear()
        for index, (length, mode) in enumerate(
            [(40, "evict"), (24, "keep"), (30, "evict"), (40, "evict")]
        ):
            vase = {"policy": "random", "budget": 24, "window": 8, "seed": index, "prompt": mode}
            stepped.submit(f"r{index}", PROMPT[:length], max_new_tokens=16, vase=vase)
        stepped.run()
        stepped.configure()
        return [(a.tokens, a.statistics) for a in stepped.answers.values()]

    at_once = answers()
    assert copied == [3 * 24]
    monkeypatch.setattr(pool.compaction, "_rounds", rounds.ReferenceRounds())
    assert answers() == at_once
    assert len(copied) == 1


@torch.inference_mode()
def test_a_forced_token_that_was_evicted_ends_the_worker(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `VASE_CHECK_INTEGRITY`, which every test has on."""
    faulty = Result(torch.zeros(1, dtype=torch.int64), torch.tensor([3], dtype=torch.int32))
    launch = rounds.TritonRounds._launch
    refused: list[str] = []

    def twice(self: Any, policy: str, pool: BudgetPool, batch: list[Any]) -> None:
        launch(self, policy, pool, batch)
        with monkeypatch.context() as patch:
            patch.setattr(rounds, "evict", lambda *_: faulty)
            with pytest.raises(IntegrityError, match=r"random: heads .* by request: \[3\]"):
                launch(self, policy, pool, batch)
        refused.append(policy)

    monkeypatch.setattr(rounds.TritonRounds, "_launch", twice)
    vase = {"budget": 24, "window": 8, "policy": "random"}
    stepped.submit("r", PROMPT, max_new_tokens=12, vase=vase)
    stepped.run()
    assert refused == ["random"]


@torch.inference_mode()
def test_warming_up_compiles_every_policy_and_changes_nothing(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = BudgetPool.of(stepped.scheduler.req_to_token_pool)
    launched: list[str] = []

    def spied(policy: str, *arguments: Any) -> Any:
        launched.append(policy)
        return evict(policy, *arguments)

    monkeypatch.setattr(rounds, "evict", spied)
    copies: list[int] = []
    monkeypatch.setattr(rounds, "copy_rows", lambda _, source, target: copies.append(len(source)))
    buffers = (*pool.k_buffers, *pool.v_buffers, pool.token_positions, pool.query_ring.data)
    before = [buffer.clone() for buffer in buffers]
    runner: Any = pool.compaction._rounds
    assert runner.warm_up(pool) == {}
    assert launched == list(POLICIES) and copies == [0]
    assert all(torch.equal(now, then) for now, then in zip(buffers, before, strict=True))

    def without_rkv(policy: str, *arguments: Any) -> Any:
        if policy == "rkv":
            raise ValueError("type fp8e4nv not supported in this architecture")
        return evict(policy, *arguments)

    monkeypatch.setattr(rounds, "evict", without_rkv)
    reason = "type fp8e4nv not supported in this architecture"
    assert runner.warm_up(pool) == {"rkv": reason}
    monkeypatch.setattr(pool, "refused_policies", {"rkv": reason})
    stepped.answers.clear()
    for policy in ("rkv", "random"):
        vase = {"budget": 24, "window": 8, "policy": policy}
        stepped.submit(policy, PROMPT, max_new_tokens=4, vase=vase)
    stepped.run()
    refusal = stepped.answers["rkv"].finish
    assert refusal is not None and refusal["type"] == "abort"
    assert (
        "rkv cannot run on this worker: its kernels do not compile (type fp8" in refusal["message"]
    )
    assert len(stepped.answers["random"].tokens) == 4
