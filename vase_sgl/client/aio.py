"""The asyncio client. The same calls as the blocking one, awaited."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, Unpack

import grpc

from vase_sgl.client import channels, messages, types
from vase_sgl.client.errors import VaseError, translated
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc


class AsyncGeneration:
    """A running generation: iterate its chunks, then read `result`.

    Leaving the `async with` block, or `cancel`, aborts what has not finished.
    """

    def __init__(self, call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]):
        self._call = call
        self._messages = aiter(call)
        self._request_id: str | None = None
        self._result: types.Result | None = None

    def __aiter__(self) -> AsyncIterator[types.Chunk]:
        return self

    async def __anext__(self) -> types.Chunk:
        with translated():
            async for message in self._messages:
                match message.WhichOneof("event"):
                    case "started":
                        self._request_id = message.started.request_id
                    case "chunk":
                        return messages.chunk(message.chunk)
                    case "result":
                        self._result = messages.result(message.result)
        raise StopAsyncIteration

    async def started(self) -> str:
        """The request id, as soon as the gateway has accepted the request."""
        if self._request_id is None:
            with translated():
                self._request_id = (await anext(self._messages)).started.request_id
        return self._request_id

    @property
    def request_id(self) -> str:
        """Id of the request and of its record. Before the first chunk: `await started()`."""
        if self._request_id is None:
            raise VaseError("the request was not accepted yet: await started() first")
        return self._request_id

    @property
    def result(self) -> types.Result:
        """How it ended. Raises `VaseError` before the stream was read to its end."""
        if self._result is None:
            raise VaseError("the result comes last: read the stream to its end first")
        return self._result

    def cancel(self) -> None:
        """Abort. Iterating on raises `Cancelled`. After the end it does nothing."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncReplay:
    """A running replay: iterate its progress, or await `verdict` at once."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[pb.ReplayRequest, pb.ReplayResponse]):
        self._call = call
        self._messages = aiter(call)
        self._verdict: types.Verdict | None = None

    def __aiter__(self) -> AsyncIterator[types.ReplayProgress]:
        return self

    async def __anext__(self) -> types.ReplayProgress:
        with translated():
            async for message in self._messages:
                if message.WhichOneof("event") == "progress":
                    return messages.progress(message.progress)
                self._verdict = messages.verdict(message.verdict)
        raise StopAsyncIteration

    async def verdict(self) -> types.Verdict:
        """The outcome; waits for it."""
        async for _ in self:
            pass
        if self._verdict is None:
            raise VaseError("the replay ended without a verdict")
        return self._verdict

    def cancel(self) -> None:
        """Give the replay up."""
        self._call.cancel()


class AsyncClient:
    """A connection to a gateway, for one event loop. Every call raises `VaseError`s."""

    def __init__(
        self, target: str, api_key: str | None = None, *, tls: channels.Tls | None = None
    ) -> None:
        """`target` is host:port. Without `tls` the connection, key included, is clear text."""
        self._channel = (
            grpc.aio.insecure_channel(target, options=channels.OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(target, tls.credentials(), options=channels.OPTIONS)
        )
        self._stub = gateway_pb2_grpc.VaseGatewayStub(self._channel)
        self._metadata = channels.metadata(api_key)

    def generate(
        self,
        prompt: types.Prompt,
        *,
        max_new_tokens: int = 256,
        timeout: float | None = None,
        **options: Unpack[messages.Options],
    ) -> AsyncGeneration:
        """Start a generation. `timeout` in seconds covers all of it."""
        request = messages.generate_request(prompt, max_new_tokens, options)
        return AsyncGeneration(
            self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        )

    async def generate_once(
        self,
        prompt: types.Prompt,
        *,
        max_new_tokens: int = 256,
        timeout: float | None = None,
        **options: Unpack[messages.Options],
    ) -> types.Completion:
        """Generate and wait for the whole answer."""
        request = pb.GenerateOnceRequest(
            request=messages.generate_request(prompt, max_new_tokens, options)
        )
        with translated():
            return messages.completion(
                await self._stub.GenerateOnce(request, timeout=timeout, metadata=self._metadata)
            )

    def replay(self, record_id: str, *, timeout: float | None = None) -> AsyncReplay:
        """Start to run a record again and compare."""
        request = pb.ReplayRequest(record_id=record_id)
        return AsyncReplay(self._stub.Replay(request, timeout=timeout, metadata=self._metadata))

    async def get_record(self, record_id: str, *, timeout: float | None = None) -> types.Record:
        """One of the tenant's own records."""
        request = pb.GetRecordRequest(record_id=record_id)
        with translated():
            answer = await self._stub.GetRecord(request, timeout=timeout, metadata=self._metadata)
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

        Requests that arrived at `since` or later, and before `until`; both need a time zone.
        """
        request = pb.ListRecordsRequest(
            page_size=page_size,
            since_unix_micros=messages.unix_micros(since),
            until_unix_micros=messages.unix_micros(until),
        )
        while True:
            with translated():
                page = await self._stub.ListRecords(
                    request, timeout=timeout, metadata=self._metadata
                )
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
        timeout: float | None = None,
    ) -> types.Capacity:
        """Free slots and ceilings; with a budget, also how many such requests fit."""
        request = pb.GetCapacityRequest(budget=budget, window=window, prompt_tokens=prompt_tokens)
        with translated():
            return messages.capacity(
                await self._stub.GetCapacity(request, timeout=timeout, metadata=self._metadata)
            )

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
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
