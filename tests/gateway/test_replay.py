"""Replay: match, the exact place of a divergence, and workers that cannot be compared."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import pytest

from tests.gateway.running import Running
from vase_sgl.client import (
    AsyncClient,
    Completion,
    InvalidRequest,
    NotFound,
    VaseError,
    Verdict,
)
from vase_sgl.gateway import tenants

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


async def test_a_default_that_came_later_is_not_for_what_had_a_full_cache(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=60)
    running.worker.default_eviction = {"budget": 32, "window": 8, "policy": "random"}
    await running.worker.noticed()
    assert (await replay(running, answer)).outcome == "MATCH"
    recorded, replayed = (body["sampling_params"] for body in running.worker.bodies)
    assert "custom_params" not in recorded
    assert replayed == {**recorded, "custom_params": {"vase": {"policy": "full"}}}


@pytest.mark.parametrize("retracted", ["recorded", "replayed"])
async def test_an_answer_that_was_retracted_is_no_measure(running: Running, retracted: str) -> None:
    running.worker.faults.retractions = 2 if retracted == "recorded" else 0
    answer = await running.client.generate_once("tell me", max_new_tokens=20)
    running.worker.faults.retractions = 0 if retracted == "recorded" else 1
    assert (await replay(running, answer)).outcome == "MATCH"  # as most are
    running.worker.faults.other_token_at = 7
    verdict = await replay(running, answer)
    assert verdict.outcome == "INCOMPARABLE" and verdict.tokens_compared == 7
    (difference,) = verdict.differences
    seen = (difference.key, difference.recorded, difference.current)
    assert seen == ("num_retractions", *(("2", None) if retracted == "recorded" else (None, "1")))


@pytest.mark.parametrize("budget", [None, 32])
async def test_an_answer_whose_worker_changed_meanwhile(
    running: Running, budget: int | None
) -> None:
    """New weights, or another process at its address: the fingerprint of before is not its own."""
    running.worker.faults.stamp = "ab" * 8
    window = None if budget is None else 8
    answer = await running.client.generate_once(
        "tell me", max_new_tokens=20, budget=budget, window=window
    )
    running.worker.faults.stamp = "0" * 16
    verdict = await replay(running, answer)
    assert verdict.outcome == "INCOMPARABLE"
    (difference,) = verdict.differences
    seen = (difference.key, difference.recorded, difference.current)
    assert seen == ("changed_to", "ab" * 8, None)


@pytest.mark.parametrize("token_seconds", [0.002, 0], ids=["streaming", "in-the-last-chunk"])
async def test_a_replay_whose_worker_changes_meanwhile(
    running: Running, token_seconds: float
) -> None:
    answer = await generate(running)
    running.worker.faults.new_weights_at = 41
    running.worker.token_seconds = token_seconds
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.tokens_compared) == ("INCOMPARABLE", 41)
    (difference,) = verdict.differences
    assert (difference.key, difference.recorded, difference.current) == (
        "changed_to",
        None,
        "cd" * 8,
    )


@pytest.mark.parametrize(
    ("digest", "outcome"), [("0123456789abcdef" * 2, "MATCH"), ("dummy", "INCOMPARABLE")]
)
async def test_the_same_weights_in_a_folder_of_another_name(
    running: Running, digest: str, outcome: str
) -> None:
    running.worker.fingerprint = {**running.worker.fingerprint, "weights_digest": digest}
    await running.worker.noticed()
    answer = await generate(running)
    running.worker.fingerprint = {**running.worker.fingerprint, "model": "another"}
    await running.worker.noticed()
    assert (await replay(running, answer)).outcome == outcome


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
    running.worker.token_seconds = 0.002
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


async def test_an_answer_that_a_ceiling_clipped_is_replayed_to_its_end(running: Running) -> None:
    running.worker.faults.length_ceiling = 60
    answer = await generate(running)
    running.worker.faults.length_ceiling = None
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.tokens_compared, verdict.rounds_compared) == ("MATCH", 60, 3)


@pytest.mark.parametrize("recorded_end", [None, 90])
async def test_a_replay_that_a_ceiling_clips_says_so(
    running: Running, recorded_end: int | None
) -> None:
    running.worker.faults.end_after_tokens = recorded_end
    answer = await generate(running)
    running.worker.faults.end_after_tokens = None
    running.worker.faults.length_ceiling = 60
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.first_differing_token) == ("INCOMPARABLE", None)
    assert (verdict.tokens_compared, verdict.rounds_compared) == (60, 3)
    ended = "stop after 90 tokens" if recorded_end else "length after 100 tokens"
    assert [dataclasses.astuple(d) for d in verdict.differences] == [
        ("finish_reason", ended, "length after 60 tokens")
    ]
    running.worker.faults.other_token_at = 41
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.first_differing_token) == ("DIVERGED", 41)
    running.worker.faults.other_token_at = None
    running.worker.faults.other_digest_at_round = 2
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.first_differing_round) == ("DIVERGED", 2)


async def test_equal_tokens_that_end_otherwise_diverge(running: Running) -> None:
    """As with another tokenizer, or other settings of the generation."""
    answer = await generate(running)
    running.worker.faults.end_after_tokens = 100
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.tokens_compared) == ("DIVERGED", 100)
    assert [dataclasses.astuple(d) for d in verdict.differences] == [
        ("finish_reason", "length after 100 tokens", "stop after 100 tokens")
    ]
    running.worker.faults.end_after_tokens = None
    running.worker.padding = 2
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.first_differing_token) == ("DIVERGED", None)
    (difference,) = verdict.differences
    place = answer.text.index(" ")
    assert difference.key == "text"
    assert difference.recorded == f"{answer.text[place : place + 32]!r} from character {place}"
    assert difference.current is not None and difference.current.startswith("'xx w")


async def test_an_answer_that_a_stop_string_ended_matches(running: Running) -> None:
    whole = await running.client.generate_once("tell me", max_new_tokens=20, seed=3)
    stop = whole.text.split()[7]
    answer = await running.client.generate_once("tell me", max_new_tokens=20, seed=3, stop=[stop])
    assert answer.result.finish_reason == "stop" and len(answer.token_ids) == 8
    assert (await replay(running, answer)).outcome == "MATCH"


async def test_what_was_not_deterministic_is_incomparable_on_the_same_worker_too(
    running: Running,
) -> None:
    running.worker.fingerprint["deterministic"] = "false"
    await running.worker.noticed()
    answer = await generate(running)
    verdict = await replay(running, answer)
    assert verdict.outcome == "INCOMPARABLE"
    assert [dataclasses.astuple(d) for d in verdict.differences] == [
        ("deterministic", "false", "false")
    ]
    running.worker.fingerprint["deterministic"] = "true"
    (difference,) = (await replay(running, answer)).differences
    assert dataclasses.astuple(difference) == ("deterministic", "false", "true")
    assert len(running.worker.bodies) == 1


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


async def test_a_replay_that_its_worker_gives_up_has_no_verdict(running: Running) -> None:
    answer = await generate(running)
    running.worker.faults.abort_after_tokens = 3
    with pytest.raises(VaseError, match="the worker gave the request up: out of luck"):
        await replay(running, answer)


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


async def forged(running: Running, answer: Completion, **changes: Any) -> str:
    """The id of a copy of the answer's record with fields changed, stored beside it."""
    store = running.gateway._store
    stored = await store.get("alice", answer.request_id)
    assert stored is not None
    copy = dataclasses.replace(stored.record, record_id=uuid.uuid4().hex)
    for name, value in changes.items():
        old = getattr(copy, name)
        value = {**old, **value} if isinstance(value, dict) else value
        copy = dataclasses.replace(copy, **{name: value})
    await store.append(copy)
    return copy.record_id


@pytest.mark.parametrize(
    ("changes", "token", "round_"),
    [
        ({"sampling": {"sampling_seed": 12345}}, 0, None),
        ({"eviction": {"seed": 12345}}, None, 1),
        ({"eviction": {"policy": "full"}}, None, 1),
        ({"eviction": {"budget": 16, "window": 8}}, None, 1),
        ({"eviction": {"policy": "random"}}, None, 1),
    ],
)
async def test_a_record_with_changed_parameters_diverges_there(
    running: Running, changes: dict[str, Any], token: int | None, round_: int | None
) -> None:
    """What was recorded beside the output is what runs, so a false record cannot match."""
    answer = await generate(running)
    record_id = await forged(running, answer, **changes)
    verdict = await running.client.replay(record_id).verdict()
    assert verdict.outcome == "DIVERGED"
    assert (verdict.first_differing_token, verdict.first_differing_round) == (token, round_)


async def test_seeds_that_the_replay_does_not_take_are_not_verified(running: Running) -> None:
    """Another seed's answer under the seeds of an honest one: what runs matches."""
    honest = await generate(running)
    stored = await running.gateway._store.get("alice", honest.request_id)
    assert stored is not None
    picked = await running.client.generate_once("tell me", **{**OPTIONS, "seed": 4})
    record_id = await forged(running, picked, seeds=stored.record.seeds)
    verdict = await running.client.replay(record_id).verdict()
    assert (verdict.outcome, verdict.seed_check) == ("MATCH", "MISMATCH")


async def test_seeds_are_derived_again(running: Running) -> None:
    answer = await generate(running)
    assert (await replay(running, answer)).seed_check == "VERIFIED"
    without_seed = await running.client.generate_once("tell me", max_new_tokens=2)
    assert (await replay(running, without_seed)).seed_check == "VERIFIED"
    stored = await running.gateway._store.get("alice", answer.request_id)
    assert stored is not None
    seeds = stored.record.seeds
    for changed, expected in (
        (dataclasses.replace(seeds, eviction=5), "MISMATCH"),
        (dataclasses.replace(seeds, request_seed=4), "MISMATCH"),
        (dataclasses.replace(seeds, master_version=9), "VERSION_REMOVED"),
    ):
        record_id = await forged(running, answer, seeds=changed)
        verdict = await running.client.replay(record_id).verdict()
        assert (verdict.outcome, verdict.seed_check) == ("MATCH", expected)


async def test_a_hashed_record_says_that_it_cannot_be_replayed(running: Running) -> None:
    key = running.add_tenant("bob", roles=["generate", "replay"], retention="hash")
    async with AsyncClient(running.target, key) as bob:
        answer = await bob.generate_once("tell me", **OPTIONS)
        record = await bob.get_record(answer.request_id)
        with pytest.raises(InvalidRequest, match="retention `hash`, so only digests"):
            await bob.replay(answer.request_id).verdict()
    # The client got all of it, the store keeps none of it.
    assert len(answer.token_ids) == 100 and answer.text
    assert (record.output_token_ids, record.text, record.prompt_token_ids) == ((), "", ())
    assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (2, 100)
    assert record.digests is not None and record.round_digests == answer.result.round_digests


async def test_a_rotated_master_secret_does_not_touch_replays(running: Running) -> None:
    answer = await generate(running)
    set_secrets(running, lambda secrets: (*secrets, tenants.new_master_secret(2)))
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.seed_check) == ("MATCH", "VERIFIED")
    again = await generate(running)
    assert again.result.seeds.master_version == 2 and again.token_ids != answer.token_ids
    set_secrets(running, lambda secrets: secrets[1:])
    verdict = await replay(running, answer)
    assert (verdict.outcome, verdict.seed_check) == ("MATCH", "VERSION_REMOVED")
    assert (await replay(running, again)).seed_check == "VERIFIED"


def set_secrets(running: Running, change: Any) -> None:
    (alice,) = tenants.load(running.tenants_file).tenants
    alice = alice.model_copy(update={"master_secrets": change(alice.master_secrets)})
    tenants.save(running.tenants_file, tenants.TenantFile(tenants=(alice,)))
