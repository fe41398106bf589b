"""/v1/tokenize beside the event loop, on which a worker streams all its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vase_sgl.engine import thinking
from vase_sgl.short_prompt import SHORT_PROMPT

#: The turn to be tokenized, of short prompts and of long ones: a long one takes a core for seconds,
#: and megabytes of memory.
_short, _long = asyncio.Lock(), asyncio.Lock()
_threads = ThreadPoolExecutor(2, thread_name_prefix="vase-tokenize")

#: HTTP's status, by convention, for a caller who did not wait. Nobody reads it.
_LEFT = 499


async def tokenize_in_thread(
    original: Callable[..., Coroutine[Any, Any, Any]],
    serving: Any,
    adapted_request: Any,
    request: Any,
    raw_request: Any,
) -> Any:
    """AROUND `OpenAIServingTokenize._handle_non_streaming_request`.

    Upstream tokenizes the prompts of its own API in threads, as tokenizers release the GIL, but not
    here. Its coroutine waits for nothing, so it has no need of the loop that everything else is on.
    The answer is written there too: FastAPI would look at each token on the loop. A prompt beyond
    the context length is a 400 instead. That of a chat says how its answer's thoughts are marked.
    """

    def work() -> Any:
        answer = asyncio.run(original(serving, adapted_request, request, raw_request))
        return _written(serving, request, answer)

    async with _short if _characters(request) <= SHORT_PROMPT else _long:
        # Upstream goes on for callers who left; for many of them nobody else would get a turn.
        if await raw_request.is_disconnected():
            return serving.create_error_response("the caller left", status_code=_LEFT)
        return await asyncio.get_running_loop().run_in_executor(_threads, work)


def _characters(request: Any) -> int:
    if request.messages is not None:
        return sum(
            len(str(message.content or "")) + len(getattr(message, "reasoning_content", None) or "")
            for message in request.messages
        )
    return sum(map(len, [request.prompt] if isinstance(request.prompt, str) else request.prompt))


def _written(serving: Any, request: Any, answer: Any) -> Any:
    # Where the plugin is loaded, SGLang may not be yet.
    from sglang.srt.entrypoints.openai.protocol import TokenizeResponse
    from sglang.srt.utils.json_response import orjson_response

    if not isinstance(answer, TokenizeResponse):
        return answer
    most = serving.tokenizer_manager.model_config.context_len
    if isinstance(answer.count, int) and answer.count > most:
        return serving.create_error_response(
            f"the prompt has {answer.count} tokens, more than the model's context length of "
            f"{most}; shorten it"
        )
    told = dict(answer)
    if request.messages is not None:
        parser = serving.chat_serving.reasoning_parser
        tokenizer = serving.tokenizer_manager.tokenizer
        told["vase"] = {"thinking": thinking.describe(parser, tokenizer, answer.tokens)}
    return orjson_response(told)
