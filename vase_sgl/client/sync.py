"""The blocking client."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from vase_sgl.client import channels, messages, types
from vase_sgl.client.errors import VaseError, cancelled_here, client_closed, translated
from vase_sgl.client.retries import DEFAULT, Attempts, RetryPolicy
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc

M = TypeVar("M", bound=Message)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R")


class _Messages(Generic[M]):
    """The messages of a stream, started again while nothing that counts has come."""

    def __init__(
        self, start: Callable[[float | None], grpc.CallIterator[M]], attempts: Attempts
    ) -> None:
        self._start = start
        self._attempts = attempts
        self._call = start(attempts.begin())
        self._final = False
        self._cancelled = threading.Event()
        #: Of the generation that runs, once it has started: errors name it.
        self.request_id: str | None = None

    def commit(self) -> None:
        """From now on an error is an error: output has come, or the request id was handed out."""
        self._final = True

    def next(self) -> M:
        """The next message. Raises `VaseError`, and `StopIteration` at the end."""
        try:
            return self._next()
        except VaseError as error:
            error.request_id = error.request_id or self.request_id
            raise

    def _next(self) -> M:
        while True:
            try:
                with translated():
                    return next(iter(self._call))
            except VaseError as error:
                if self._final:
                    raise
                if self._cancelled.wait(self._attempts.wait_after(error)):
                    raise cancelled_here() from None
                if self._final:  # another thread was given the request id meanwhile
                    raise
                self.request_id = None
                self._call = self._start(self._attempts.begin())
                if self._cancelled.is_set():  # by another thread, which saw the call before only
                    self._call.cancel()  # type: ignore[no-untyped-call]

    def cancel(self) -> None:
        self._cancelled.set()
        self._call.cancel()  # type: ignore[no-untyped-call]


class _Running(Generic[M]):
    """What a stream's user can do besides iterating: leave."""

    def __init__(self, stream: _Messages[M]) -> None:
        self._stream = stream

    def cancel(self) -> None:
        """Abort. Iterating on raises `Cancelled`. After the end it does nothing."""
        self._stream.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class Generation(_Running[pb.GenerateResponse]):
    """A running generation: iterate its chunks, then read `result`.

    Leaving the `with` block, or `cancel`, aborts what has not finished and frees its slots.
    """

    def __init__(self, stream: _Messages[pb.GenerateResponse]) -> None:
        super().__init__(stream)
        self._request_id: str | None = None
        self._result: types.Result | None = None

    def __iter__(self) -> Iterator[types.Chunk]:
        return self

    def __next__(self) -> types.Chunk:
        while True:
            message = self._stream.next()
            match message.WhichOneof("event"):
                case "started":
                    self._stream.request_id = self._request_id = message.started.request_id
                case "chunk":
                    self._stream.commit()
                    return messages.chunk(message.chunk)
                case "result":
                    self._result = messages.result(message.result)

    @property
    def request_id(self) -> str:
        """Id of the request and of its record; waits until the gateway has accepted it."""
        if self._request_id is None:
            message = self._stream.next()
            self._stream.request_id = self._request_id = message.started.request_id
        self._stream.commit()
        return self._request_id

    @property
    def result(self) -> types.Result:
        """How it ended. Raises `VaseError` before the stream was read to its end."""
        if self._result is None:
            raise VaseError("the result comes last: read the stream to its end first")
        return self._result


class Replay(_Running[pb.ReplayResponse]):
    """A running replay: iterate its progress, or ask for `verdict` at once.

    Leaving the `with` block, or `cancel`, gives it up.
    """

    def __init__(self, stream: _Messages[pb.ReplayResponse]) -> None:
        super().__init__(stream)
        self._verdict: types.Verdict | None = None

    def __iter__(self) -> Iterator[types.ReplayProgress]:
        return self

    def __next__(self) -> types.ReplayProgress:
        while True:
            message = self._stream.next()
            self._stream.commit()
            if message.WhichOneof("event") == "progress":
                return messages.progress(message.progress)
            self._verdict = messages.verdict(message.verdict)

    @property
    def verdict(self) -> types.Verdict:
        """The outcome; waits for it."""
        for _ in self:
            pass
        if self._verdict is None:
            raise VaseError("the replay ended without a verdict")
        return self._verdict


class Client:
    """A connection to a gateway, for use from any thread.

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
        """
        self._api_key = channels.checked_key(api_key)
        self._channel = (
            grpc.insecure_channel(target, options=channels.OPTIONS)
            if tls is None
            else grpc.secure_channel(target, tls.credentials(), options=channels.OPTIONS)
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
    ) -> Generation:
        """Start a generation of at most `max_new_tokens` tokens; see `Options` for the rest."""
        request = messages.generate_request(prompt, max_new_tokens, options)
        return Generation(self._stream(self._stub.Generate, request, timeout))

    def generate_once(
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
        answer = self._unary(self._stub.GenerateOnce, request, timeout)
        return messages.completion(answer)

    def replay(self, record_id: str, *, timeout: float | None = None) -> Replay:
        """Start to run a record again and compare."""
        request = messages.fitted(pb.ReplayRequest, record_id=record_id)
        return Replay(self._stream(self._stub.Replay, request, timeout))

    def get_record(self, record_id: str, *, timeout: float | None = None) -> types.Record:
        """One of the tenant's own records."""
        request = messages.fitted(pb.GetRecordRequest, record_id=record_id)
        answer = self._unary(self._stub.GetRecord, request, timeout)
        return messages.record(answer.record)

    def list_records(
        self,
        *,
        page_size: int = 0,
        since: datetime.datetime | None = None,
        until: datetime.datetime | None = None,
        timeout: float | None = None,
    ) -> Iterator[types.RecordSummary]:
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
            page = self._unary(self._stub.ListRecords, request, timeout)
            yield from (messages.summary(message) for message in page.records)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def capacity(
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
        answer = self._unary(self._stub.GetCapacity, request, timeout)
        return messages.capacity(answer)

    def _stream(
        self,
        method: Callable[..., grpc.CallIterator[M]],
        request: Message,
        timeout: float | None,
    ) -> _Messages[M]:
        def start(left: float | None) -> grpc.CallIterator[M]:
            return self._call(method, request, left)

        return _Messages(start, Attempts(self._retry, timeout))

    def _unary(self, method: Callable[..., Q], request: Message, timeout: float | None) -> Q:
        attempts = Attempts(self._retry, timeout)
        while True:
            try:
                with translated():
                    return self._call(method, request, attempts.begin())
            except VaseError as error:
                time.sleep(attempts.wait_after(error))

    def _call(self, method: Callable[..., R], request: Message, timeout: float | None) -> R:
        """Begin a call. Raises `VaseError` on a closed client."""
        try:
            return method(request, timeout=timeout, metadata=channels.metadata(self._api_key))
        except ValueError:
            # Asked only now: another thread may have closed it a moment ago.
            if self._closed:
                raise client_closed() from None
            raise

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
