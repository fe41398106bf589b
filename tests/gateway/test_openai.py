"""The OpenAI-compatible door, used with OpenAI's own client over a real socket."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import ValidationError

from tests.gateway.running import Running, run_gateway, until
from tests.gateway.scripted_worker import VOCAB
from tests.gateway.test_abort import record_of
from tests.gateway.test_transport import certificate
from vase_sgl.client import NEVER, AsyncClient, RateLimited, Tls
from vase_sgl.gateway.errors import InvalidRequest, WorkerUnavailable
from vase_sgl.gateway.openai import requests
from vase_sgl.gateway.openai.requests import chat_call, completion_call

CHAT: Any = [{"role": "user", "content": "tell me"}]
TEXT_PART = {"type": "text", "text": "tell me"}
VASE = {"vase": {"budget": 32, "window": 8, "policy": "random"}}


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Running]:
    async with run_gateway(tmp_path, http={"port": 0}) as running:
        yield running


def client(door: Running, key: str | None = None) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"{door.http_url}/v1",
        api_key=key or door.key,
        max_retries=0,
        timeout=20,
        http_client=DefaultAsyncHttpxClient(verify=False),  # it would load every authority
    )


async def test_prompt_mode_keep_reaches_the_worker(door: Running) -> None:
    vase = {"vase": {**VASE["vase"], "prompt": "keep"}}
    async with client(door) as api:
        answer = await api.completions.create(
            model="scripted", prompt="tell me", max_tokens=5, extra_body=vase
        )
    assert door.worker.bodies[0]["sampling_params"]["custom_params"]["vase"]["prompt"] == "keep"
    record = await door.client.get_record(answer.id.removeprefix("cmpl-"))
    assert record.eviction is not None and record.eviction.prompt_mode == "keep"


def test_the_documented_fields_of_vase_are_taken() -> None:
    """README lists a worker's; the gateway derives the seed from the request's own."""
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = page.split("| field | default | meaning |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` (.*)$", table, re.MULTILINE)
    taken = {name for name, rest in rows if "on a worker alone" not in rest}
    assert len(rows) == 10 and taken == {*requests._VASE_KEYS} - {"inspect"}


async def test_null_in_vase_is_left_out(door: Running) -> None:
    nulls = {"prompt": None, "num_sinks": None, "inspect": None, "unheard_of": None}
    async with client(door) as api:
        for vase in (VASE, {"vase": VASE["vase"] | nulls}):
            await api.completions.create(
                model="scripted", prompt="a", max_tokens=1, seed=1, extra_body=vase
            )
    first, second = (body["sampling_params"]["custom_params"] for body in door.worker.bodies)
    assert first == second


async def test_a_chat_is_recorded_and_replayed_like_any_other(door: Running) -> None:
    async with client(door) as api:
        answer = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_completion_tokens=60, seed=3, extra_body=VASE
        )
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer._request_id == answer.id.removeprefix("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 60)
    assert answer.usage.total_tokens == 63
    record = await door.client.get_record(answer.id.removeprefix("chatcmpl-"))
    assert record.text == choice.message.content and record.input_kind == "chat"
    assert record.eviction is not None and record.eviction.budget == 32
    extra: Any = answer.model_extra
    assert extra["vase"]["request_ids"] == [record.record_id]
    assert record.cache is not None
    assert extra["vase"]["cache"][0]["digest"] == record.cache.digest
    assert (await door.client.replay(record.record_id).verdict()).outcome == "MATCH"
    same = await door.client.generate_once(
        CHAT, max_new_tokens=60, seed=3, budget=32, window=8, policy="random"
    )
    assert same.text == choice.message.content


async def test_a_chat_streams(door: Running) -> None:
    door.worker.token_seconds = 0.005
    async with client(door) as api:
        whole = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_tokens=20, seed=3
        )
        stream = await api.chat.completions.create(
            model="scripted",
            messages=CHAT,
            max_tokens=20,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert len(chunks) > 10
    record = await door.client.get_record(chunks[0].id.removeprefix("chatcmpl-"))
    assert record.status == "completed" and record.text == text


async def test_parts_of_a_message_are_joined_as_sglang_does(door: Running) -> None:
    parts = [{"type": "text", "text": "tell"}, {"type": "text", "text": "me"}]
    messages: Any = [{"role": "user", "content": parts}]
    async with client(door) as api:
        for said in (CHAT, messages):
            await api.chat.completions.create(model="scripted", messages=said, max_tokens=1)
    assert door.worker.bodies[0]["input_ids"] == door.worker.bodies[1]["input_ids"]


async def test_a_developer_is_the_system(door: Running) -> None:
    """To templates that do not know the role, what it says would be lost."""
    async with client(door) as api:
        for role in ("system", "developer"):
            messages: Any = [{"role": role, "content": "be brief"}, *CHAT]
            await api.chat.completions.create(model="scripted", messages=messages, max_tokens=1)
    assert door.worker.bodies[0]["input_ids"] == door.worker.bodies[1]["input_ids"]


async def test_an_event_is_one_line_to_every_client(door: Running) -> None:
    """httpx and others end lines at these characters too."""
    door.worker.opening = "a\u2028b\x85c\u2029d"
    body = {"model": "scripted", "prompt": "a", "max_tokens": 1, "stream": True}
    headers, url = {"Authorization": f"Bearer {door.key}"}, f"{door.http_url}/v1/completions"
    async with (
        httpx.AsyncClient(headers=headers) as http,
        http.stream("POST", url, json=body) as answer,
    ):
        events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text.startswith(door.worker.opening) and events[-1] == "[DONE]"


async def test_completions(door: Running) -> None:
    async with client(door) as api:
        answer = await api.completions.create(model="scripted", prompt="tell me", seed=1)
        assert answer.usage is not None and answer.usage.completion_tokens == 16
        assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
        ids = await api.completions.create(model="scripted", prompt=[1, 2, 3], max_tokens=2)
        assert ids.usage is not None and ids.usage.prompt_tokens == 3
        stream = await api.completions.create(
            model="scripted", prompt=["tell me"], seed=1, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_samples_differ_and_are_replayable_each(door: Running) -> None:
    async with client(door) as api:
        answer = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_tokens=20, seed=3, n=3
        )
        stream = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_tokens=20, seed=3, n=3, stream=True
        )
        streamed = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3 and streamed == texts
    assert answer.usage is not None and answer.usage.completion_tokens == 60
    extra: Any = answer.model_extra
    for index, request_id in enumerate(extra["vase"]["request_ids"]):
        record = await door.client.get_record(request_id)
        assert record.sample_index == index and record.text == texts[index]
        verdict = await door.client.replay(request_id).verdict()
        assert (verdict.outcome, verdict.seed_check) == ("MATCH", "VERIFIED")


async def test_models(door: Running) -> None:
    async with client(door) as api:
        assert [model.id async for model in api.models.list()] == ["scripted"]
        assert (await api.models.retrieve("scripted")).id == "scripted"
        with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here; choose scr"):
            await api.models.retrieve("gpt-9")
        with pytest.raises(openai.NotFoundError):
            await api.chat.completions.create(model="gpt-9", messages=CHAT)
        door.worker.model_name = "Qwen/Qwen3-8B"
        await door.worker.noticed()
        assert [model.id async for model in api.models.list()] == ["Qwen/Qwen3-8B"]
        assert (await api.models.retrieve("Qwen/Qwen3-8B")).id == "Qwen/Qwen3-8B"
        answer = await api.chat.completions.create(
            model="Qwen/Qwen3-8B", messages=CHAT, max_tokens=1
        )
        assert answer.model == "Qwen/Qwen3-8B"


async def test_an_answer_goes_on_as_the_client_holds_it(door: Running) -> None:
    """Written out it has every field that OpenAI's messages may have, most of them null."""
    async with client(door) as api:
        answer = await api.chat.completions.create(model="scripted", messages=CHAT, max_tokens=3)
        message: Any = answer.choices[0].message
        for held in (message, message.model_dump()):
            await api.chat.completions.create(
                model="scripted", messages=[*CHAT, held, *CHAT], max_tokens=1
            )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"logprobs": True}, "logprobs: not supported here; leave it out. Supported are model"),
        ({"tools": []}, "tools: not supported here"),
        ({"user": "me"}, "user: not supported here"),
        ({"n": 17}, "n: Input should be less than or equal to 16"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"max_tokens": 8192}, "max_tokens: prompt (3) and output (8192) exceed the model's"),
        ({"max_completion_tokens": 0}, "max_completion_tokens: must be at least 1, got 0"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens: is the old name"),
        ({"max_tokens": 2**40}, "max_tokens: Input should be less than"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"temperature": 101}, "temperature: must be from 0 to 100, got 101"),
        ({"stop": [""]}, "stop: send at most 16 strings, none of them empty"),
        (
            {"messages": [{"role": "user", "content": "a " * 8192}]},
            "messages: the prompt has 81",
        ),
        ({"seed": -1}, "seed: must be from 0 to 2^63 - 1, got -1"),
        ({"stream_options": {"include_usage": True}}, "stream_options: has a meaning only"),
        ({"extra_body": {"vase": {"bugdet": 1}}}, "vase: bugdet: not known; known are budget, wi"),
        ({"extra_body": {"vase": {"budget": "x"}}}, "vase: "),
        ({"extra_body": {"vase": {"budget": 5, "window": 8}}}, "vase: budget 5 must be greater"),
        (
            {"extra_body": {"vase": {"budget": 4097}}},
            "vase.budget: 4097 is above the ceiling",
        ),
        (
            {"messages": [*CHAT, {"role": "tool", "content": "1"}]},
            "messages[1].role: must be system, user or assistant",
        ),
        ({"messages": []}, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "user", "content": [TEXT_PART, {"type": "image_url"}]}]},
            'messages.0.content: must be a string or a list of {"type": "text", "text": …} parts; '
            "images and audio are not supported",
        ),
        ({"stop": [1]}, "stop: must be a string or a list of strings"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_is_dropped(
    door: Running, options: dict[str, Any], text: str
) -> None:
    async with client(door) as api:
        with pytest.raises(openai.BadRequestError) as error:
            await api.chat.completions.create(**{"model": "scripted", "messages": CHAT, **options})
    body: Any = error.value.body
    assert body["message"].startswith(text) and body["type"] == "invalid_request_error"
    assert body["param"] == (text.split(":")[0] if ":" in text else None)
    assert door.worker.bodies == []


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "prompt: the prompt is empty"),
        (" ", "prompt: the prompt has no tokens"),
        ([VOCAB], f"prompt: {VOCAB} is no token of this model"),
        ([[1, 2, 3]], "prompt: must be a string or a list of token ids; send one prompt"),
        ([-1], "prompt: must be a string or a list of token ids"),
    ],
)
async def test_a_prompt_that_is_wrong_is_called_by_its_name(
    door: Running, prompt: Any, text: str
) -> None:
    async with client(door) as api:
        with pytest.raises(openai.BadRequestError, match=text) as error:
            await api.completions.create(model="scripted", prompt=prompt)
    assert error.value.param == "prompt"


async def test_stop_tokens_that_would_not_stop_are_refused(door: Running) -> None:
    async with client(door) as api:
        for extra, refused in (
            ({"stop_token_ids": [7], "ignore_eos": True}, True),
            ({"stop_token_ids": [7], "ignore_eos": False}, False),
            ({"stop_token_ids": [], "ignore_eos": True}, False),
        ):
            call = api.completions.create(
                model="scripted", prompt="a", max_tokens=1, stop="x", extra_body=extra
            )
            if not refused:
                await call
                continue
            with pytest.raises(openai.BadRequestError, match="told ignore_eos") as error:
                await call
            assert error.value.param == "stop_token_ids"


@pytest.mark.parametrize(
    ("ceiling", "words", "length"), [(512, 1, 512), (2000, 1, 1024), (2000, 7300, 891)]
)
async def test_the_default_length_gives_way(
    door: Running, ceiling: int, words: int, length: int
) -> None:
    """Nobody is refused for what they did not ask for."""
    bob = door.add_tenant("bob", limits={"max_new_tokens": ceiling})
    messages: Any = [{"role": "user", "content": "a " * words}]
    async with client(door, bob) as api:
        answer = await api.chat.completions.create(model="scripted", messages=messages)
        assert answer.usage is not None and answer.usage.completion_tokens == length
        with pytest.raises(openai.BadRequestError) as error:
            await api.chat.completions.create(
                model="scripted", messages=messages, max_completion_tokens=max(length, ceiling) + 1
            )
        assert error.value.param == "max_completion_tokens"
    async with AsyncClient(door.target, bob) as bobs:
        record_id = answer.id.removeprefix("chatcmpl-")
        assert (await bobs.get_record(record_id)).max_new_tokens == length


async def test_the_default_length_of_a_completion_gives_way_too(door: Running) -> None:
    async with client(door) as api:
        answer = await api.completions.create(model="scripted", prompt=[1] * 8185)
        assert answer.usage is not None and answer.usage.completion_tokens == 7
        with pytest.raises(openai.BadRequestError, match="no room for an answer"):
            await api.completions.create(model="scripted", prompt=[1] * 8186)


@pytest.mark.parametrize(
    ("vase", "text"),
    [
        ({"prompt": "forget"}, "vase.prompt: must be evict or keep"),
        ({"prompt": 2}, "vase.prompt: must be evict or keep"),
        ({"prompt": ["keep"]}, "vase.prompt: must be evict or keep"),
        ({"prompt_mode": 2}, "vase: prompt_mode: not known; known are budget, window"),
        ({"prompt": "keep", "prompt_mode": "PROMPT_MODE_EVICT"}, "vase: prompt_mode: not known"),
        ({"promptMode": "PROMPT_MODE_KEEP"}, "vase: promptMode: not known"),
        ({"inspect": 1}, "vase.inspect: must be true or false"),
    ],
)
def test_vase_has_one_spelling(vase: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{text}"):
        completion_call({"model": "scripted", "prompt": "a", "vase": vase})


MANY = {f"k{number}": 0 for number in range(1000)}


@pytest.mark.parametrize(
    ("parse", "fields"),
    [
        (completion_call, {"prompt": [0.5] * 1000}),
        (completion_call, {"prompt": "a", "stop": [1] * 1000}),
        (completion_call, {"prompt": "a", "stop_token_ids": ["a"] * 1000}),
        (lambda body: chat_call(body, 1), {"messages": [{}] * 1000}),
        (lambda body: chat_call(body, 1), {"messages": [{"role": "user", "content": [0] * 1000}]}),
        (lambda body: chat_call(body, 1), {"messages": [{"role": "user", "content": "a"} | MANY]}),
        (
            lambda body: chat_call(body, 1),
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"} | MANY]}]},
        ),
        (completion_call, {"prompt": "a", "vase": MANY}),
    ],
)
def test_of_many_wrong_items_the_first_is_enough(
    parse: Callable[[object], object], fields: dict[str, Any]
) -> None:
    """A body has room for millions, and a problem for each of them takes gigabytes."""
    with pytest.raises(InvalidRequest) as error:
        parse({"model": "scripted", **fields})
    assert isinstance(error.value.__cause__, ValidationError)
    assert error.value.__cause__.error_count() < 5


@pytest.mark.parametrize("messages", [[0] * 8193, [{"content": [0] * 3000}] * 3])
def test_messages_and_parts_are_counted_before_they_are_looked_at(messages: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages: \d+ messages .* at most 8192$") as error:
        chat_call({"model": "scripted", "messages": messages}, 1)
    assert error.value.__cause__ is None


def test_of_many_unknown_names_the_first_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"k0, .* k6, k7: not supported .* are model"):
        completion_call({"model": "scripted", "prompt": "a", **MANY})


@pytest.mark.parametrize(
    ("limits", "most", "text"),
    [
        ({"max_concurrent_requests": 3}, 3, "n: 4 .* bob may have 3 at once; ask for fewer"),
        ({"requests_per_second": 2.5}, 2, r"n: 3 .* bob may send 2\.5 at once; ask for fewer"),
    ],
)
async def test_more_samples_than_may_ever_run_at_once_are_invalid(
    door: Running, limits: dict[str, Any], most: int, text: str
) -> None:
    """Nobody is told to try again what will never be let in."""
    async with client(door, door.add_tenant("bob", limits=limits)) as api:
        with pytest.raises(openai.BadRequestError, match=text) as error:
            await api.completions.create(model="scripted", prompt="a", n=most + 1)
        assert error.value.param == "n" and door.worker.bodies == []
        await api.completions.create(model="scripted", prompt="a", n=most)


async def test_errors_have_openais_shape_and_status(door: Running) -> None:
    limited = door.add_tenant("bob", limits={"requests_per_second": 0.1})
    auditor = door.add_tenant("auditor", roles=["audit"])

    async def ask(key: str) -> None:
        async with client(door, key) as api:
            await api.chat.completions.create(model="scripted", messages=CHAT, max_tokens=1)

    with pytest.raises(openai.AuthenticationError, match="unknown or revoked API key"):
        await ask(door.key[:-1] + ("0" if door.key[-1] != "0" else "1"))
    with pytest.raises(openai.PermissionDeniedError, match="auditor lacks the role `generate`"):
        await ask(auditor)
    await ask(limited)
    with pytest.raises(openai.RateLimitError, match=r"may send 0\.1 requests per second") as error:
        await ask(limited)
    headers = error.value.response.headers
    assert 8 <= int(headers["retry-after"]) <= 10 and 8000 < int(headers["retry-after-ms"]) < 10001
    door.worker.faults.healthy = False
    await door.worker.noticed()
    with pytest.raises(openai.InternalServerError) as unavailable:
        await ask(door.key)
    assert unavailable.value.status_code == 503 and "no worker is ready" in str(unavailable.value)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {door.key}"}) as http:
        async with http.get(f"{door.http_url}/v1/other") as answer:
            assert answer.status == 404 and (await answer.json())["error"]["code"] == "http_error"
        async with http.post(f"{door.http_url}/v1/completions", data="{") as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["message"].startswith("the body is not JSON")
        headers = {"Content-Type": "application/json; charset=none"}
        url = f"{door.http_url}/v1/completions"
        async with http.post(url, data="{}", headers=headers) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["message"].startswith("the body is not JSON")
        async with http.post(
            f"{door.http_url}/v1/completions", data="{}", headers={"Content-Encoding": "gzip"}
        ) as answer:
            assert answer.status == 400
            text = (await answer.json())["error"]["message"]
            assert text == "the body is not encoded as its headers say"
    async with aiohttp.ClientSession() as http, http.get(f"{door.http_url}/v1/models") as answer:
        assert answer.status == 401 and "no API key" in (await answer.json())["error"]["message"]
    assert door.gateway.http_port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", door.gateway.http_port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer vsk_\xff\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()


async def test_a_client_waits_as_long_as_it_is_told(door: Running) -> None:
    """OpenAI's own retries read the header."""
    key = door.add_tenant("bob", limits={"requests_per_second": 2.5})
    api = AsyncOpenAI(base_url=f"{door.http_url}/v1", api_key=key, max_retries=2)
    async with api:
        for _ in range(5):
            await api.completions.create(model="scripted", prompt="a", max_tokens=1)


async def test_a_worker_lost_mid_stream_ends_the_stream_with_an_error(door: Running) -> None:
    door.worker.faults.cut_after_tokens = 3
    door.worker.token_seconds = 0.01
    async with client(door) as api:
        stream = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_tokens=20, stream=True
        )
        seen = 0
        with pytest.raises(openai.APIError, match="was lost while it answered"):
            async for chunk in stream:
                seen += len((chunk.choices[0].delta.content or "").split())
    assert seen == 3
    record = await door.client.get_record(chunk.id.removeprefix("chatcmpl-"))
    assert record.status == "failed"


async def test_what_had_output_is_not_asked_for_again(
    door: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's clients try every 5xx again, which would generate and charge again."""
    api = AsyncOpenAI(base_url=f"{door.http_url}/v1", api_key=door.key, max_retries=2)

    async def failure() -> openai.APIStatusError:
        count = len(door.worker.bodies)
        async with asyncio.timeout(20):
            with pytest.raises(openai.APIStatusError) as error:
                await api.completions.create(model="scripted", prompt="a", max_tokens=10)
        assert len(door.worker.bodies) - count == 1
        return error.value

    for fault in ("cut_after_tokens", "abort_after_tokens"):
        setattr(door.worker.faults, fault, 5)
        error = await failure()
        assert error.status_code in (502, 503) and error.request_id is not None
        assert (await record_of(door, error.request_id)).status == "failed"
        setattr(door.worker.faults, fault, None)

    async def full(record: object) -> None:
        raise OSError("disk full at /secret/place")

    monkeypatch.setattr(door.gateway._store, "append", full)
    error = await failure()
    assert error.status_code == 500 and error.request_id is not None
    assert error.request_id in str(error)
    await api.close()


async def test_the_output_of_one_sample_is_enough(
    door: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's worker is lost before its first token."""
    begun = asyncio.Event()
    run = door.gateway._generations.run

    async def second_fails(passage: Any, request: Any, send: Any, **options: Any) -> Any:
        async def told(message: Any) -> None:
            await send(message)
            if message.HasField("chunk"):
                begun.set()

        if request.sample_index == 1:
            await begun.wait()
            raise WorkerUnavailable("no worker is ready")
        return await run(passage, request, told, **options)

    monkeypatch.setattr(door.gateway._generations, "run", second_fails)
    door.worker.token_seconds = 0.01
    async with client(door) as api:
        with pytest.raises(openai.InternalServerError) as error:
            await api.completions.create(model="scripted", prompt="a", max_tokens=500, n=2)
    assert error.value.response.headers["x-should-retry"] == "false"
    await door.worker.wait_for_abort()


async def test_a_defect_mid_stream_ends_the_stream_with_an_error(
    door: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def full(record: object) -> None:
        raise OSError("disk full at /secret/place")

    monkeypatch.setattr(door.gateway._store, "append", full)
    async with client(door) as api:
        stream = await api.completions.create(
            model="scripted", prompt="a", max_tokens=2, stream=True
        )
        with pytest.raises(openai.APIError) as error:
            assert [chunk async for chunk in stream]
    assert str(error.value).startswith("the generation failed inside the gateway; its log has the")
    assert stream.response.headers["x-request-id"] in str(error.value)
    assert "disk full" in caplog.text


async def test_leaving_aborts_in_the_worker(door: Running) -> None:
    door.worker.token_seconds = 0.02
    async with client(door) as api:
        stream = await api.chat.completions.create(
            model="scripted", messages=CHAT, max_tokens=4000, stream=True
        )
        chunk = await anext(aiter(stream))
        await stream.close()
        assert await door.worker.wait_for_abort() == chunk.id.removeprefix("chatcmpl-")
        assert (await record_of(door, door.worker.aborted[0])).status == "aborted"
        waiting = asyncio.create_task(
            api.chat.completions.create(model="scripted", messages=CHAT, max_tokens=4000)
        )
        await until(lambda: len(door.worker.bodies) == 2)
        waiting.cancel()
        await door.worker.wait_for_abort_of(2)


@pytest.mark.usefixtures("long_tokens")
async def test_a_client_that_does_not_read_is_given_up(tmp_path: Path) -> None:
    section = {"client_stall_seconds": 0.5}
    async with run_gateway(tmp_path, http={"port": 0}, grpc=section) as door:
        door.worker.padding = 30_000
        body = {"model": "scripted", "prompt": "a", "max_tokens": 2000, "stream": True}
        headers = {"Authorization": f"Bearer {door.key}"}
        async with (
            aiohttp.ClientSession(headers=headers, read_bufsize=2**16) as http,
            http.post(f"{door.http_url}/v1/completions", json=body) as answer,
        ):
            await door.worker.wait_for_abort(20)
            record = await record_of(door, answer.headers["x-request-id"])
        assert record.status == "aborted" and door.worker.tokens_written < 500


@dataclasses.dataclass
class Posting:
    """A request whose body does not come."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def begin(cls, door: Running, key: str) -> Posting:
        connection = await asyncio.open_connection("127.0.0.1", door.gateway.http_port)
        posting = cls(*connection)
        posting.writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: 100\r\n"
            + f"Authorization: Bearer {key}\r\n\r\n".encode()
        )
        return posting

    async def answer(self) -> bytes:
        """Status line, headers and JSON of the answer."""
        async with asyncio.timeout(10):
            headers = await self.reader.readuntil(b"\r\n\r\n")
            body = await self.reader.readuntil(b"}}")
        self.writer.close()
        return headers + body


async def test_samples_of_an_answer_that_runs_do_not_give_way(tmp_path: Path) -> None:
    """What had come of it would be lost, and charged."""
    sections = {"worker": {"max_in_flight": 1}, "queue": {"max_waiting": 3}}
    async with run_gateway(tmp_path, http={"port": 0}, **sections) as door, client(door) as api:
        door.worker.token_seconds = 0.01
        samples = await api.completions.create(
            model="scripted", prompt="a", max_tokens=40, n=3, stream=True
        )
        await until(lambda: door.gateway._queue.waiting == 2)
        bob, carol = (
            AsyncClient(door.target, door.add_tenant(name), retry=NEVER)
            for name in ("bob", "carol")
        )
        async with bob, carol:
            other = asyncio.create_task(bob.generate_once("tell me", max_new_tokens=1))
            await until(lambda: door.gateway._queue.waiting == 3)
            with pytest.raises(RateLimited, match="3 requests are waiting"):
                await carol.generate_once("tell me", max_new_tokens=1)
            ends = [chunk.choices[0].finish_reason async for chunk in samples]
            assert ends.count("length") == 3
            await other


async def test_an_idle_gateway_takes_as_many_samples_as_may_be(tmp_path: Path) -> None:
    """More than there are calls, and than may wait; a busy one refuses them."""
    most = requests.MAX_SAMPLES
    section = {"max_concurrent_calls": 2}
    async with run_gateway(tmp_path, http={"port": 0}, grpc=section) as door, client(door) as api:
        body: Any = {"model": "scripted", "prompt": "a", "max_tokens": 1, "n": most}
        assert len((await api.completions.create(**body)).choices) == most
        door.worker.max_running_requests = 1
        door.worker.token_seconds = 0.01
        await door.worker.noticed()
        stream = door.client.generate("tell me", max_new_tokens=4000)
        await stream.started()
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
            await api.completions.create(**body)
        await until(lambda: door.gateway._queue.waiting == 0)
        stream.cancel()


async def test_a_body_that_does_not_come_is_given_up(tmp_path: Path) -> None:
    section = {"client_stall_seconds": 0.3}
    async with run_gateway(tmp_path, http={"port": 0}, grpc=section) as door:
        answer = await (await Posting.begin(door, door.key)).answer()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not come; the gateway waits for it for 0.3 s" in answer


async def test_who_may_generate_is_asked_before_the_body_comes(door: Running) -> None:
    auditor = door.add_tenant("auditor", roles=["audit"])
    for key, status in ((auditor, b"403"), ("vsk_unknown", b"401")):
        answer = await (await Posting.begin(door, key)).answer()
        assert answer.split()[1] == status


async def test_a_tenant_whose_bodies_do_not_come_leaves_room_for_others(tmp_path: Path) -> None:
    section = {"max_concurrent_calls": 8}
    async with run_gateway(tmp_path, http={"port": 0}, grpc=section) as door, client(door) as api:
        bob = door.add_tenant("bob")
        postings = [await Posting.begin(door, bob) for _ in range(8)]
        await until(lambda: door.gateway._door._running == 2)
        assert b" 408 " in await postings[0].answer()
        await api.completions.create(model="scripted", prompt="a", max_tokens=1)


async def test_draining_ends_running_streams_well_and_refuses_new_ones(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, http={"port": 0}, drain_seconds=10) as door:
        door.worker.token_seconds = 0.02
        async with client(door) as api:
            stream = await api.chat.completions.create(
                model="scripted", messages=CHAT, max_tokens=50, stream=True
            )
            stopping = asyncio.create_task(door.gateway.stop())
            await until(lambda: door.gateway._door._draining)
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                await api.models.retrieve("scripted")
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices[0].finish_reason == "length"
        await stopping


async def test_draining_closes_the_connections_that_clients_would_keep(tmp_path: Path) -> None:
    """Of requests that are refused, and of those that ran, while another one goes on."""
    async with run_gateway(tmp_path, http={"port": 0}, drain_seconds=20) as door:
        door.worker.token_seconds = 0.02
        async with client(door) as api:
            long = await api.completions.create(
                model="scripted", prompt="a", max_tokens=4000, stream=True
            )
            body = json.dumps(
                {"model": "scripted", "prompt": "a", "max_tokens": 40, "stream": True}
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", door.gateway.http_port)
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {door.key}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert b"200" in await reader.readline()
            stopping = asyncio.create_task(door.gateway.stop())
            await until(lambda: door.gateway._door._draining)
            with pytest.raises(openai.InternalServerError, match="shutting down") as error:
                await api.models.retrieve("scripted")
            assert error.value.response.headers["connection"] == "close"
            assert b"[DONE]" in await asyncio.wait_for(reader.read(), 10)
            assert not stopping.done()
            writer.close()
            await long.close()
        await stopping


async def test_the_door_has_the_same_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    trusting = Tls(root_certificates=cert.read_bytes())
    config = {"certificate": cert, "key": key}
    async with run_gateway(tmp_path, client_tls=trusting, tls=config, http={"port": 0}) as door:
        context = ssl.create_default_context(cafile=str(cert))
        url = f"https://127.0.0.1:{door.gateway.http_port}/v1/models"
        headers = {"Authorization": f"Bearer {door.key}"}
        async with aiohttp.ClientSession(headers=headers) as http:
            async with http.get(url, ssl=context) as answer:
                assert json.loads(await answer.text())["data"][0]["id"] == "scripted"
            with pytest.raises(aiohttp.ClientError):
                await http.get(url.replace("https", "http"))


async def test_a_certificate_is_a_credential_at_the_door_too(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    config = {"certificate": cert, "key": key, "client_ca": cert}
    known = Tls(cert.read_bytes(), cert.read_bytes(), key.read_bytes())
    async with run_gateway(tmp_path, client_tls=known, tls=config, http={"port": 0}) as door:
        url = f"https://127.0.0.1:{door.gateway.http_port}/v1/models"
        stranger = ssl.create_default_context(cafile=str(cert))
        context = ssl.create_default_context(cafile=str(cert))
        context.load_cert_chain(cert, key)
        async with aiohttp.ClientSession() as http:
            async with http.get(url, ssl=context) as answer:
                assert answer.status == 401 and "CN=127.0.0.1" in await answer.text()
            door.add_tenant("carol", certificate_subjects=["CN=127.0.0.1"])
            async with http.get(url, ssl=context) as answer:
                assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                await http.get(url, ssl=stranger)


async def test_without_a_port_there_is_no_door(running: Running) -> None:
    assert running.gateway.http_port is None
