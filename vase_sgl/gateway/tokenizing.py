"""Prompts at the workers' tokenizers: of each tenant few at a time, so that others get a turn."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Sequence

from vase_sgl.gateway.errors import GatewayError, LimitExceeded, WorkerUnavailable
from vase_sgl.gateway.validation import Prompt, prompt_bytes
from vase_sgl.gateway.workers import Tokenized, Worker, WorkerInfo
from vase_sgl.short_prompt import SHORT_PROMPT

#: Prompts of one tenant that one worker has to tokenize at a time: it takes them in the order they
#: come, short ones apart from long ones, and knows no tenants.
_SHORT_AT_ONCE, _LONG_AT_ONCE = 8, 1


class Tokenizing:
    """Asks workers for the tokens of prompts."""

    def __init__(self, *, retries: int, max_wait_seconds: float) -> None:
        """`retries`: other workers that are asked when one fails.

        `max_wait_seconds`: how long a prompt waits for others of its tenant.
        """
        self._retries = retries
        self._max_wait = max_wait_seconds
        self._turns: weakref.WeakValueDictionary[tuple[str, str, bool], asyncio.Semaphore] = (
            weakref.WeakValueDictionary()
        )
        self._asking: set[asyncio.Task[Tokenized | GatewayError]] = set()

    async def tokens(
        self, tenant: str, prompt: Prompt, workers: Sequence[tuple[Worker, WorkerInfo]]
    ) -> Tokenized:
        """The prompt's tokens, from the first worker that answers; all have one tokenizer.

        Raises `InvalidRequest`, `LimitExceeded`, `TokenizingTimeout` and `WorkerUnavailable`.
        """
        if prompt.kind == "token_ids":
            return Tokenized(prompt.token_ids)
        *others, last = workers[: self._retries + 1]
        for worker, info in others:
            with contextlib.suppress(WorkerUnavailable):
                return await self._ask(tenant, prompt, worker, info)
        return await self._ask(tenant, prompt, *last)

    async def close(self) -> None:
        """Give up what nobody waits for any more."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _ask(
        self, tenant: str, prompt: Prompt, worker: Worker, info: WorkerInfo
    ) -> Tokenized:
        turn = self._turn(tenant, worker, is_long=prompt_bytes(prompt) > SHORT_PROMPT)
        try:
            async with asyncio.timeout(self._max_wait):
                await turn.acquire()
        except TimeoutError as error:
            raise LimitExceeded(
                f"the prompt waited {self._max_wait:g} s for others of tenant {tenant} to be "
                "tokenized; send fewer long ones at once",
                reason="queue_time",
                retry_seconds=1.0,
            ) from error
        task = asyncio.create_task(_tokenize(prompt, worker, info))
        self._asking.add(task)

        def answered(_: object) -> None:
            self._asking.discard(task)
            turn.release()

        # A caller who leaves does not end it, nor does the worker stop in the middle of a prompt:
        # whoever waits for none of its prompts would have as many tokenized as it likes.
        task.add_done_callback(answered)
        outcome = await asyncio.shield(task)
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome

    def _turn(self, tenant: str, worker: Worker, *, is_long: bool) -> asyncio.Semaphore:
        at_once = _LONG_AT_ONCE if is_long else _SHORT_AT_ONCE
        key = (tenant, worker.name, is_long)
        return self._turns.setdefault(key, asyncio.Semaphore(at_once))


async def _tokenize(prompt: Prompt, worker: Worker, info: WorkerInfo) -> Tokenized | GatewayError:
    """The tokens, or why there are none: perhaps nobody is there any more to catch an error."""
    most = info.context_length
    try:
        if prompt.kind == "chat":
            return await worker.tokenize_chat(prompt.chat, max_tokens=most)
        return await worker.tokenize_text(prompt.text, max_tokens=most)
    except GatewayError as error:
        return error
