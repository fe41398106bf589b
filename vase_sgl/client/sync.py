"""The blocking client."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from types import TracebackType
from typing import Self, Unpack

import grpc

from vase_sgl.client import channels, messages, types
from vase_sgl.client.errors import VaseError, translated
from vase_sgl.rpc.v1 import gateway_pb2 as pb
from vase_sgl.rpc.v1 import gateway_pb2_grpc


class Generation:
    """A running generation: iterate its chunks, then read `result`.

    Leaving the `with` block, or `cancel`, aborts what has not finished and frees its slots.
    """

    def __init__(self, call: grpc.CallIterator[pb.GenerateResponse]) -> None:
        self._call = call
        self._request_id: str | None = None
        self._result: types.Result | None = None

    def __iter__(self) -> Iterator[types.Chunk]:
        return self

    def __next__(self) -> types.Chunk:
        with translated():
            for message in self._call:
                match message.WhichOneof("event"):
                    case "started":
                        self._request_id = message.started.request_id
                    case "chunk":
                        return messages.chunk(message.chunk)
                    case "result":
                        self._result = messages.result(message.result)
        raise StopIteration

    @property
    def request_id(self) -> str:
        """Id of the request and of its record; waits until the gateway has accepted it."""
        if self._request_id is None:
            with translated():
                self._request_id = next(iter(self._call)).started.request_id
        return self._request_id

    @property
    def result(self) -> types.Result:
        """How it ended. Raises `VaseError` before the stream was read to its end."""
        if self._result is None:
            raise VaseError("the result comes last: read the stream to its end first")
        return self._result

    def cancel(self) -> None:
        """Abort. Iterating on raises `Cancelled`. After the end it does nothing."""
        self._call.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class Replay:
    """A running replay: iterate its progress, or ask for `verdict` at once."""

    def __init__(self, call: grpc.CallIterator[pb.ReplayResponse]) -> None:
        self._call = call
        self._verdict: types.Verdict | None = None

    def __iter__(self) -> Iterator[types.ReplayProgress]:
        return self

    def __next__(self) -> types.ReplayProgress:
        with translated():
            for message in self._call:
                if message.WhichOneof("event") == "progress":
                    return messages.progress(message.progress)
                self._verdict = messages.verdict(message.verdict)
        raise StopIteration

    @property
    def verdict(self) -> types.Verdict:
        """The outcome; waits for it."""
        for _ in self:
            pass
        if self._verdict is None:
            raise VaseError("the replay ended without a verdict")
        return self._verdict

    def cancel(self) -> None:
        """Give the replay up."""
        self._call.cancel()  # type: ignore[no-untyped-call]


class Client:
    """A connection to a gateway, for use from any thread. Every call raises `VaseError`s."""

    def __init__(
        self, target: str, api_key: str | None = None, *, tls: channels.Tls | None = None
    ) -> None:
        """`target` is host:port. Without `tls` the connection, key included, is clear text."""
        self._channel = (
            grpc.insecure_channel(target, options=channels.OPTIONS)
            if tls is None
            else grpc.secure_channel(target, tls.credentials(), options=channels.OPTIONS)
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
    ) -> Generation:
        """Start a generation. `timeout` in seconds covers all of it."""
        request = messages.generate_request(prompt, max_new_tokens, options)
        return Generation(self._stub.Generate(request, timeout=timeout, metadata=self._metadata))

    def generate_once(
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
                self._stub.GenerateOnce(request, timeout=timeout, metadata=self._metadata)
            )

    def replay(self, record_id: str, *, timeout: float | None = None) -> Replay:
        """Start to run a record again and compare."""
        request = pb.ReplayRequest(record_id=record_id)
        return Replay(self._stub.Replay(request, timeout=timeout, metadata=self._metadata))

    def get_record(self, record_id: str, *, timeout: float | None = None) -> types.Record:
        """One of the tenant's own records."""
        request = pb.GetRecordRequest(record_id=record_id)
        with translated():
            answer = self._stub.GetRecord(request, timeout=timeout, metadata=self._metadata)
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

        Requests that arrived at `since` or later, and before `until`; both need a time zone.
        """
        request = pb.ListRecordsRequest(
            page_size=page_size,
            since_unix_micros=messages.unix_micros(since),
            until_unix_micros=messages.unix_micros(until),
        )
        while True:
            with translated():
                page = self._stub.ListRecords(request, timeout=timeout, metadata=self._metadata)
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
        timeout: float | None = None,
    ) -> types.Capacity:
        """Free slots and ceilings; with a budget, also how many such requests fit."""
        request = pb.GetCapacityRequest(budget=budget, window=window, prompt_tokens=prompt_tokens)
        with translated():
            return messages.capacity(
                self._stub.GetCapacity(request, timeout=timeout, metadata=self._metadata)
            )

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
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
