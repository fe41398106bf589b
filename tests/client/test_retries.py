"""What the clients try again, when, and what never."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from tests.gateway.running import Running
from vase_sgl.client import (
    NEVER,
    AsyncClient,
    Cancelled,
    Client,
    InvalidRequest,
    RateLimited,
    RetryPolicy,
    Unavailable,
    VaseError,
)
from vase_sgl.client.retries import Attempts
from vase_sgl.gateway.errors import Defect, LimitExceeded, WorkerUnavailable, as_status
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc

FAST = RetryPolicy(attempts=3, first_seconds=0.02)
MAX_REQUEST_BYTES = 1000


class Flaky(gateway_pb2_grpc.VaseGatewayServicer):
    """Fails as told, with the gateway's own errors, then answers."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        #: What a stream sends before it fails.
        self.before: list[pb.GenerateResponse] = []
        self.calls = 0
        self.metadata: dict[str, Any] = {}

    async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]
        async with as_status(context, "Generate"):
            self.calls += 1
            if self.failures:
                for message in self.before:
                    await context.write(message)
                raise self.failures.pop(0)
            for name in ("started", "chunk"):
                await context.write(MESSAGES[name])

    async def GetCapacity(  # type: ignore[override]
        self, request: Any, context: Any
    ) -> pb.GetCapacityResponse | None:
        async with as_status(context, "GetCapacity"):
            self.calls += 1
            self.metadata = dict(context.invocation_metadata())
            if self.failures:
                raise self.failures.pop(0)
            return pb.GetCapacityResponse(total_slots=7)
        return None


MESSAGES = {
    "started": pb.GenerateResponse(started=pb.GenerationStarted(request_id="r")),
    "chunk": pb.GenerateResponse(chunk=pb.GenerationChunk(text="w", token_ids=[1])),
}


@dataclasses.dataclass
class Server:
    flaky: Flaky
    target: str


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    flaky = Flaky()
    options = [("grpc.max_receive_message_length", MAX_REQUEST_BYTES)]
    server = grpc.aio.server(options=options)
    gateway_pb2_grpc.add_VaseGatewayServicer_to_server(flaky, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Server(flaky, f"127.0.0.1:{port}")
    await server.stop(None)


def unavailable() -> WorkerUnavailable:
    return WorkerUnavailable("no worker is ready")


def limited(seconds: float) -> LimitExceeded:
    return LimitExceeded("too fast", reason="requests", retry_seconds=seconds)


Use = Callable[[Server, RetryPolicy], Any]


async def capacity(server: Server, retry: RetryPolicy) -> int:
    async with AsyncClient(server.target, retry=retry) as client:
        return (await client.capacity()).total_slots


async def capacity_sync(server: Server, retry: RetryPolicy) -> int:
    def body() -> int:
        with Client(server.target, retry=retry) as client:
            return client.capacity().total_slots

    return await asyncio.to_thread(body)


async def stream(server: Server, retry: RetryPolicy) -> int:
    async with AsyncClient(server.target, retry=retry) as client:
        return 7 * len([chunk async for chunk in client.generate("a")])


async def stream_sync(server: Server, retry: RetryPolicy) -> int:
    def body() -> int:
        with Client(server.target, retry=retry) as client:
            return 7 * len(list(client.generate("a")))

    return await asyncio.to_thread(body)


EVERY_CALL = pytest.mark.parametrize("use", [capacity, capacity_sync, stream, stream_sync])


@EVERY_CALL
async def test_it_tries_again_and_gives_up_in_the_end(server: Server, use: Use) -> None:
    server.flaky.failures = [unavailable(), unavailable()]
    assert await use(server, FAST) == 7 and server.flaky.calls == 3
    server.flaky.failures = [unavailable() for _ in range(9)]
    with pytest.raises(Unavailable, match="no worker is ready"):
        await use(server, FAST)
    assert server.flaky.calls == 6
    with pytest.raises(Unavailable):
        await use(server, NEVER)
    assert server.flaky.calls == 7


@EVERY_CALL
async def test_it_comes_back_when_it_is_told_to(server: Server, use: Use) -> None:
    server.flaky.failures = [limited(0.3)]
    start = time.monotonic()
    assert await use(server, FAST) == 7
    assert time.monotonic() - start >= 0.3
    server.flaky.failures = [limited(3600)]
    with pytest.raises(RateLimited) as error:  # longer than anyone waits
        await use(server, FAST)
    assert error.value.retry_seconds == 3600 and error.value.code == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("use", [capacity, stream])
async def test_other_errors_are_final(server: Server, use: Use) -> None:
    from vase_sgl.gateway import errors

    server.flaky.failures = [errors.InvalidRequest("no"), unavailable()]
    with pytest.raises(InvalidRequest):
        await use(server, FAST)
    assert server.flaky.calls == 1


@pytest.mark.parametrize("use", [stream, stream_sync])
async def test_after_output_an_error_is_final(server: Server, use: Use) -> None:
    server.flaky.before = [MESSAGES["started"]]
    server.flaky.failures = [unavailable()]
    assert await use(server, FAST) == 7
    server.flaky.before = list(MESSAGES.values())
    server.flaky.failures = [unavailable()]
    with pytest.raises(Unavailable):
        await use(server, FAST)
    assert server.flaky.calls == 3


async def test_a_request_id_that_was_handed_out_stays_the_right_one(server: Server) -> None:
    server.flaky.before = [MESSAGES["started"]]
    server.flaky.failures = [unavailable()]
    async with AsyncClient(server.target, retry=FAST) as client:
        generation = client.generate("a")
        assert await generation.started() == "r"
        with pytest.raises(Unavailable):
            _ = [chunk async for chunk in generation]

    def body() -> None:
        with Client(server.target, retry=FAST) as client:
            generation = client.generate("a")
            assert generation.request_id == "r"
            with pytest.raises(Unavailable):
                list(generation)

    server.flaky.failures = [unavailable()]
    await asyncio.to_thread(body)
    assert server.flaky.calls == 2


async def test_errors_name_the_generation_though_the_gateway_does_not(server: Server) -> None:
    """By the id that it started with: a lost connection, a deadline and a cancel bring none."""
    server.flaky.before = [MESSAGES["started"], MESSAGES["chunk"]]
    server.flaky.failures = [unavailable(), unavailable()]
    async with AsyncClient(server.target, retry=FAST) as client:
        with pytest.raises(Unavailable) as error:
            _ = [chunk async for chunk in client.generate("a")]
        assert error.value.request_id == "r"
        generation = client.generate("a")
        await generation.started()
        generation.cancel()
        for _ in range(2):
            with pytest.raises(Cancelled) as cancelled:
                _ = [chunk async for chunk in generation]
            assert cancelled.value.request_id == "r"

    def body() -> None:
        with Client(server.target, retry=FAST) as client:
            with pytest.raises(Unavailable) as error:
                list(client.generate("a"))
            assert error.value.request_id == "r"
            generation = client.generate("a")
            assert generation.request_id == "r"
            generation.cancel()
            with pytest.raises(Cancelled) as cancelled:
                list(generation)
            assert cancelled.value.request_id == "r"

    server.flaky.failures = [unavailable()]
    await asyncio.to_thread(body)


@pytest.mark.parametrize("use", [stream, stream_sync])
async def test_the_error_of_another_attempt_does_not_name_the_first(
    server: Server, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generation never started."""
    server.flaky.before = [MESSAGES["started"]]
    server.flaky.failures = [unavailable(), Defect("no")]
    before_waiting(monkeypatch, server.flaky.before.clear)
    with pytest.raises(VaseError, match="no") as error:
        await use(server, FAST)
    assert error.value.code == "INTERNAL" and error.value.request_id is None


async def test_the_timeout_covers_every_attempt(server: Server) -> None:
    """The second wait would fit the timeout, and no longer what is left of it."""
    server.flaky.failures = [limited(1), limited(9)]
    start = time.monotonic()
    async with AsyncClient(server.target) as client:
        with pytest.raises(RateLimited):
            await client.capacity(timeout=10)
    assert time.monotonic() - start < 10 and server.flaky.calls == 2


def before_waiting(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """`do` something when a client is about to wait for its next attempt."""
    wait_after = Attempts.wait_after

    def patched(attempts: Attempts, error: VaseError) -> float:
        seconds = wait_after(attempts, error)
        do()
        return seconds

    monkeypatch.setattr(Attempts, "wait_after", patched)


async def test_a_request_id_handed_out_while_it_waits_stays_the_right_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.flaky.before = [MESSAGES["started"]]
    server.flaky.failures = [unavailable(), unavailable()]
    ids: list[str] = []
    async with AsyncClient(server.target, retry=FAST) as client:
        generation = client.generate("a")
        with monkeypatch.context() as patched:
            before_waiting(patched, lambda: ids.append(generation.request_id))
            with pytest.raises(Unavailable):
                _ = [chunk async for chunk in generation]

    def body() -> None:
        with Client(server.target, retry=FAST) as client:
            generation = client.generate("a")
            before_waiting(monkeypatch, lambda: ids.append(generation.request_id))
            with pytest.raises(Unavailable):
                list(generation)

    await asyncio.to_thread(body)
    assert ids == ["r", "r"] and server.flaky.calls == 2


async def test_cancelling_while_it_waits_ends_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.flaky.failures = [limited(20)]

    def body() -> None:
        with Client(server.target) as client:
            generation = client.generate("a")
            canceller = threading.Thread(target=generation.cancel)
            before_waiting(monkeypatch, canceller.start)
            with pytest.raises(Cancelled):
                list(generation)

    start = time.monotonic()
    await asyncio.to_thread(body)
    assert time.monotonic() - start < 15 and server.flaky.calls == 1


async def test_cancelling_while_it_waits_ends_it_with_asyncio_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.flaky.failures = [limited(20)]
    start = time.monotonic()
    async with AsyncClient(server.target) as client:
        generation = client.generate("a")
        loop = asyncio.get_running_loop()
        before_waiting(monkeypatch, lambda: loop.call_soon(generation.cancel))
        with pytest.raises(Cancelled):
            _ = [chunk async for chunk in generation]
    assert time.monotonic() - start < 15 and server.flaky.calls == 1


async def test_a_timeout_while_it_waits_does_not_end_it_as_if_whole(server: Server) -> None:
    server.flaky.failures = [limited(20)]
    async with AsyncClient(server.target) as client:
        generation = client.generate("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(generation), 0.3)
        with pytest.raises(Cancelled):
            await anext(generation)


async def test_a_broken_stream_does_not_end_as_if_whole(server: Server) -> None:
    server.flaky.before = list(MESSAGES.values())
    server.flaky.failures = [unavailable()]
    async with AsyncClient(server.target) as client:
        generation = client.generate("a")
        assert (await anext(generation)).text == "w"
        for _ in range(2):
            with pytest.raises(Unavailable, match="no worker is ready") as error:
                await anext(generation)
            assert error.value.code == "UNAVAILABLE"


async def test_cancelling_just_when_it_tries_again_ends_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread cancels the attempt before, while the next one starts."""
    server.flaky.failures = [unavailable()]

    def body() -> None:
        with Client(server.target, retry=FAST) as client:
            generation = client.generate("a")
            begin = Attempts.begin

            def cancelled_meanwhile(attempts: Attempts) -> float | None:
                generation.cancel()
                return begin(attempts)

            monkeypatch.setattr(Attempts, "begin", cancelled_meanwhile)
            with pytest.raises(Cancelled):
                list(generation)

    await asyncio.to_thread(body)


async def test_a_request_that_is_too_large_is_not_tried_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[None] = []
    before_waiting(monkeypatch, lambda: waits.append(None))
    prompt, text = (
        "a" * 2 * MAX_REQUEST_BYTES,
        rf"too large .*larger than max .*{MAX_REQUEST_BYTES}",
    )

    def body() -> None:
        with Client(server.target, retry=FAST) as client:
            with pytest.raises(InvalidRequest, match=text):
                list(client.generate(prompt))
            with pytest.raises(InvalidRequest, match=text):
                client.generate_once(prompt)

    await asyncio.to_thread(body)
    async with AsyncClient(server.target, retry=FAST) as asynchronous:
        with pytest.raises(InvalidRequest, match=text):
            await asynchronous.generate(prompt).started()
        with pytest.raises(InvalidRequest, match=text):
            await asynchronous.generate_once(prompt)
    assert waits == []


async def test_a_closed_client_says_so(server: Server) -> None:
    text = "this client was closed; make another one"

    def body() -> None:
        with Client(server.target) as client:
            pass
        with pytest.raises(VaseError, match=text):
            client.capacity()
        with pytest.raises(VaseError, match=text):
            client.generate("a")

    await asyncio.to_thread(body)
    async with AsyncClient(server.target) as asynchronous:
        pass
    with pytest.raises(VaseError, match=text):
        await asynchronous.capacity()
    with pytest.raises(VaseError, match=text):
        asynchronous.generate("a")


async def test_white_space_around_a_key_is_not_sent(server: Server) -> None:
    async with AsyncClient(server.target, " vsk_a\n") as client:
        await client.capacity()
    assert server.flaky.metadata["authorization"] == "Bearer vsk_a"

    def body() -> None:
        with Client(server.target, "vsk_b\r\n") as client:
            client.capacity()

    await asyncio.to_thread(body)
    assert server.flaky.metadata["authorization"] == "Bearer vsk_b"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("key", ["vsk_a\nvsk_b", "vsk a", "vsk_ü", "vsk_\0"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(
    kind: Callable[[str, str], object], key: str
) -> None:
    with pytest.raises(InvalidRequest, match="the API key contains a space") as error:
        kind("127.0.0.1:9", key)
    assert "vsk" not in str(error.value)


def test_waits_double_and_vary() -> None:
    policy = RetryPolicy(attempts=4, first_seconds=1, longest_seconds=3)
    waits = []
    for _ in range(50):
        attempts = Attempts(policy, None)
        for _ in range(2):
            attempts.begin()
            waits.append(attempts.wait_after(Unavailable("x")))
    first, second = waits[::2], waits[1::2]
    assert 0.5 <= min(first) < max(first) <= 1 and 1 <= min(second) < max(second) <= 2
    attempts.begin()
    told = [attempts.wait_after(Unavailable("x", retry_seconds=2)) for _ in range(50)]
    assert 2 <= min(told) < max(told) <= 2.2  # nor do all come back when they were told to


async def test_the_current_trace_goes_along(server: Server) -> None:
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("outer") as span:
        await capacity(server, NEVER)
    context = span.get_span_context()
    ids = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
    assert server.flaky.metadata["traceparent"].startswith("00-{}-{}-".format(*ids))
    await capacity(server, NEVER)
    assert "traceparent" not in server.flaky.metadata


async def test_a_propagator_may_name_its_keys_as_it_likes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X-Ray's is X-Amzn-Trace-Id; gRPC takes lower case only."""

    def inject(carrier: dict[str, str]) -> None:
        carrier["X-Amzn-Trace-Id"] = "Root=1"

    monkeypatch.setattr("vase_sgl.client.channels.propagate.inject", inject)
    await capacity(server, NEVER)
    assert server.flaky.metadata["x-amzn-trace-id"] == "Root=1"


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_whole_answer_is_generated_once(running: Running, kind: str) -> None:
    """The gateway does not try again after output, and the client does not do it in its place."""
    running.worker.faults.cut_after_tokens = 5

    def body() -> str | None:
        with Client(running.target, running.key, retry=FAST) as client:
            with pytest.raises(Unavailable, match="was lost while it answered") as error:
                client.generate_once("tell me", max_new_tokens=10)
            assert error.value.final
            return error.value.request_id

    if kind == "sync":
        request_id = await asyncio.to_thread(body)
    else:
        async with AsyncClient(running.target, running.key, retry=FAST) as client:
            with pytest.raises(Unavailable, match="was lost while it answered") as error:
                await client.generate_once("tell me", max_new_tokens=10)
        assert error.value.final
        request_id = error.value.request_id
    (record,) = [r async for r in running.client.list_records()]
    assert record.record_id == request_id and len(running.worker.bodies) == 1


async def test_before_output_a_whole_answer_is_tried_again(running: Running) -> None:
    running.worker.faults.cut_after_tokens = 0
    async with AsyncClient(running.target, running.key, retry=FAST) as client:
        with pytest.raises(Unavailable) as error:
            await client.generate_once("tell me", max_new_tokens=10)
    assert not error.value.final and len(running.worker.bodies) == 3


async def test_against_the_real_gateway(running: Running) -> None:
    key = running.add_tenant("bob", limits={"requests_per_second": 2})
    async with AsyncClient(running.target, key) as bob:
        for _ in range(4):
            await bob.generate_once("tell me", max_new_tokens=1)
