"""Bodies of HTTP requests: read within bounds, and parsed only if that cannot take long.

A JSON parser holds up the event loop, from a thread too, and what takes it long is not bytes but
values: 16 MiB of text take a tenth of a second, 16 MiB of `1,1,1` take many. So values are counted
while a body comes, and one with too many is given up there.
"""

from __future__ import annotations

import asyncio
import codecs
import collections
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from vase_sgl.gateway.errors import InvalidRequest
from vase_sgl.gateway.tenants import Tenant
from vase_sgl.gateway.validation import MAX_CHAT_MESSAGES, check_message_bytes

#: Values of a request that are no token ids of its prompt: about twice those of a chat with as many
#: messages and parts as may be.
_OTHER_VALUES = 8 * MAX_CHAT_MESSAGES
#: Largest bodies that are read at once, and the part of them that one tenant's may be.
_BODIES = 64
_SHARE = 4


class BodyReader:
    """Reads bodies, of so many bytes at once that memory lasts; the others wait on the network."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of one body."""
        self._max_bytes = max_bytes
        self._room = _Room(_BODIES * max_bytes, _BODIES * max_bytes // _SHARE)

    async def read(self, request: web.Request, tenant: Tenant) -> object:
        """What the body says.

        Raises `InvalidRequest`, and `HTTPRequestEntityTooLarge` above what anybody may send.
        """
        size = request.content_length
        if size is not None:
            self._check_size(size, tenant)
        if size is None or "Content-Encoding" in request.headers:
            size = self._max_bytes  # whatever it comes to
        async with self._room.take(tenant.name, size):
            try:
                if codecs.lookup(request.charset or "utf-8").name != "utf-8":
                    raise LookupError
                return json.loads((await self._receive(request, tenant)).decode())
            except (ValueError, RecursionError, LookupError) as error:
                raise InvalidRequest(
                    "the body is not JSON in UTF-8, or is nested too deeply"
                ) from error
            except web.RequestPayloadError as error:
                raise InvalidRequest("the body is not encoded as its headers say") from error

    async def _receive(self, request: web.Request, tenant: Tenant) -> bytearray:
        most = tenant.limits.max_prompt_tokens + _OTHER_VALUES
        body, values = bytearray(), ValueCount()
        async for piece in request.content.iter_any():
            body += piece
            self._check_size(len(body), tenant)
            if values.add(piece) > most:
                raise InvalidRequest(
                    f"the body holds more than {most} values; tenant {tenant.name} may send "
                    f"{tenant.limits.max_prompt_tokens} token ids, or {MAX_CHAT_MESSAGES} messages"
                )
        return body

    def _check_size(self, size: int, tenant: Tenant) -> None:
        if size > self._max_bytes:
            raise web.HTTPRequestEntityTooLarge(self._max_bytes, size)
        check_message_bytes(size, tenant)


class ValueCount:
    """Counts the values of a JSON text that comes in pieces: never too few, if it is JSON."""

    def __init__(self) -> None:
        self._count = 1
        self._in_string = False
        self._rest = b""

    def add(self, piece: bytes) -> int:
        """The count with this piece."""
        # Of what is escaped only quotes and backslashes matter, and they only within strings.
        piece = (self._rest + piece).replace(b"\\\\", b"")
        self._rest = b"\\" if piece.endswith(b"\\") else b""
        parts = piece.removesuffix(b"\\").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        self._count += sum(map(outside.count, (b",", b"[", b"{")))
        return self._count


class _Room:
    """Bytes that may be held at once, in all and by each caller."""

    def __init__(self, most: int, share: int) -> None:
        self._most = most
        self._share = share
        self._held: collections.Counter[str] = collections.Counter()
        #: Who waits, in the order of arrival.
        self._waiting: dict[asyncio.Future[None], tuple[str, int]] = {}

    @asynccontextmanager
    async def take(self, caller: str, size: int) -> AsyncIterator[None]:
        """So many bytes for the body, as soon as there is room; at most the caller's share."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = caller, size
        try:
            self._dispatch()
            await turn
            yield
        finally:
            if self._waiting.pop(turn, None) is None:
                self._held[caller] -= size
                self._dispatch()

    def _dispatch(self) -> None:
        for turn, (caller, size) in tuple(self._waiting.items()):
            room = min(self._most - self._held.total(), self._share - self._held[caller])
            if size <= room:
                self._held[caller] += size
                del self._waiting[turn]
                if not turn.done():
                    turn.set_result(None)
