"""Replay: match, the exact place of a divergence, and workers that cannot be compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.gateway.running import Running
from vase_sgl.client import Completion, InvalidRequest, NotFound, Verdict

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 100,
    "budget": 32,
    "window": 8,
    "seed": 3,
    "temperature": 0.7,
}


async def generate(running: Running) -> Completion:
    return await running.client.generate_once("tell me", **OPTIONS)


async def replay(running: Running, answer: Completion) -> Verdict:
    return await running.client.replay(answer.request_id).verdict()


async def test_a_replay_sends_what_was_recorded_and_matches(running: Running) -> None:
    answer = await generate(running)
    running_replay = running.client.replay(answer.request_id)
    steps = [step async for step in running_replay]
    verdict = await running_replay.verdict()
    assert verdict.outcome == "MATCH" and verdict.differences == ()
    assert (verdict.tokens_compared, verdict.rounds_compared) == (100, 8)
    assert [s.tokens_compared for s in steps] == sorted(s.tokens_compared for s in steps)
    assert steps[-1].tokens_total == 100 and steps[-1].rounds_total == 8
    first, second = running.worker.bodies
    assert first.pop("rid") != second.pop("rid")
    assert first == second


async def test_a_match_without_eviction(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=5)
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.rounds_compared) == ("MATCH", 0)


async def test_the_first_differing_token_is_named_and_the_replay_stops(running: Running) -> None:
    answer = await generate(running)
    running.worker.faults.other_token_at = 41
    running.worker.token_seconds = 0.002
    verdict = await replay(running, answer)
    assert verdict.outcome == "DIVERGED"
    assert verdict.first_differing_token == verdict.tokens_compared == 41
    assert verdict.expected_token == answer.token_ids[41] != verdict.actual_token
    assert verdict.first_differing_round is None
    assert await running.worker.wait_for_abort() == running.worker.bodies[-1]["rid"]


async def test_the_first_differing_round_is_named(running: Running) -> None:
    answer = await generate(running)
    running.worker.faults.other_digest_at_round = 3
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.first_differing_round) == ("DIVERGED", 3)
    assert verdict.rounds_compared == 2 and verdict.first_differing_token is None


@pytest.mark.parametrize("end", [60, 99])
async def test_an_answer_that_ends_early_diverges_there(running: Running, end: int) -> None:
    answer = await generate(running)
    running.worker.faults.end_after_tokens = end
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.first_differing_token) == ("DIVERGED", end)
    assert (verdict.expected_token, verdict.actual_token) == (answer.token_ids[end], None)


async def test_an_answer_that_goes_on_diverges_there(running: Running) -> None:
    running.worker.faults.end_after_tokens = 50
    answer = await generate(running)
    running.worker.faults.end_after_tokens = None
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.first_differing_token) == ("DIVERGED", 50)
    assert verdict.expected_token is None and verdict.actual_token is not None


async def test_another_worker_is_incomparable_and_nothing_is_run(running: Running) -> None:
    answer = await generate(running)
    running.worker.fingerprint["sglang"] = "1"
    running.worker.fingerprint["new"] = "x"
    del running.worker.fingerprint["device"]
    verdict = await replay(running, answer)
    assert verdict.outcome == "INCOMPARABLE"
    assert [dataclasses.astuple(d) for d in verdict.differences] == [
        ("device", "none", None),
        ("new", None, "x"),
        ("sglang", "0", "1"),
    ]
    assert len(running.worker.bodies) == 1


async def test_only_a_completed_generation_can_be_replayed(running: Running) -> None:
    running.worker.faults.abort_after_tokens = 2
    stream = running.client.generate("tell me", max_new_tokens=5)
    with pytest.raises(Exception, match="out of luck"):
        _ = [chunk async for chunk in stream]
    with pytest.raises(InvalidRequest, match="a generation that was failed; only a completed"):
        await running.client.replay(stream.request_id).verdict()


async def test_an_unknown_record_is_not_found(running: Running) -> None:
    with pytest.raises(NotFound, match="there is no record 'nothing' of tenant alice"):
        await running.client.replay("nothing").verdict()


async def test_a_rotated_master_secret_does_not_touch_replays(running: Running) -> None:
    from vase_sgl.gateway import tenants

    answer = await generate(running)
    content = tenants.load(running.tenants_file)
    (alice,) = content.tenants
    secrets = (*alice.master_secrets, tenants.new_master_secret(2))
    alice = alice.model_copy(update={"master_secrets": secrets})
    tenants.save(running.tenants_file, tenants.TenantFile(tenants=(alice,)))
    assert (await replay(running, answer)).outcome == "MATCH"
    again = await generate(running)
    assert again.result.seeds.master_version == 2 and again.token_ids != answer.token_ids
