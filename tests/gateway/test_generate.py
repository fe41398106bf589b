"""Generate: what streams, what is recorded, what the worker is asked for."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.audit_records import numbered
from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import FINGERPRINT, ScriptedWorker, token_of
from vase_sgl.client import NEVER, AsyncClient, Capacity, InvalidRequest, Message, channels
from vase_sgl.eviction import POLICIES
from vase_sgl.rpc.v1 import gateway_pb2 as pb


async def test_a_stream_brings_text_tokens_statistics_and_result(running: Running) -> None:
    running.worker.token_seconds = 0.002
    stream = running.client.generate("tell me", max_new_tokens=100, budget=32, window=8, seed=5)
    chunks = [chunk async for chunk in stream]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    result = stream.result

    assert len(chunks) > 50 and len(tokens) == 100
    assert "".join(chunk.text for chunk in chunks) == "".join(f"w{token} " for token in tokens)
    last = chunks[-1].cache
    assert last is not None
    assert last.logical_length == 102 and last.physical_length < 40 and last.reserved_slots == 40
    # The first round at 40 tokens, then one every 8: (102 - 40) // 8 + 1.
    assert last.rounds == 8 and last.evicted_tokens == last.logical_length - last.physical_length
    assert result.cache == last
    assert len(result.round_digests) == 8 and result.round_digests[-1] == last.digest
    assert result.finish_reason == "length"
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (2, 100)
    assert result.full_kv_slots == 102
    timings = result.timings
    assert timings.ttft_seconds is not None
    assert 0 < timings.queue_seconds <= timings.ttft_seconds <= timings.total_seconds


async def test_the_worker_gets_token_ids_and_explicit_parameters(running: Running) -> None:
    stream = running.client.generate(
        "tell me",
        max_new_tokens=2,
        budget=32,
        window=8,
        num_sinks=0,
        seed=5,
        temperature=0,
        stop=["zz"],
    )
    _ = [chunk async for chunk in stream]
    (body,) = running.worker.bodies
    assert body["rid"] == stream.request_id and len(body["rid"]) == 32
    assert body["input_ids"] == [token_of("tell"), token_of("me")] and "text" not in body
    sampling = body["sampling_params"]
    seeds = stream.result.seeds
    assert sampling == {
        "max_new_tokens": 2,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop": ["zz"],
        "stop_token_ids": [],
        "ignore_eos": False,
        "sampling_seed": seeds.sampling,
        "custom_params": {
            "vase": {
                "budget": 32,
                "window": 8,
                "policy": "vase-attnv",
                "prompt": "evict",
                "seed": seeds.eviction,
                "num_sinks": 0,
                "protected_share": 0.25,
                "pool_width": 5,
            }
        },
    }


async def test_policy_fields_and_prompt_mode_reach_worker_and_record(running: Running) -> None:
    answer = await running.client.generate_once(
        "tell me",
        max_new_tokens=2,
        budget=32,
        window=8,
        policy="rkv",
        prompt_mode="keep",
        mix_lambda=0.5,
    )
    (body,) = running.worker.bodies
    vase = body["sampling_params"]["custom_params"]["vase"]
    assert vase == {
        "budget": 32,
        "window": 8,
        "policy": "rkv",
        "prompt": "keep",
        "seed": vase["seed"],
        "num_sinks": 0,
        "pool_width": 5,
        "mix_lambda": 0.5,
    }
    eviction = (await running.client.get_record(answer.request_id)).eviction
    assert eviction is not None
    assert (eviction.policy, eviction.prompt_mode, eviction.mix_lambda) == ("rkv", "keep", 0.5)
    assert eviction.projection_dim is None


async def test_without_eviction_nothing_is_said_about_it(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=3)
    assert "custom_params" not in running.worker.bodies[0]["sampling_params"]
    assert answer.result.cache is None and answer.result.round_digests == ()
    record = await running.client.get_record(answer.request_id)
    assert record.eviction is None and record.cache is None


async def test_a_chat_and_token_ids_are_prompts_too(running: Running) -> None:
    chat = [Message(role="user", content="tell me")]
    first = await running.client.generate_once(chat, max_new_tokens=3, seed=1)
    ids = [token_of("user"), token_of("tell"), token_of("me")]
    second = await running.client.generate_once(ids, max_new_tokens=3, seed=1)
    assert running.worker.bodies[0]["input_ids"] == running.worker.bodies[1]["input_ids"] == ids
    assert first.token_ids == second.token_ids
    kinds = [(await running.client.get_record(a.request_id)).input_kind for a in (first, second)]
    assert kinds == ["chat", "token_ids"]


@pytest.mark.parametrize(("last", "field"), [("user", False), ("assistant", True)])
async def test_a_chat_is_rendered_by_every_kind_of_template(
    running: Running, last: str, field: bool
) -> None:
    """SGLang takes the field for Jinja's alone; without it an assistant's last becomes a user's."""
    chat = [Message(role="user", content="tell"), Message(role=last, content="me")]
    await running.client.generate_once(chat, max_new_tokens=1)
    assert ("add_generation_prompt" in running.worker.last_tokenized) == field


async def test_generate_once_equals_the_stream_of_the_same_seed(running: Running) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "budget": 32, "window": 8, "seed": 9}
    stream = running.client.generate("tell me", **options)
    tokens = tuple([token async for chunk in stream for token in chunk.token_ids])
    once = await running.client.generate_once("tell me", **options)
    other = await running.client.generate_once("tell me", **{**options, "seed": 10})
    assert once.token_ids == tokens
    assert once.result.round_digests == stream.result.round_digests
    assert other.token_ids != tokens
    assert other.result.round_digests != stream.result.round_digests


async def test_the_record_is_there_when_the_result_is(running: Running) -> None:
    stream = running.client.generate(
        "tell me", max_new_tokens=60, budget=32, window=8, policy="vase-dkv", projection_dim=10
    )
    chunks = [chunk async for chunk in stream]
    record = await running.client.get_record(stream.request_id)
    result = stream.result
    assert record.status == "completed" and record.failure == ""
    assert record.prompt_token_ids == (token_of("tell"), token_of("me"))
    assert record.output_token_ids == tuple(t for chunk in chunks for t in chunk.token_ids)
    assert record.text == "".join(chunk.text for chunk in chunks)
    assert record.seeds == result.seeds and record.cache == result.cache
    assert record.round_digests == result.round_digests and record.timings == result.timings
    assert record.fingerprint == running.worker.fingerprint
    assert record.max_new_tokens == 60 and record.sampling["temperature"] == 1.0
    assert record.eviction is not None
    assert (record.eviction.policy, record.eviction.projection_dim) == ("vase-dkv", 10)
    assert record.eviction.protected_share is None
    assert record.sequence == 1 and record.previous_hash == "0" * 64


async def test_a_stop_string_never_reaches_the_client(running: Running) -> None:
    free = await running.client.generate_once("tell me", max_new_tokens=10, seed=1)
    stop = free.text[free.text.index(" ", 20) - 2 : free.text.index(" ", 20) + 4]
    stream = running.client.generate("tell me", max_new_tokens=10, seed=1, stop=[stop])
    text = "".join([chunk.text async for chunk in stream])
    assert text == free.text[: free.text.index(stop)]
    assert stream.result.finish_reason == "stop"
    assert (await running.client.get_record(stream.request_id)).text == text


async def test_the_workers_own_default_budget_is_made_explicit(running: Running) -> None:
    running.worker.default_eviction = {"budget": 32, "window": 8, "policy": "random"}
    await running.worker.noticed()
    answer = await running.client.generate_once("tell me", max_new_tokens=60)
    assert answer.result.cache is not None and answer.result.cache.rounds > 0
    record = await running.client.get_record(answer.request_id)
    assert record.eviction is not None and record.eviction.policy == "random"


async def test_the_gateways_default_budget_goes_before_the_workers(tmp_path: Path) -> None:
    default = {"budget": 24, "window": 8, "policy": "streaming"}
    async with run_gateway(tmp_path, default_eviction=default) as running:
        running.worker.default_eviction = {"budget": 32, "window": 8, "policy": "random"}
        await running.worker.noticed()
        await running.client.generate_once("tell me", max_new_tokens=2)
        await running.client.generate_once("tell me", max_new_tokens=2, budget=16, window=8)
        sent = [b["sampling_params"]["custom_params"]["vase"] for b in running.worker.bodies]
        assert default.items() <= sent[0].items() and sent[1]["budget"] == 16


async def test_many_requests_at_once_are_all_recorded_in_one_chain(running: Running) -> None:
    prompts = [f"tell me {n}" for n in range(24)]
    answers = await asyncio.gather(
        *(running.client.generate_once(p, max_new_tokens=20, budget=16, window=8) for p in prompts)
    )
    summaries = [s async for s in running.client.list_records(page_size=7)]
    assert {s.record_id for s in summaries} == {a.request_id for a in answers}
    records = [await running.client.get_record(s.record_id) for s in summaries]
    assert [r.sequence for r in records] == list(range(24, 0, -1))


async def test_records_of_a_time_are_listed_by_arrival(running: Running) -> None:
    """They are stored by their ends. Several may arrive in one microsecond."""
    for number, arrival in enumerate((1, 4, 2, 2, 2, 3), start=1):
        await running.gateway._store.append(numbered(number, created_unix_micros=arrival))
    stub, metadata = running.client._stub, channels.metadata(running.key)

    async def pages(first_token: str, **period: int) -> list[list[int]]:
        request = pb.ListRecordsRequest(page_size=2, page_token=first_token, **period)
        found = []
        while True:
            page = await stub.ListRecords(request, metadata=metadata)
            found.append([int(record.record_id, 16) for record in page.records])
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    assert await pages("", since_unix_micros=2) == [[2, 6], [5, 4], [3]]
    assert await pages("", until_unix_micros=4) == [[6, 5], [4, 3], [1]]
    assert await pages("") == [[6, 5], [4, 3], [2, 1]]
    # Begun at a gateway of a version that listed by sequence.
    assert await pages("5", since_unix_micros=2) == [[4, 3], [2]]


async def test_capacity_says_how_many_requests_fit(running: Running) -> None:
    capacity = await running.client.capacity(budget=128, window=32, prompt_tokens=200)
    assert capacity.available_slots == 9_000 and capacity.total_slots == 10_000
    # 200 + 32 up to the first round, which copies 128 + 32 of a prompt that is shared.
    assert capacity.slots_per_request == 392 and capacity.requests_that_fit == 9_000 // 392
    assert capacity.max_budget == 4096 and "vase-attnv" in capacity.policies
    assert capacity.query_ring_slots == 24 and capacity.max_prompt_tokens == 8192 - 7
    assert (await running.client.capacity()).requests_that_fit is None
    for alone in ({"window": 32}, {"prompt_tokens": 5}, {"prompt_mode": "keep"}):
        with pytest.raises(InvalidRequest, match="says nothing without a budget"):
            await running.client.capacity(**alone)
    kept = await running.client.capacity(
        budget=128, window=32, prompt_tokens=200, prompt_mode="keep"
    )
    assert kept.slots_per_request == 360 and kept.requests_that_fit == 9_000 // 360
    small = await running.client.capacity(budget=16, window=8)
    assert small.slots_per_request == 24 and small.requests_that_fit == 64  # as many as it runs
    running.worker.max_query_requests = 20
    await running.worker.noticed()
    assert (await running.client.capacity(budget=16, window=8)).requests_that_fit == 20
    running.worker.prefix_cache = False
    await running.worker.noticed()
    alone = await running.client.capacity(budget=128, window=32, prompt_tokens=200)
    assert alone.slots_per_request == 232


async def test_capacity_is_of_all_workers_under_the_tenants_ceilings(tmp_path: Path) -> None:
    """Sums of what there is, the least of what each worker takes."""
    async with ScriptedWorker() as first, ScriptedWorker() as second:
        second.total_slots, second.available_slots, second.reserved_slots = 5_000, 3_000, 2_500
        second.max_budget, second.max_window, second.context_length = 2048, 32, 4096
        second.rounds, second.evicted_tokens = 5, 100
        second.query_ring_slots, second.prefix_cache = 40.0, False
        second.running |= {"a", "b"}
        workers = {"urls": [first.url, second.url], "health_interval_seconds": 60}
        async with run_gateway(tmp_path, worker=workers) as running:
            await until(lambda: len(running.gateway._router.ready()) == 2)
            found = await running.client.capacity(budget=128, window=32, prompt_tokens=200)
            everything = Capacity(
                total_slots=15_000,
                available_slots=12_000,
                reserved_slots=3_500,
                running_requests=2,
                rounds=12,
                evicted_tokens=324,
                context_length=4096,
                max_budget=2048,
                max_window=32,
                max_new_tokens=4096,
                max_prompt_tokens=4096 - 7,
                policies=tuple(POLICIES),
                fingerprint=FINGERPRINT,
                # 232 up to the first round, and 160 for its copy where the prompt is shared.
                slots_per_request=392,
                requests_that_fit=9_000 // 392 + 2_500 // 232,
                query_ring_slots=40.0,
            )
            assert found == everything
            ceilings = {
                "max_budget": 64,
                "max_new_tokens": 65,
                "max_prompt_tokens": 66,
                "policies": ("knorm",),
            }
            key = running.add_tenant("bob", limits=ceilings)
            async with AsyncClient(running.target, key, retry=NEVER) as bob:
                of_bob = dataclasses.replace(
                    everything, slots_per_request=None, requests_that_fit=None, **ceilings
                )
                assert await bob.capacity() == of_bob


async def test_two_clients_of_one_tenant_see_the_same_records(running: Running) -> None:
    answer = await running.client.generate_once("tell me", max_new_tokens=2)
    async with AsyncClient(running.target, running.key, retry=NEVER) as second:
        assert (await second.get_record(answer.request_id)).text == answer.text


async def test_an_answer_leaves_nothing_for_the_event_loop_to_close(running: Running) -> None:
    """A generator that nobody closes costs a task of its own, some time later."""
    left: list[str] = []
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=lambda generator: left.append(generator.__qualname__))
    try:
        await running.client.generate_once("tell me", max_new_tokens=5)
    finally:
        sys.set_asyncgen_hooks(*hooks)
    assert left == []
