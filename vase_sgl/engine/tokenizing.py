"""/v1/tokenize beside the event loop, on which a worker streams all its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

#: Prompts tokenized at once: megabytes of text take a core for half a minute, and a gigabyte.
AT_ONCE = 2

_threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="vase-tokenize")


async def tokenize_in_thread(
    original: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any
) -> Any:
    """AROUND `OpenAIServingTokenize._handle_non_streaming_request`.

    Upstream tokenizes the prompts of its own API in threads, as tokenizers release the GIL, but not
    here. Its coroutine waits for nothing, so it has no need of the loop that everything else is on.
    """

    def work() -> Any:
        return asyncio.run(original(*args, **kwargs))

    return await asyncio.get_running_loop().run_in_executor(_threads, work)
