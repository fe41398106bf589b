"""Every bad input has its own text that names field and cure, and the gateway lives on."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tests.gateway.running import Running
from tests.gateway.scripted_worker import VOCAB
from vase_sgl.client import NEVER, AsyncClient, InvalidRequest, NotFound, channels
from vase_sgl.rpc.v1 import gateway_pb2 as pb

EVICT = {"budget": 64, "window": 16}

CASES: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "text: the prompt is empty; send at least one character"),
    ("  ", {}, "input: the prompt has no tokens; send a longer one"),
    ([], {}, "token_ids: the prompt is empty; send at least one token id"),
    ([1, -2], {}, "token_ids: a token id is negative; ids start at 0"),
    ([VOCAB], {}, f"token_ids: {VOCAB} is no token of this model; ids end at {VOCAB - 1}"),
    ([{"role": "", "content": "x"}], {}, "chat.messages[0].role: must be system, user or assist"),
    ([{"role": "developer", "content": "x"}], {}, "chat.messages[0].role: must be system, user or"),
    ([{"role": "", "content": ""}] * 8193, {}, "chat.messages: 8193 messages and parts of mess"),
    ("a" * (128 * 8192 + 1), {}, "input: the prompt has 1048577 bytes, more than 8192 tokens, the"),
    ("unrenderable", {}, "the worker refused the request: the template refuses this"),
    ("a", {"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
    ("a", {"max_new_tokens": -1}, "max_new_tokens: must be at least 1, got -1"),
    ("a", {"max_new_tokens": 8192}, "exceed the model's context length of 8192 tokens; ask for at"),
    ("a " * 8186, {"max_new_tokens": 1}, "leaves no room for an answer in the model's context"),
    (
        "a",
        {"max_new_tokens": 10**6},
        "max_new_tokens: 1000000 is above the ceiling of tenant alice",
    ),
    ("a", {"temperature": -0.1}, "sampling.temperature: must be from 0 to 100, got -0.1"),
    ("a", {"temperature": float("nan")}, "sampling.temperature: must be a finite number, got nan"),
    ("a", {"temperature": float("inf")}, "sampling.temperature: must be a finite number, got inf"),
    ("a", {"top_p": 0.0}, "sampling.top_p: must be above 0 and at most 1, got 0"),
    ("a", {"top_k": 0}, "sampling.top_k: must be -1 (all) or at least 1, got 0"),
    ("a", {"min_p": 1.5}, "sampling.min_p: must be from 0 to 1, got 1.5"),
    ("a", {"repetition_penalty": 0.009}, "sampling.repetition_penalty: must be from 0.01 to 2,"),
    ("a", {"frequency_penalty": 3.0}, "sampling.frequency_penalty: must be from -2 to 2, got 3"),
    ("a", {"presence_penalty": -3.0}, "sampling.presence_penalty: must be from -2 to 2, got -3"),
    ("a", {"stop": [""]}, "sampling.stop: send at most 16 strings, none of them empty"),
    ("a", {"stop": ["x"] * 17}, "sampling.stop: send at most 16 strings"),
    ("a", {"stop": ["語" * 257]}, "sampling.stop: a string may have 256 characters at most"),
    ("a", {"stop_token_ids": [-1]}, "sampling.stop_token_ids: send at most 64 ids, none of them"),
    (
        "a",
        {"stop_token_ids": [7], "ignore_eos": True},
        "sampling.stop_token_ids: workers that are told ignore_eos look at none of them; leave one",
    ),
    ("a", {"seed": -1}, "seed: must be from 0 to 2^63 - 1, got -1"),
    ("a", {"sample_index": -1}, "sample_index: must not be negative, got -1"),
    ("a", {**EVICT, "policy": "lru"}, "eviction: unknown policy 'lru'; choose one of vase-attnv"),
    ("a", {"window": 16}, "eviction: vase.budget is missing"),
    ("a", {"budget": 16, "window": 16}, "eviction: budget 16 must be greater than window 16"),
    ("a", {"budget": 0, "window": 16}, "eviction: budget must be an integer from 1 to 4096, got 0"),
    ("a", {"budget": 4097}, "eviction.budget: 4097 is above the ceiling of this server, 4096"),
    ("a", {"budget": 999, "window": 65}, "eviction: window must be an integer from 1 to 64"),
    ("a", {**EVICT, "num_sinks": 60}, "eviction: num_sinks 60 does not fit"),
    ("a", {**EVICT, "pool_width": 4}, "eviction: pool_width must be odd, got 4"),
    (
        "a",
        {**EVICT, "policy": "random", "pool_width": 3},
        "eviction: unknown key pool_width in vase; policy random takes",
    ),
    (
        "a",
        {**EVICT, "policy": "rkv", "mix_lambda": 1.5},
        "eviction: mix_lambda must be a number from 0 to 1, got 1.5",
    ),
]


async def test_every_bad_request_is_told_its_field_and_cure(running: Running) -> None:
    for prompt, options, text in CASES:
        with pytest.raises(InvalidRequest) as error:
            await running.client.generate_once(prompt, **{"max_new_tokens": 5, **options})
        assert text in str(error.value), (prompt, options)
        assert error.value.code == "INVALID_ARGUMENT"
    # Nothing reached the worker, nothing was recorded, and the gateway still serves.
    assert running.worker.bodies == []
    assert [r async for r in running.client.list_records()] == []
    running.worker.faults.end_after_tokens = 2
    await running.client.generate_once("a", max_new_tokens=8191)  # which fills the context


async def test_min_p_is_refused_where_the_workers_cannot_do_it(running: Running) -> None:
    """Their own 400 would come after the request has waited for one of them."""

    async def answers_with_min_p() -> bool:
        try:
            await running.client.generate_once("a", max_new_tokens=2, min_p=0.1)
        except InvalidRequest as error:
            assert "sampling.min_p: cannot be used with workers that run on a" in str(error)
            return False
        return True

    assert await answers_with_min_p()
    for flag, expected in (("True", False), ("False", True)):
        running.worker.fingerprint["enable_deterministic_inference"] = flag
        async with asyncio.timeout(10):
            while await answers_with_min_p() != expected:  # until the gateway has asked it again
                await asyncio.sleep(0.02)
        await running.client.generate_once("a", max_new_tokens=2, min_p=0.0)


async def test_a_stream_fails_with_the_same_text(running: Running) -> None:
    with pytest.raises(InvalidRequest, match="max_new_tokens: must be at least 1"):
        _ = [chunk async for chunk in running.client.generate("a", max_new_tokens=0)]


async def test_what_only_a_raw_message_can_get_wrong(running: Running) -> None:
    stub, metadata = running.client._stub, channels.metadata(running.key)
    cases = [
        (pb.GenerateRequest(max_new_tokens=1), "input: no prompt; set one of"),
        (
            pb.GenerateRequest(max_new_tokens=1, chat=pb.Conversation()),
            "chat: the conversation is empty",
        ),
        (
            pb.GenerateRequest(
                max_new_tokens=1,
                text="a",
                eviction=pb.EvictionParams(budget=99, prompt_mode=7),  # type: ignore[arg-type]
            ),
            "eviction.prompt_mode: unknown mode 7; use PROMPT_MODE_EVICT or PROMPT_MODE_KEEP",
        ),
    ]
    for request, text in cases:
        with pytest.raises(Exception, match=text):
            await stub.GenerateOnce(pb.GenerateOnceRequest(request=request), metadata=metadata)


#: Field 100 of any message, with the value 1.
UNKNOWN = b"\xa0\x06\x01"


def with_unknown(message: Any) -> Any:
    """The same message as a newer client may send it."""
    return type(message).FromString(message.SerializeToString() + UNKNOWN)


@pytest.mark.parametrize(
    ("method", "request_", "text"),
    [
        ("Generate", with_unknown(pb.GenerateRequest(text="a")), "the request: .* known are text,"),
        (
            "GenerateOnce",
            pb.GenerateOnceRequest(request=with_unknown(pb.GenerateRequest(text="a"))),
            "request: it has a field",
        ),
        (
            "Generate",
            pb.GenerateRequest(text="a", eviction=with_unknown(pb.EvictionParams(budget=99))),
            "eviction: it has a field .* known are budget, window, policy, .*mix_lambda. Leave the",
        ),
        (
            "Generate",
            pb.GenerateRequest(text="a", sampling=with_unknown(pb.SamplingParams())),
            "sampling: it has a field that this gateway, of vase_sgl .*, does not know; known are",
        ),
        ("Generate", pb.GenerateRequest(token_ids=with_unknown(pb.TokenIds(ids=[1]))), "token_ids"),
        (
            "Generate",
            pb.GenerateRequest(chat=pb.Conversation(messages=[with_unknown(pb.ChatMessage())])),
            r"chat: it has a field .* known are messages \(role, content\). Leave",
        ),
        ("Replay", with_unknown(pb.ReplayRequest()), "known are record_id"),
        ("GetRecord", with_unknown(pb.GetRecordRequest()), "known are record_id"),
        ("ListRecords", with_unknown(pb.ListRecordsRequest()), "known are .*since_unix_micros"),
        ("GetCapacity", with_unknown(pb.GetCapacityRequest()), "known are .*prompt_tokens"),
    ],
)
async def test_a_field_of_a_newer_client_is_not_set_aside(
    running: Running, method: str, request_: Any, text: str
) -> None:
    call = getattr(running.client._stub, method)(request_, metadata=channels.metadata(running.key))
    with pytest.raises(grpc.aio.AioRpcError, match=text) as error:
        if method in ("Generate", "Replay"):
            await call.read()
        else:
            await call
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert running.worker.bodies == []
    assert [r async for r in running.client.list_records()] == []


async def test_pages_and_capacity_check_their_fields(running: Running) -> None:
    with pytest.raises(InvalidRequest, match="page_size: must be from 1 to 1000"):
        _ = [r async for r in running.client.list_records(page_size=1001)]
    stub, metadata = running.client._stub, channels.metadata(running.key)
    for token in ("x", "-", "-1", "1-", "1-2-3", "\u0661", "1" * 19, "1-2\n"):
        with pytest.raises(Exception, match=r"page_token: '.*' is not one"):
            await stub.ListRecords(pb.ListRecordsRequest(page_token=token), metadata=metadata)
    with pytest.raises(InvalidRequest, match="budget: must be greater than window 64, got 10"):
        await running.client.capacity(budget=10)
    with pytest.raises(InvalidRequest, match="prompt_tokens: must not be negative, got -1"):
        await running.client.capacity(budget=100, prompt_tokens=-1)
    with pytest.raises(InvalidRequest, match="unknown prompt_mode 'drop'"):
        await running.client.capacity(budget=100, prompt_mode="drop")  # type: ignore[arg-type]
    question = pb.GetCapacityRequest(budget=100, prompt_mode=9)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="prompt_mode: unknown mode 9; use PROMPT_MODE_EVICT"):
        await stub.GetCapacity(question, metadata=metadata)


@pytest.mark.parametrize("letter", ["x", "\n", "語"])
async def test_what_is_quoted_does_not_hide_the_error(running: Running, letter: str) -> None:
    """Clients take 8 KiB of metadata, in which a text is up to three times as long."""
    with pytest.raises(NotFound, match=r"^there is no record '.* …$"):
        await running.client.get_record(letter * 100_000)


async def test_a_prompt_too_long_for_its_tenant_is_not_tokenized(running: Running) -> None:
    """It would take a worker long, for nothing that the tenant is charged for."""
    key = running.add_tenant("bob", limits={"max_prompt_tokens": 3})
    text = (
        "input: the prompt has 385 bytes, more than 3 tokens, the ceiling of tenant bob, can have"
    )
    async with AsyncClient(running.target, key, retry=NEVER) as bob:
        for prompt in ("語" * 128 + "x", [{"role": "user", "content": "x" * 190 + "y"}, SYSTEM]):
            with pytest.raises(InvalidRequest, match=text):
                await bob.generate_once(prompt, max_new_tokens=1)  # type: ignore[arg-type]
        assert running.worker.tokenized == 0
        await bob.generate_once("x" * 384, max_new_tokens=1)


SYSTEM = {"role": "system", "content": "x" * 184}


@pytest.mark.parametrize(
    ("tokens", "options", "text"),
    [
        # Of 500 slots; SGLang wants 7 beside a prompt, the engine two beside a budget's.
        (494, {}, "of 494 tokens the request needs 1 KV slots more than a worker has; shorten it"),
        (9, {"budget": 470, "window": 20}, "needs 1 KV slots more .*; shorten it or lower the bud"),
    ],
)
async def test_what_no_worker_could_ever_run_is_refused_at_once(
    running: Running, tokens: int, options: dict[str, int], text: str
) -> None:
    """Otherwise it would wait, and have a worker emptied that then refuses it."""
    running.worker.total_slots = 500
    await running.worker.noticed()
    assert (await running.client.capacity()).max_prompt_tokens == 493
    with pytest.raises(InvalidRequest, match=f"^input: with this prompt .*{text}"):
        await running.client.generate_once([1] * tokens, max_new_tokens=1000, **options)  # type: ignore[arg-type]
    assert not running.worker.bodies
    await running.client.generate_once([1] * (tokens - 1), max_new_tokens=1000, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stranger", [False, True])
async def test_a_message_larger_than_anybody_needs_is_not_parsed(
    running: Running, stranger: bool
) -> None:
    """A parser would hold up all other calls."""
    key = running.add_tenant("bob", limits={"max_prompt_tokens": 100})
    path = "/grpc.health.v1.Health/Check" if stranger else "/vase.v1.VaseGateway/Generate"
    text = "65536 bytes; shorten" if stranger else "78336 bytes, enough for tenant bob's 100 prompt"
    async with grpc.aio.insecure_channel(running.target) as channel:
        call = channel.unary_unary(path)
        with pytest.raises(grpc.aio.AioRpcError, match=text) as error:
            await call(b"\xff" * 78337, metadata=() if stranger else channels.metadata(key))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_above_the_size_limit_is_refused(running: Running) -> None:
    with pytest.raises(InvalidRequest, match=r"[Mm]essage larger than max"):
        await running.client.generate_once("a" * (17 * 2**20), max_new_tokens=1)
    await running.client.generate_once("a", max_new_tokens=2)
