"""A worker tokenizes beside its event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from sglang.srt.entrypoints.openai.protocol import TokenizeRequest
from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingTokenize

from vase_sgl.engine.tokenizing import AT_ONCE


class Tokenizer:
    """Takes as long as it is let."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Event()
        self.running = self.most_running = 0

    def encode(self, text: str, **options: Any) -> list[int]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.begun.release()
        assert self.may_end.wait(10)
        self.running -= 1
        return [len(text)]


def test_the_loop_goes_on_while_prompts_are_tokenized() -> None:
    tokenizer = Tokenizer()
    serving = OpenAIServingTokenize.__new__(OpenAIServingTokenize)
    serving.tokenizer_manager = type("Manager", (), {"tokenizer": tokenizer})()

    async def run() -> list[Any]:
        requests = [TokenizeRequest(model="m", prompt="a" * n) for n in range(1, 6)]
        answers = asyncio.gather(
            *(serving._handle_non_streaming_request(r, r, None) for r in requests)
        )
        await asyncio.sleep(0)
        # Were it on this loop, nobody would come here.
        assert await asyncio.to_thread(tokenizer.begun.acquire, timeout=10)
        tokenizer.may_end.set()
        return await answers

    assert [answer.tokens for answer in asyncio.run(run())] == [[1], [2], [3], [4], [5]]
    assert tokenizer.most_running <= AT_ONCE
