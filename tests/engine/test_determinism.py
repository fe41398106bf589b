"""The same request gives the same tokens and digests, whoever else is served and in what order."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import penalties
from vase_sgl.eviction.policies import POLICIES

PROMPT = [2 + (13 * i) % 250 for i in range(40)]


def _submit_target(stepped: SteppedScheduler, policy: str, seed: int = 5) -> None:
    vase = {"budget": 32, "window": 8, "policy": policy, "seed": seed}
    stepped.submit(
        "target",
        PROMPT,
        max_new_tokens=80,
        vase=vase,
        temperature=0.9,
        top_p=0.95,
        sampling_seed=17,
    )


def _submit_neighbour(stepped: SteppedScheduler, index: int) -> None:
    rng = random.Random(index)
    budget: dict[str, Any] = {
        "budget": rng.randint(20, 40),
        "window": 8,
        "policy": rng.choice(["vase-attnv", "vase-dkv", "random"]),
        "seed": index,
        "num_sinks": 2,
    }
    stepped.submit(
        f"near{index}",
        [2 + rng.randrange(250) for _ in range(rng.randint(1, 60))],
        max_new_tokens=rng.randint(5, 100),
        vase=None if index % 4 == 0 else budget,
        temperature=rng.choice([0.0, 1.0]),
        sampling_seed=index if index % 2 else None,
    )


def _outcome(stepped: SteppedScheduler) -> tuple[list[int], list[str]]:
    answer = stepped.answers["target"]
    assert answer.statistics is not None and answer.statistics["rounds"] >= 5
    return answer.tokens, answer.statistics["round_digests"]


def _alone(stepped: SteppedScheduler, policy: str, seed: int = 5) -> tuple[list[int], list[str]]:
    stepped.answers.clear()
    _submit_target(stepped, policy, seed)
    stepped.run()
    return _outcome(stepped)


@torch.inference_mode()
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.evicts])
def test_alone_equals_among_seven_others(stepped: SteppedScheduler, policy: str) -> None:
    """First and last for VaSE's own and rkv; the others differ in their scores alone."""
    alone = _alone(stepped, policy)
    for target_at in (0, 7) if policy in ("vase-attnv", "vase-dkv", "rkv") else (7,):
        stepped.answers.clear()
        for index in range(7):
            if index == target_at:
                _submit_target(stepped, policy)
            _submit_neighbour(stepped, index)
            for _ in range(index):  # arrive in the middle of others' rounds
                stepped.step()
        if target_at == 7:
            _submit_target(stepped, policy)
        stepped.run()
        assert _outcome(stepped) == alone


@torch.inference_mode()
def test_slot_numbers_do_not_matter(stepped: SteppedScheduler) -> None:
    """A free list in another order gives other slots and the same answer."""
    alone = _alone(stepped, "vase-attnv")
    allocator = stepped.scheduler.token_to_kv_pool_allocator
    order = torch.randperm(len(allocator.free_pages), generator=torch.Generator().manual_seed(1))
    allocator.free_pages = allocator.free_pages[order]
    assert _alone(stepped, "vase-attnv") == alone


@torch.inference_mode()
def test_another_eviction_seed_forgets_other_tokens(stepped: SteppedScheduler) -> None:
    _, digests = _alone(stepped, "random", seed=5)
    _, others = _alone(stepped, "random", seed=6)
    assert set(digests).isdisjoint(others)


@torch.inference_mode()
def test_sampling_seed_decides_the_tokens_at_temperature(stepped: SteppedScheduler) -> None:
    def tokens(seed: int | None) -> list[int]:
        stepped.answers.clear()
        stepped.submit("sampled", PROMPT, max_new_tokens=40, temperature=1.0, sampling_seed=seed)
        stepped.run()
        return stepped.answers["sampled"].tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(-1) == tokens(-1) != tokens(1)  # SGLang takes negative ones
    assert tokens(None) != tokens(None)  # without a seed: SGLang's own generator


@pytest.mark.parametrize(
    "penalty",
    [{"frequency_penalty": 2.0}, {"presence_penalty": -2.0}, {"repetition_penalty": 2.0}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_penalties_count_every_token_once(
    stepped: SteppedScheduler, penalty: dict[str, float]
) -> None:
    """Whoever arrives, in either loop: all tokens but the one a step starts from."""

    def run(overlap: bool, arrivals: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
        stepped.configure(overlap=overlap, prefix_cache=True)
        stepped.answers.clear()
        stepped.submit(
            "target", PROMPT, max_new_tokens=40, temperature=0.9, sampling_seed=17, **penalty
        )
        counted: list[list[int]] = []
        for step in range(30):
            if step in arrivals:
                neighbour = [3 + step, 7, 9]
                stepped.submit(f"near{step}", neighbour, max_new_tokens=3, **penalty)
            stepped.step()
            for row, req in enumerate(stepped.scheduler.running_batch.reqs):
                if req.rid == "target":
                    counted.append(_counted(stepped, row))
        stepped.run()
        return stepped.answers["target"].tokens, counted

    with torch.inference_mode():
        tokens, counted = run(True, ())
        assert len(tokens) == 40 and counted[-1]
        # The tables hold the distinct tokens before the one that the last step started from.
        assert any(sorted(set(tokens[:n])) == counted[-1] for n in range(25, 31))
        for overlap, arrivals in ((True, (4, 9, 14, 19, 24)), (False, ()), (False, (5, 6))):
            assert run(overlap, arrivals)[0] == tokens


@pytest.mark.parametrize(
    ("step", "retractions", "token"), [(0, 0, None), (1, 0, 5), (3, 0, 7), (4, 0, 7), (1, 1, 7)]
)
def test_the_token_that_a_step_counts(step: int, retractions: int, token: int | None) -> None:
    """Of a retracted request the newest: its steps are counted anew, what it has said is not."""
    req = SimpleNamespace(decode_batch_idx=step, output_ids=[5, 6, 7], retraction_count=retractions)
    assert penalties._last_but_one(req) == token


def _counted(stepped: SteppedScheduler, row: int) -> list[int]:
    """Tokens that a row of upstream's penalty tables holds."""
    orchestrator = stepped.scheduler.running_batch.sampling_info.penalizer_orchestrator
    for penalizer in orchestrator.penalizers.values():
        for name, neutral in penalties._TABLES.items():
            table = getattr(penalizer, name, None)
            if table is not None:
                return [int(t) for t in (table[row] != neutral).nonzero()[:, 0]]
    return []
