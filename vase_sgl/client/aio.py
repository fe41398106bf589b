"""The asyncio client. The same calls as the blocking one, awaited."""

from __future__ import annotations

import asyncio
import copy
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from vase_sgl.client import channels, messages, types
from vase_sgl.client.errors import VaseError, cancelled_here, client_closed, translated
from vase_sgl.client.retries import DEFAULT, Attempts, RetryPolicy
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc

M = TypeVar("M", bound=Message)
Q = TypeVar("Q", bound=Message)
_Call = grpc.aio.UnaryStreamCall[Any, M]


class _Messages(Generic[M]):
    """The messages of a stream, started again while nothing that counts has come."""

    def __init__(
        self,
        start: Callable[[float | None], _Call[M]],
        attempts: Attempts,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._loop = loop
        self._start = start
        self._attempts = attempts
        self._begin()
        self._final = False
        self._cancelled = asyncio.Event()
        self._error: VaseError | None = None

    def _begin(self) -> None:
        #: Of the generation that runs, once it has started: errors name it.
        self.request_id: str | None = None
        self._call = self._start(self._attempts.begin())
        self._messages = aiter(self._call)

    def commit(self) -> None:
        """From now on an error is an error: output has come, or the request id was handed out."""
        self._final = True

    async def next(self) -> M:
        """The next message. Raises `VaseError`, and `StopAsyncIteration` at the end.

        After an error, or a wait that was cancelled, gRPC's iterator would end as after a whole
        answer; here every further call raises.
        """
        if self._error is not None:
            raise copy.copy(self._error)  # raised itself it would hold the frames it passed
        try:
            return await self._next()
        except asyncio.CancelledError:
            self.cancel()
            self._error = cancelled_here()
            self._error.request_id = self.request_id
            raise
        except VaseError as error:
            error.request_id = error.request_id or self.request_id
            self._error = copy.copy(error)
            raise

    async def _next(self) -> M:
        while True:
            try:
                with translated():
                    return await anext(self._messages)
            except VaseError as error:
                if self._final:
                    raise
                await self._back_off(self._attempts.wait_after(error))
                if self._final:  # the request id was handed out meanwhile
                    raise
                self._begin()

    async def _back_off(self, seconds: float) -> None:
        """Wait. Raises `Cancelled` as soon as the call is cancelled."""
        try:
            async with asyncio.timeout(seconds):
                await self._cancelled.wait()
        except TimeoutError:
            return
        raise cancelled_here()

    def cancel(self) -> None:
        self._cancelled.set()
        self._call.cancel()

    def abandon(self) -> None:
        """Cancel from any thread, also when the loop is closed and the call with it."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._call.cancel)


class _Running(Generic[M]):
    """What a stream's user can do besides iterating: leave."""

    def __init__(self, stream: _Messages[M]) -> None:
        self._stream = stream

    def cancel(self) -> None:
        """Abort. Iterating on raises `Cancelled`. After the end it does nothing."""
        self._stream.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # An `async for` left by `break` or an error; gRPC's call would live on by itself.
        self._stream.abandon()


class AsyncGeneration(_Running[pb.GenerateResponse]):
    """A running generation: iterate its chunks, then read `result`.

    Leaving the `async with` block, `cancel`, or the end of the last reference to it (after a
    `break`, if only the loop had one) aborts what has not finished. So does a timeout or a
    cancellation of a single step: iterating on then raises `Cancelled`.
    """

    def __init__(self, stream: _Messages[pb.GenerateResponse]) -> None:
        super().__init__(stream)
        self._request_id: str | None = None
        self._result: types.Result | None = None

    def __aiter__(self) -> AsyncIterator[types.Chunk]:
        return self

    async def __anext__(self) -> types.Chunk:
        while True:
            message = await self._stream.next()
            match message.WhichOneof("event"):
                case "started":
                    self._stream.request_id = self._request_id = message.started.request_id
                case "chunk":
                    self._stream.commit()
                    return messages.chunk(message.chunk)
                case "result":
                    self._result = messages.result(message.result)

    async def started(self) -> str:
        """The request id, as soon as the gateway has accepted the request."""
        if self._request_id is None:
            message = await self._stream.next()
            self._stream.request_id = self._request_id = message.started.request_id
        self._stream.commit()
        return self._request_id

    @property
    def request_id(self) -> str:
        """Id of the request and of its record. Before the first chunk: `await started()`."""
        if self._request_id is None:
            raise VaseError("the request was not accepted yet: await started() first")
        self._stream.commit()
        return self._request_id

    @property
    def result(self) -> types.Result:
        """How it ended. Raises `VaseError` before the stream was read to its end."""
        if self._result is None:
            raise VaseError("the result comes last: read the stream to its end first")
        return self._result


class AsyncReplay(_Running[pb.ReplayResponse]):
    """A running replay: iterate its progress, or await `verdict` at once.

    What ends an `AsyncGeneration` early gives it up too.
    """

    def __init__(self, stream: _Messages[pb.ReplayResponse]) -> None:
        super().__init__(stream)
        self._verdict: types.Verdict | None = None

    def __aiter__(self) -> AsyncIterator[types.ReplayProgress]:
        return self

    async def __anext__(self) -> types.ReplayProgress:
        while True:
            message = await self._stream.next()
            self._stream.commit()
            if message.WhichOneof("event") == "progress":
                return messages.progress(message.progress)
            self._verdict = messages.verdict(message.verdict)

    async def verdict(self) -> types.Verdict:
        """The outcome; waits for it."""
        async for _ in self:
            pass
        if self._verdict is None:
            raise VaseError("the replay ended without a verdict")
        return self._verdict


class AsyncClient:
    """A connection to a gateway, for the event loop that runs when it is made.

    Every call raises `VaseError`s: `InvalidRequest` for a wrong argument at once, the others of
    `vase_sgl.client.errors` when the answer is awaited. A `timeout` is in seconds, for all of a
    call with what is tried again; None: no limit.
    """

    def __init__(
        self,
        target: str,
        api_key: str | None = None,
        *,
        tls: channels.Tls | None = None,
        retry: RetryPolicy = DEFAULT,
    ) -> None:
        """`target` is host:port. Without `tls` the connection, key included, is clear text.

        `retry`: how calls are tried again while nothing has come; `NEVER` for not at all.
        Raises `VaseError` outside of a running event loop.
        """
        self._api_key = channels.checked_key(api_key)
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise VaseError(
                "make an AsyncClient inside a coroutine, in the event loop that will use it"
            ) from None
        self._channel = (
            grpc.aio.insecure_channel(target, options=channels.OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(target, tls.credentials(), options=channels.OPTIONS)
        )
        self._stub = gateway_pb2_grpc.VaseGatewayStub(self._channel)
        self._retry = retry
        self._closed = False

    def generate(
        self,
        prompt: types.Prompt,
        *,
        max_new_tokens: int = 256,
        timeout: float | None = None,
        **options: Unpack[messages.Options],
    ) -> AsyncGeneration:
        """Start a generation of at most `max_new_tokens` tokens; see `Options` for the rest."""
        request = messages.generate_request(prompt, max_new_tokens, options)
        return AsyncGeneration(self._stream(self._stub.Generate, request, timeout))

    async def generate_once(
        self,
        prompt: types.Prompt,
        *,
        max_new_tokens: int = 256,
        timeout: float | None = None,
        **options: Unpack[messages.Options],
    ) -> types.Completion:
        """Generate and wait for the whole answer. Arguments as for `generate`."""
        request = pb.GenerateOnceRequest(
            request=messages.generate_request(prompt, max_new_tokens, options)
        )
        answer = await self._unary(self._stub.GenerateOnce, request, timeout)
        return messages.completion(answer)

    def replay(self, record_id: str, *, timeout: float | None = None) -> AsyncReplay:
        """Start to run a record again and compare."""
        request = messages.fitted(pb.ReplayRequest, record_id=record_id)
        return AsyncReplay(self._stream(self._stub.Replay, request, timeout))

    async def get_record(self, record_id: str, *, timeout: float | None = None) -> types.Record:
        """One of the tenant's own records."""
        request = messages.fitted(pb.GetRecordRequest, record_id=record_id)
        answer = await self._unary(self._stub.GetRecord, request, timeout)
        return messages.record(answer.record)

    async def list_records(
        self,
        *,
        page_size: int = 0,
        since: datetime.datetime | None = None,
        until: datetime.datetime | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[types.RecordSummary]:
        """The tenant's own records, newest first; fetches pages as it goes.

        Requests that arrived at `since` or later, and before `until`; both need a time zone. With
        one of them in the order of arrival, else in that of the chain.
        `page_size`: records a fetch, up to 1000; 0: 50. `timeout` is of one fetch.
        """
        request = messages.fitted(
            pb.ListRecordsRequest,
            page_size=page_size,
            since_unix_micros=messages.unix_micros(since),
            until_unix_micros=messages.unix_micros(until),
        )
        while True:
            page = await self._unary(self._stub.ListRecords, request, timeout)
            for message in page.records:
                yield messages.summary(message)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def capacity(
        self,
        *,
        budget: int | None = None,
        window: int | None = None,
        prompt_tokens: int = 0,
        prompt_mode: types.PromptMode | None = None,
        timeout: float | None = None,
    ) -> types.Capacity:
        """Free slots and ceilings; with a budget, also how many such requests fit.

        Lengths in tokens; `window`, `prompt_tokens` and `prompt_mode` are of such a request.
        """
        request = messages.capacity_request(budget, window, prompt_tokens, prompt_mode)
        answer = await self._unary(self._stub.GetCapacity, request, timeout)
        return messages.capacity(answer)

    def _stream(
        self, method: Callable[..., _Call[M]], request: Message, timeout: float | None
    ) -> _Messages[M]:
        def start(left: float | None) -> _Call[M]:
            return method(request, timeout=left, metadata=self._metadata())

        return _Messages(start, Attempts(self._retry, timeout), self._loop)

    async def _unary(
        self, method: Callable[..., Awaitable[Q]], request: Message, timeout: float | None
    ) -> Q:
        attempts = Attempts(self._retry, timeout)
        while True:
            try:
                with translated():
                    left, metadata = attempts.begin(), self._metadata()
                    return await method(request, timeout=left, metadata=metadata)
            except VaseError as error:
                await asyncio.sleep(attempts.wait_after(error))

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with a new call. Raises `VaseError` on a closed client."""
        if self._closed:
            raise client_closed()
        return channels.metadata(self._api_key)

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._closed = True
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
