"""Bodies of HTTP requests: what is given up before it is parsed, and how many are read at once."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway.running import Running, run_gateway, until
from vase_sgl.gateway.openai.bodies import ValueCount, _Room


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Running]:
    async with run_gateway(tmp_path, http={"port": 0}) as running:
        yield running


async def post(door: Running, key: str, head: str, body: bytes) -> bytes:
    """What is answered to a request of which no more than this comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.gateway.http_port)
    try:
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n"
            f"{head}\r\n\r\n".encode()
            + body
        )
        async with asyncio.timeout(10):
            return await reader.readuntil(b"\r\n\r\n") + await reader.readuntil(b"}")
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("head", "body", "status", "text"),
    [
        ("Content-Length: 193537", b"", b"400", b"larger than 193536 bytes, enough for tenant bob"),
        ("Content-Length: 5000000", b"", b"413", b"Request Entity Too Large"),
        (
            "Transfer-Encoding: chunked",
            b"2f401\r\n" + b" " * 193537 + b"\r\n",
            b"400",
            b"larger than 193536 bytes, enough for tenant bob's 1000 prompt tokens",
        ),
        (
            "Content-Length: 193536",
            b'{"prompt": [' + b"1," * 66_536,
            b"400",
            b"more than 66536 values; tenant bob may send 1000 token ids, or 8192 messages",
        ),
        (
            "Content-Length: 2\r\nContent-Type: application/json; charset=utf-16",
            b"{}",
            b"400",
            b"the body is not JSON in UTF-8",
        ),
    ],
    ids=["length", "anybody", "chunks", "values", "encoding"],
)
async def test_what_nobody_needs_is_refused_before_all_of_it_comes(
    door: Running, head: str, body: bytes, status: bytes, text: bytes
) -> None:
    key = door.add_tenant("bob", limits={"max_prompt_tokens": 1000})
    answer = await post(door, key, head, body)
    assert answer.split()[1] == status and text in answer


async def test_the_largest_of_all_prompts_are_taken(door: Running) -> None:
    """As token ids, as text that JSON escapes, and as a chat of many parts."""
    key = door.add_tenant("bob", limits={"max_prompt_tokens": 8185})
    part = {"type": "text", "text": "a"}
    bodies: list[tuple[str, Any]] = [
        ("completions", {"prompt": list(range(8185)), "temperature": None}),
        ("completions", {"prompt": "语 " * 8185}),
        ("chat/completions", {"messages": [{"role": "user", "content": [part] * 8184}]}),
    ]
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as http:
        for path, body in bodies:
            body |= {"model": "scripted", "max_tokens": 1}
            data = json.dumps(body, indent=4)
            async with http.post(f"{door.http_url}/v1/{path}", data=data) as answer:
                assert answer.status == 200, await answer.text()


async def test_bodies_that_do_not_end_take_a_part_of_the_memory(tmp_path: Path) -> None:
    """A tenant's 17th waits on the network, whatever the first sixteen do."""
    async with run_gateway(tmp_path, http={"port": 0}, grpc={"max_receive_bytes": 1024}) as door:
        room, bob = door.gateway._door._bodies._room, door.add_tenant("bob")
        body = b'{"model": "scripted", "max_tokens": 1, "prompt": "a"}'.rjust(1024)
        head = "Content-Length: 1024"
        held = [asyncio.create_task(post(door, bob, head, body[:-1])) for _ in range(16)]
        await until(lambda: room._held["bob"] == 16 * 1024)
        waiting = asyncio.create_task(post(door, bob, head, body))
        await until(lambda: room._waiting)
        assert b" 200 " in await post(door, door.key, head, body)
        assert not waiting.done()
        held[0].cancel()
        assert b" 200 " in await waiting
        for posting in held:
            posting.cancel()
        await until(lambda: room._held.total() == 0)


async def test_room_goes_to_whom_it_fits() -> None:
    room = _Room(10, 6)
    events: list[str] = []

    async def hold(name: str, caller: str, size: int, end: asyncio.Event) -> None:
        async with room.take(caller, size):
            events.append(name)
            await end.wait()

    ends = {name: asyncio.Event() for name in "abcde"}
    sizes = {"a": ("x", 6), "b": ("x", 1), "c": ("y", 5), "d": ("y", 3), "e": ("z", 1)}
    tasks = {n: asyncio.create_task(hold(n, *sizes[n], ends[n])) for n in sizes}
    await asyncio.sleep(0.01)
    assert events == ["a", "d", "e"]  # b: x has its share; c: 4 are left; then d and e fit
    tasks["b"].cancel()
    ends["a"].set()
    await until(lambda: tasks["a"].done())
    await asyncio.sleep(0.01)
    assert events == ["a", "d", "e"] and room._held["y"] == 3  # c: y would have 8
    ends["d"].set()
    await until(lambda: "c" in events)
    for end in ends.values():
        end.set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert room._held.total() == 0 and not room._waiting


def count_of(pieces: list[bytes]) -> int:
    count = ValueCount()
    return [count.add(piece) for piece in pieces][-1]


def values_in(content: Any) -> int:
    if isinstance(content, dict):
        content = list(content.values())
    return 1 + sum(map(values_in, content)) if isinstance(content, list) else 1


def any_json(source: random.Random, depth: int) -> Any:
    text = "".join(source.choices('",[{\\\n语a', k=source.randrange(6)))
    match source.randrange(4 if depth else 2):
        case 0:
            return text
        case 1:
            return source.choice([1, 2.5, None, True])
        case 2:
            return [any_json(source, depth - 1) for _ in range(source.randrange(5))]
        case _:
            return {text + str(n): any_json(source, depth - 1) for n in range(source.randrange(5))}


def test_values_are_counted_wherever_a_text_is_cut() -> None:
    source = random.Random(1)
    for _ in range(300):
        content = any_json(source, 4)
        text = json.dumps(content, ensure_ascii=source.random() < 0.5).encode()
        cuts = sorted(source.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        whole = count_of([text])
        assert values_in(content) <= whole <= 2 * values_in(content)
        assert count_of(pieces) == count_of([bytes([b]) for b in text]) == whole


def test_what_strings_hold_is_not_counted() -> None:
    assert count_of([json.dumps({"prompt": '[{,"\\' * 1000}).encode()]) == 2
