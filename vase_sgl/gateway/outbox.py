"""The messages of one generation on their way to its client, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from vase_sgl.rpc.v1 import gateway_pb2 as pb

Send = Callable[[pb.GenerateResponse], Awaitable[None]]


class Outbox:
    """Sends through `send`, one message at a time. Leave the block before anything else is sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._announcing: asyncio.Task[None] | None = None

    def announce(self, message: pb.GenerateResponse) -> None:
        """Send the first message while the caller goes on: the worker need not wait for it."""
        assert self._announcing is None, "only one message is announced"
        self._announcing = asyncio.ensure_future(self._announce(message))

    async def send(self, message: pb.GenerateResponse) -> None:
        """Send, and wait until it is taken. Raises what `send` and the announcement raise."""
        if self._announcing is not None:
            await self._announcing
        await self._send(message)

    async def _announce(self, message: pb.GenerateResponse) -> None:
        await asyncio.sleep(0)  # the worker's request, which the caller writes now, goes first
        await self._send(message)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the announcement, which a cancelled caller takes back.

        Its own error is raised unless the block has failed already.
        """
        announcing = self._announcing
        if announcing is None:
            return
        if isinstance(error, asyncio.CancelledError):
            announcing.cancel()
        try:
            await asyncio.wait({announcing})
        finally:
            announcing.cancel()  # without effect unless the wait was cancelled
        if not announcing.cancelled() and (failure := announcing.exception()) and error is None:
            raise failure
