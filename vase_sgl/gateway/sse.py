"""Server-sent events, as far as SGLang's /generate uses them: one `data:` line per event."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

#: Bytes one event may have. Output is cumulative, so a long answer makes long events.
MAX_EVENT_BYTES = 64 * 2**20


async def events(body: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The payload of every `data:` line in `body`. Raises `ValueError` for an oversized one.

    Reads on only when asked for the next event, so a slow reader slows the sender.
    """
    pending = bytearray()
    async for block in body:
        start = len(pending)
        pending += block
        while (end := pending.find(b"\n", start)) >= 0:
            line = bytes(pending[:end]).rstrip(b"\r")
            del pending[: end + 1]
            start = 0
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(pending) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
