"""A worker behind SGLang's own HTTP server (`vase-sgl worker`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import aiohttp

from vase_sgl.gateway import telemetry
from vase_sgl.gateway.errors import (
    GatewayError,
    InvalidRequest,
    TokenizingTimeout,
    WorkerUnavailable,
)
from vase_sgl.gateway.open_files import out_of_files
from vase_sgl.gateway.sse import events
from vase_sgl.gateway.worker_answers import (
    DONE,
    NOT_UNDERSTOOD,
    Output,
    error_text,
    thinking_of,
    token_ids_of,
    worker_info,
)
from vase_sgl.gateway.workers import Tokenized, WorkerChunk, WorkerInfo, WorkerRequest
from vase_sgl.worker_key import WORKER_KEY

logger = logging.getLogger(__name__)

#: Seconds for the short calls: tokenize, server_info.
SHORT_TIMEOUT = 30.0
#: Seconds for a connection; until then a worker knows nothing of the call.
CONNECT_TIMEOUT = 10.0
#: Seconds for an abort. A gateway that stops waits for it after it has drained.
ABORT_TIMEOUT = 10.0
#: Seconds for the health check. SGLang takes up to 20 s to call itself unhealthy.
HEALTH_TIMEOUT = 25.0
#: Seconds in which requests may end before a cache is emptied. Under `SHORT_TIMEOUT`.
IDLE_SECONDS = 20
#: Bytes read ahead from a stream before the worker is made to wait.
READ_AHEAD_BYTES = 2**16
#: Bytes the answer to a short call, or the body of an error, may have.
MAX_BODY_BYTES = 64 * 2**20
#: Bytes of JSON that a token id takes, at most, and what else is in the answer with the ids.
_TOKEN_BYTES, _OTHER_BYTES = 16, 2**10


class HttpWorker:
    """`Worker` over HTTP. Needs a running event loop from the first call on."""

    def __init__(
        self,
        url: str,
        *,
        stall_seconds: float,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`stall_seconds`: a worker that sends nothing for so long is given up.

        `api_key`: what the worker asks its callers for; None if it asks for nothing. `tls`: whose
        certificates are good for an `https://` URL; None: those that the system trusts.
        """
        self._url = url.rstrip("/")
        self._stall = stall_seconds
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._calls_under_way = 0
        #: Set: no call but `generate` is under way.
        self._calls_ended = asyncio.Event()
        self._calls_ended.set()
        self._repeats_output = False

    @property
    def name(self) -> str:
        return self._url

    async def tokenize_text(self, text: str, *, max_tokens: int) -> Tokenized:
        return await self._tokenize({"prompt": text}, max_tokens)

    async def tokenize_chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int
    ) -> Tokenized:
        body: dict[str, object] = {"messages": list(messages)}
        if messages and messages[-1]["role"] == "assistant":
            # Or SGLang makes it the user's. It has this for Jinja templates only.
            body["add_generation_prompt"] = True
        return await self._tokenize(body, max_tokens)

    async def generate(self, request: WorkerRequest) -> AsyncGenerator[WorkerChunk, None]:
        sampling = dict(request.sampling)
        if request.eviction is not None:
            inspect = {"inspect": True} if request.inspect else {}
            sampling["custom_params"] = {"vase": {**request.eviction, **inspect}}
        body = {
            "rid": request.request_id,
            "input_ids": list(request.prompt_token_ids),
            "stream": True,
            "sampling_params": sampling,
            "cache_salt": request.cache_salt,
        }
        finished, output = False, Output(request.sampling["max_new_tokens"])
        try:
            # No total timeout: how long an answer takes is the client's deadline to decide.
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT, sock_read=self._stall
            )
            async with self._http().post(
                f"{self._url}/generate",
                json=body,
                timeout=timeout,
                headers=telemetry.outgoing(),
                allow_redirects=False,  # prompts go where the configuration says
            ) as response:
                await self._raise_for_status(response, "generate")
                async with contextlib.aclosing(events(response.content.iter_any())) as received:
                    async for together in received:
                        for chunk in output.chunks(together):
                            finished = chunk.finish is not None
                            yield chunk
                        if together[-1] == DONE:
                            break
        except (aiohttp.ClientError, TimeoutError, *NOT_UNDERSTOOD) as error:
            if not finished:  # else only the mark of the stream's end is missing
                raise self._lost(error) from error
        if not finished:
            raise WorkerUnavailable(
                f"worker {self.name} ended the answer early; it may be restarting, try again"
            )

    async def abort(self, request_id: str) -> None:
        await self._call("POST", "/abort_request", {"rid": request_id}, timeout=ABORT_TIMEOUT)

    async def check_health(self) -> None:
        await self._call("GET", "/health", timeout=HEALTH_TIMEOUT)

    async def info(self) -> WorkerInfo:
        answer = await self._call("GET", "/server_info")
        try:
            info = worker_info(answer)
        except (IndexError, *NOT_UNDERSTOOD) as error:
            raise WorkerUnavailable(
                f"worker {self.name} does not report vase_sgl's state ({error!r}); start it with "
                "`vase-sgl worker` of the same version as this gateway"
            ) from error
        self._warn_of_repeated_output(answer.get("incremental_streaming_output") is False)
        return info

    async def empty_prefix_cache(self) -> None:
        """Forget cached prompts. `InvalidRequest` if requests still run after `IDLE_SECONDS`."""
        await self._call("POST", f"/flush_cache?timeout={IDLE_SECONDS}")

    async def close(self) -> None:
        """Takes no more calls. Short ones under way end first: prompts, aborts."""
        self._closed = True
        await self._calls_ended.wait()
        if self._session is not None:
            await self._session.close()

    async def _tokenize(self, body: Mapping[str, Any], max_tokens: int) -> Tokenized:
        try:
            answer = await self._call(
                "POST",
                "/v1/tokenize",
                body,
                timeout=SHORT_TIMEOUT,
                max_bytes=max_tokens * _TOKEN_BYTES + _OTHER_BYTES,
            )
        except WorkerUnavailable as error:
            match error.__cause__:
                case _TooLong():
                    raise InvalidRequest(
                        "input: the prompt has more tokens than the model's context length of "
                        f"{max_tokens}; shorten it"
                    ) from error
                case aiohttp.ConnectionTimeoutError():
                    raise
                case TimeoutError():
                    raise TokenizingTimeout(
                        f"worker {self.name} did not tokenize the prompt in {SHORT_TIMEOUT:g} s; "
                        "shorten it, or try again later"
                    ) from error
            raise
        try:
            return Tokenized(token_ids_of(answer["tokens"]), thinking_of(answer.get("vase")))
        except NOT_UNDERSTOOD as error:
            raise self._lost(error) from error

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float = SHORT_TIMEOUT,
        max_bytes: int = MAX_BODY_BYTES,
    ) -> Any:
        """The JSON answer of one short call, or None if the answer is not JSON."""
        session = self._http()
        self._calls_under_way += 1
        self._calls_ended.clear()
        try:
            async with session.request(
                method,
                self._url + path,
                json=body,
                timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT),
                headers=telemetry.outgoing(),
                allow_redirects=False,
            ) as response:
                await self._raise_for_status(response, path.rpartition("/")[2])
                if response.content_type != "application/json":
                    return None
                return json.loads(await _body(response, max_bytes))
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            raise self._lost(error) from error
        finally:
            self._calls_under_way -= 1
            if not self._calls_under_way:
                self._calls_ended.set()

    async def _raise_for_status(self, response: aiohttp.ClientResponse, call: str) -> None:
        if response.status < 300:
            return
        message = error_text(await _body(response, MAX_BODY_BYTES))
        if response.status == 401:
            raise WorkerUnavailable(
                f"worker {self.name} refuses this gateway's key; give both the same {WORKER_KEY}"
            )
        if response.status in (400, 413, 422):
            raise InvalidRequest("the worker refused the request", said=message or call)
        raise WorkerUnavailable(
            f"worker {self.name} answered {call} with status {response.status}", said=message
        )

    def _warn_of_repeated_output(self, repeats: bool) -> None:
        """Once, or again after the worker has run with the flag meanwhile."""
        if repeats and not self._repeats_output:
            logger.warning(
                "worker %s sends all of an answer again with each token, which costs the square of "
                "its length: one of 32,000 tokens takes some 6 GB of traffic and a minute of this "
                "gateway's CPU; start it with --incremental-streaming-output",
                self.name,
            )
        self._repeats_output = repeats

    def _lost(self, error: Exception) -> GatewayError:
        logger.debug("worker %s: %r", self.name, error)
        if isinstance(error, aiohttp.ClientConnectorError) and (
            full := out_of_files(error.os_error)
        ):
            return full  # which says nothing about the worker
        match error:
            case aiohttp.ConnectionTimeoutError():
                reason = "cannot be reached"
            case TimeoutError():
                reason = "did not answer in time"
            case aiohttp.ClientConnectorCertificateError():
                reason = "shows no certificate that is trusted here for its name (worker.ca_file)"
            case aiohttp.ClientConnectorError():
                reason = "cannot be reached"
            case aiohttp.ClientError():
                reason = "was lost while it answered"
            case _:
                reason = "gave an answer that cannot be understood"
        return WorkerUnavailable(f"worker {self.name} {reason}; try again later")

    def _http(self) -> aiohttp.ClientSession:
        if self._closed:
            raise WorkerUnavailable(f"worker {self.name} is gone; try again later")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Answers are long-lived: the pool must not cap concurrent generations. Idle
                # connections go before uvicorn (5 s) closes them under a new request.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2, ssl=self._tls or True),
                read_bufsize=READ_AHEAD_BYTES,
                headers=self._headers,
            )
        return self._session


class _TooLong(ValueError):
    """A body is longer than may be."""


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The whole body. Raises `_TooLong`."""
    body = bytearray()
    async for block in response.content.iter_any():
        body += block
        if len(body) > max_bytes:
            raise _TooLong(f"a body is longer than {max_bytes} bytes")
    return bytes(body)
