"""Server-sent events, as far as SGLang's /generate uses them: one `data:` line per event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable

#: Bytes one event may have. Output is cumulative, so a long answer makes long events.
MAX_EVENT_BYTES = 64 * 2**20


async def events(body: AsyncIterable[bytes]) -> AsyncGenerator[list[bytes], None]:
    """The payloads of the `data:` lines in `body`, together what came together; none is empty.

    Reads on only when asked for more, so a slow reader slows the sender, and gets what has piled up
    meanwhile at once. Raises `ValueError` for an oversized event.
    """
    pending: list[bytes] = []
    size = 0
    async for block in body:
        pending.append(block)
        size += len(block)
        if b"\n" in block:
            *lines, rest = b"".join(pending).split(b"\n")
            pending, size = [rest], len(rest)
            found = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            if found:
                yield found
        if size > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
