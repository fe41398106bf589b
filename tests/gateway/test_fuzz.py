"""What arrives on the wire can be anything: the gateway answers or cuts off, and lives on.

`VASE_FUZZ_CALLS=20000` makes every test here as much longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from tests.gateway.running import Running, run_gateway
from vase_sgl.client import NEVER, AsyncClient
from vase_sgl.rpc.v1 import gateway_pb2 as pb

CALLS = int(os.environ.get("VASE_FUZZ_CALLS", "150"))
SERVICE = "/vase.v1.VaseGateway/"

#: What a caller may be told about a damaged message. Never INTERNAL or UNKNOWN: that is a defect.
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture
async def target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Running]:
    """A gateway that has to work afterwards as before, without an error in its log."""
    config: dict[str, Any] = {"http": {"port": 0}, "grpc": {"max_receive_bytes": 2**20}}
    async with run_gateway(tmp_path, **config) as running:
        before = await running.client.generate_once("tell me", max_new_tokens=20, seed=1)
        yield running
        after = await running.client.generate_once("tell me", max_new_tokens=20, seed=1)
        assert after.token_ids == before.token_ids
        assert (await running.client.replay(after.request_id).verdict()).outcome == "MATCH"
        assert running.gateway._metrics.open_requests == 0
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == []


async def status_of(channel: grpc.aio.Channel, method: str, body: bytes, key: str) -> Any:
    """The status of one call with these very bytes."""
    metadata = (("authorization", f"Bearer {key}"),)
    try:
        if method in ("Generate", "Replay"):
            call = channel.unary_stream(SERVICE + method)(body, metadata=metadata, timeout=20)
            async for _ in call:
                pass
        else:
            await channel.unary_unary(SERVICE + method)(body, metadata=metadata, timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def damaged(source: random.Random, body: bytes) -> bytes:
    """`body` with bytes changed, cut out, put in or repeated."""
    content = bytearray(body)
    for _ in range(source.randint(1, 6)):
        at = source.randrange(len(content) + 1)
        match source.randrange(4):
            case 0 if at < len(content):
                content[at] ^= 1 << source.randrange(8)
            case 1:
                del content[at : at + source.randint(1, 8)]
            case 2:
                content[at:at] = source.randbytes(source.randint(1, 8))
            case _:
                content += content[at : at + 64]
    return bytes(content)


async def test_damaged_messages(target: Running) -> None:
    source = random.Random(1)
    bodies = {
        "Generate": pb.GenerateRequest(
            text="tell me",
            max_new_tokens=3,
            seed=5,
            sampling=pb.SamplingParams(temperature=0.5, stop=["x"], stop_token_ids=[1, 2]),
            eviction=pb.EvictionParams(budget=64, window=16, policy="random"),
        ),
        "GenerateOnce": pb.GenerateOnceRequest(
            request=pb.GenerateRequest(
                chat=pb.Conversation(messages=[pb.ChatMessage(role="user", content="hi")]),
                max_new_tokens=2,
            )
        ),
        "Replay": pb.ReplayRequest(record_id="0" * 32),
        "GetRecord": pb.GetRecordRequest(record_id="0" * 32),
        "ListRecords": pb.ListRecordsRequest(page_size=3, page_token="7"),
        "GetCapacity": pb.GetCapacityRequest(budget=100, window=10, prompt_tokens=5),
    }
    seen = set()
    async with grpc.aio.insecure_channel(target.target) as channel:
        for _ in range(CALLS):
            method = source.choice(list(bodies))
            body = bodies[method].SerializeToString()
            body = damaged(source, body) if source.random() < 0.8 else source.randbytes(40)
            seen.add(status := await status_of(channel, method, body, target.key))
            assert status in EXPECTED, (method, body)
    assert grpc.StatusCode.INVALID_ARGUMENT in seen


async def test_huge_and_strange_fields(target: Running) -> None:
    many = pb.GenerateRequest(max_new_tokens=2, text="a")
    many.sampling.stop.extend(["x"] * 50_000)
    ids = pb.GenerateRequest(max_new_tokens=2)
    ids.token_ids.ids.extend([7] * 200_000)
    cases = [
        (pb.GenerateRequest(max_new_tokens=2, text="x " * 2**20), "RESOURCE_EXHAUSTED"),
        (pb.GenerateRequest(max_new_tokens=2, text="x " * 2**18), "INVALID_ARGUMENT"),
        (pb.GenerateRequest(max_new_tokens=2**31 - 1, text="a"), "INVALID_ARGUMENT"),
        (pb.GenerateRequest(max_new_tokens=2, text="\x00\ufffe \U0001f600"), "OK"),
        (many, "INVALID_ARGUMENT"),
        (ids, "INVALID_ARGUMENT"),
    ]
    async with grpc.aio.insecure_channel(target.target) as channel:
        for request, expected in cases:
            body = request.SerializeToString()
            status = await status_of(channel, "Generate", body, target.key)
            assert status.name == expected, str(request)[:60]
        for method in ("NoSuchCall", "../Generate", ""):
            status = await status_of(channel, method, b"", target.key)
            assert status is grpc.StatusCode.UNIMPLEMENTED


async def test_bodies_of_the_http_door(target: Running) -> None:
    """Any JSON, and a good body with any JSON for one of its fields."""
    source = random.Random(2)
    scalars = [None, True, 0, -1, 2**63, 1e308, "", "x", "\ud800", [], {}, [[]], {"a": None}]
    good: dict[str, Any] = {
        "model": "scripted",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "temperature": 0.5,
        "seed": 1,
        "n": 1,
        "stop": ["x"],
        "stream": False,
        "vase": {"budget": 64, "window": 16},
    }
    headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers) as http:
        for _ in range(CALLS):
            body: Any = json.loads(json.dumps(good))
            for _ in range(source.randint(1, 2)):
                body[source.choice([*good, "other"])] = source.choice(scalars)
            if source.random() < 0.1:
                body = source.choice(scalars)
            path = source.choice(["chat/completions", "completions"])
            data = json.dumps(body)
            async with http.post(f"{target.http_url}/v1/{path}", data=data) as answer:
                content = await answer.read()
                assert answer.status in (200, 400, 404), (body, content)
                if answer.status != 200:
                    assert json.loads(content)["error"]["message"]
        for raw in (b"", b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"):
            async with http.post(f"{target.http_url}/v1/completions", data=raw) as answer:
                assert answer.status == 400
        async with http.post(f"{target.http_url}/v1/completions", data=b"x" * 2**21) as answer:
            assert answer.status == 413


async def test_noise_and_half_open_connections(target: Running) -> None:
    """Random bytes, and many connections that never get on (slow loris), on both ports."""
    source = random.Random(3)
    preface = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 0)[1:] + b"\x04\x00" + b"\0" * 4
    )
    writers: list[asyncio.StreamWriter] = []
    try:
        for port in (target.gateway.port, target.gateway.http_port):
            for index in range(CALLS // 3):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writers.append(writer)
                match index % 4:
                    case 0:
                        writer.write(source.randbytes(200))
                    case 1:
                        writer.write(preface + source.randbytes(100))
                    case 2:
                        writer.write(preface[: source.randrange(1, 24)])
                    case _:
                        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-")
        for _ in range(10):
            await target.client.generate_once("tell me", max_new_tokens=2, timeout=10)
    finally:
        for writer in writers:
            writer.transport.abort()


async def test_a_flood_of_bad_keys(target: Running) -> None:
    """Well-formed keys, each new, so that each costs a check; a good key is served meanwhile."""
    served = 0
    flood = asyncio.create_task(_flood(target, max(CALLS // 5, 20)))
    while not flood.done():
        await target.client.generate_once("tell me", max_new_tokens=1, timeout=10)
        served += 1
        await asyncio.sleep(0.02)
    assert set(await flood) <= {"UNAUTHENTICATED", "UNAVAILABLE"} and served > 1


async def _flood(target: Running, count: int) -> list[str]:
    body = pb.GetCapacityRequest().SerializeToString()
    async with grpc.aio.insecure_channel(target.target) as channel:
        keys = [f"{target.key[:-8]}{index:08x}" for index in range(count)]
        keys += ["", "x" * 5000, target.key.upper(), target.key + "0"]
        return [s.name for s in await asyncio.gather(*(_capacity(channel, body, k) for k in keys))]


async def _capacity(channel: grpc.aio.Channel, body: bytes, key: str) -> Any:
    return await status_of(channel, "GetCapacity", body, key)


async def test_a_client_that_opens_and_leaves(target: Running) -> None:
    """Calls cancelled at any moment leave nothing behind."""
    source = random.Random(4)
    target.worker.token_seconds = 0.001
    async with AsyncClient(target.target, target.key, retry=NEVER) as client:
        for _ in range(CALLS // 5):
            stream = client.generate("tell me", max_new_tokens=50)
            await asyncio.sleep(source.random() * 0.03)
            stream.cancel()
    async with asyncio.timeout(10):
        while target.worker.running or target.gateway._metrics.open_requests:
            await asyncio.sleep(0.02)
    assert all(status.in_flight == 0 for status in target.gateway._fleet.statuses())
