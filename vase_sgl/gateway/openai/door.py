"""The HTTP server: OpenAI's paths in front of the same generations as gRPC's."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from cryptography import x509

from vase_sgl.gateway import logs, telemetry
from vase_sgl.gateway.admission import Admissions
from vase_sgl.gateway.audit import Record
from vase_sgl.gateway.auth import Authenticator, Credential, bearer, require_role
from vase_sgl.gateway.errors import (
    REQUEST_ID,
    ClientGone,
    ClientStalled,
    GatewayError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    WorkerUnavailable,
)
from vase_sgl.gateway.fair_queue import Party
from vase_sgl.gateway.generation import Generations
from vase_sgl.gateway.openai import answers
from vase_sgl.gateway.openai.answers import Answer, Kind
from vase_sgl.gateway.openai.bodies import BodyReader
from vase_sgl.gateway.openai.requests import Call, chat_call, completion_call
from vase_sgl.gateway.openai.thoughts import Splitter
from vase_sgl.gateway.patience import Patience
from vase_sgl.gateway.planning import Shared
from vase_sgl.gateway.router import WorkerRouter
from vase_sgl.gateway.tenants import Role, Tenant
from vase_sgl.gateway.workers import Thinking
from vase_sgl.rpc.v1 import gateway_pb2 as pb

logger = logging.getLogger(__name__)

_TENANT = web.RequestKey("tenant", Tenant)
#: What is asked for, once the body was read.
_CALL = web.RequestKey("call", Call)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class OpenAIDoor:
    """Serves /v1/chat/completions, /v1/completions and /v1/models between `open` and `close`."""

    def __init__(
        self,
        authenticator: Authenticator,
        admissions: Admissions,
        generations: Generations,
        router: WorkerRouter,
        *,
        default_max_tokens: int,
        client_stall_seconds: float,
        max_body_bytes: int,
        max_concurrent: int,
        on_full: Callable[[], None],
    ) -> None:
        """`on_full` is called for each request that is refused for being one too many."""
        self._authenticator = authenticator
        self._admissions = admissions
        self._generations = generations
        self._router = router
        self._default_max_tokens = default_max_tokens
        self._client_stall = client_stall_seconds
        self._max_concurrent = max_concurrent
        self._on_full = on_full
        self._patience = Patience(seconds=client_stall_seconds, max_calls=max_concurrent)
        self._bodies = BodyReader(max_body_bytes)
        self._running = 0
        self._draining = False
        self._closing = asyncio.Lock()
        app = web.Application(
            middlewares=[self._close_if_draining, self._answer_errors, self._authenticate],
        )
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)  # a name may hold a slash
        # A client that leaves cancels its handler, which frees the request's slots at once.
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            logger=logs.http_server_logger(),
            shutdown_timeout=1.0,
        )

    async def open(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        """Listen; the port that was taken. Raises `OSError`."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls)
        await site.start()
        addresses: list[tuple[Any, ...]] = self._runner.addresses
        return int(addresses[0][1])

    async def drain(self, seconds: float) -> None:
        """Refuse new requests with 503; running ones may finish for so long."""
        self._draining = True
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End what still runs, and stop listening."""
        self._draining = True
        async with self._closing:  # a second signal may come while it closes
            await self._runner.cleanup()

    # -- the calls -------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        content = await self._content(request)
        return await self._generate(request, "chat", chat_call(content, self._default_max_tokens))

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(
            request, "completion", completion_call(await self._content(request))
        )

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [_model(n) for n in self._names()]})

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(_model(self._known(request.match_info["model"])))

    def _names(self) -> list[str]:
        return sorted({info.model_name for _, info in self._router.ready()})

    def _known(self, model: str) -> str:
        names = self._names()
        if model not in names:
            raise NotFound(f"model: {model!r} is not served here; choose {' or '.join(names)}")
        return model

    async def _content(self, request: web.Request) -> object:
        """What the body of a tenant that may generate says.

        Raises `PermissionDenied`, `InvalidRequest`, and `HTTPRequestTimeout` if it does not come.
        """
        tenant = request[_TENANT]
        require_role(tenant, Role.GENERATE)
        try:
            async with self._patience.wait(tenant.name):
                return await self._bodies.read(request, tenant)
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(
                reason="the body did not come; the gateway waits for it for "
                f"{self._patience.seconds:g} s, and less while many requests send none"
            ) from error

    async def _generate(self, request: web.Request, kind: Kind, call: Call) -> web.StreamResponse:
        request[_CALL] = call
        self._known(call.model)
        _check_samples(call.samples, request[_TENANT])
        run = _Samples(self, request, kind, call)
        return await (run.streamed() if call.stream else run.whole())

    # -- around every call -----------------------------------------------------------------------

    @web.middleware
    async def _close_if_draining(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """A client that keeps its connection would try again here, until the process is gone."""
        response = await handler(request)
        if self._draining:
            response.force_close()
        return response

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._running += 1
        try:
            self._check_room()
            with telemetry.caller(request.headers.items()):
                return await handler(request)
        except GatewayError as error:
            status, headers, body = answers.error(error, request.get(_CALL))
            return _failure(status, body, headers)
        except UnicodeEncodeError as error:
            # JSON can name half of a surrogate pair, which is no text.
            refused = InvalidRequest(f"the body holds a character that is none: {error.reason}")
            return _failure(400, answers.error(refused)[2])
        except web.HTTPException as error:
            text = f"{request.method} {request.path}: {error.reason}"
            return _failure(
                error.status, answers.error_body(text, "invalid_request_error", "http_error")
            )
        except ClientGone:
            logger.info("%s: the client left", request.path)
            raise ConnectionResetError from None
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            return _failure(500, _unforeseen(request))
        finally:
            self._running -= 1

    def _check_room(self) -> None:
        if self._draining:
            raise WorkerUnavailable("this gateway is shutting down; try again", retry_seconds=1.0)
        if self._running > self._max_concurrent:
            self._on_full()
            raise LimitExceeded(
                f"{self._max_concurrent} requests run already, which is as many as may; try again",
                reason="calls",
                retry_seconds=1.0,
            )

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        header = request.headers.get("Authorization")
        credential = Credential(None if header is None else bearer(header), _subject(request))
        request[_TENANT] = await self._authenticator.tenant_of(credential)
        return await handler(request)


class _Samples:
    """The samples of one request, which run side by side, each with a record of its own."""

    def __init__(self, door: OpenAIDoor, request: web.Request, kind: Kind, call: Call) -> None:
        self._door = door
        self._request = request
        self._kind: Kind = kind
        self._call = call
        self._shared = Shared(call.model, call.reasoning)
        self._party = Party()
        self._created = int(time.time())
        self._response: web.StreamResponse | None = None
        self._answer: Answer | None = None
        self._opening = asyncio.Lock()
        #: Of the samples that stream, by index.
        self._splitters: dict[int, Splitter] = {}
        #: Output of any sample has come.
        self._began = False

    async def whole(self) -> web.Response:
        async def ignore(index: int, message: pb.GenerateResponse) -> None:
            """The records have it all."""

        records = await self._run(ignore)
        answer = self._answer_for(records[0].record_id)
        body = answer.whole(records, self._thinking(), separate=self._call.separate_reasoning)
        return web.json_response(body, headers={REQUEST_ID: answer.request_id})

    async def streamed(self) -> web.StreamResponse:
        try:
            records = await self._run(self._send, self._send_finish)
        except GatewayError as error:
            if self._response is None:
                raise
            # The status has gone out; OpenAI's clients raise for an error among the events.
            await self._write(answers.error(error, self._call)[2])
            return self._response
        except (ClientGone, ConnectionError):
            raise
        except Exception:
            if self._response is None:
                raise
            await self._write(_unforeseen(self._request))
            return self._response
        assert self._response is not None and self._answer is not None
        if self._call.include_usage:
            await self._write(self._answer.usage(records, self._thinking()))
        await self._write("[DONE]")
        return self._response

    async def _run(
        self,
        send: Callable[[int, pb.GenerateResponse], Awaitable[None]],
        finish: Callable[[int, Record], Awaitable[None]] | None = None,
    ) -> list[Record]:
        door, tenant = self._door, self._request[_TENANT]

        async def one(index: int) -> Record:
            async def forward(message: pb.GenerateResponse) -> None:
                self._began |= message.HasField("chunk")
                await send(index, message)

            async with door._admissions.admit(tenant, "generate", self._party) as passage:
                record = await door._generations.run(
                    passage,
                    self._call.sample(index),
                    forward,
                    clip=self._call.max_tokens_field is None,
                    shared=self._shared,
                )
            if finish is not None:
                await finish(index, record)
            return record

        if self._call.samples == 1:
            return [await one(0)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index)) for index in range(self._call.samples)]
        except BaseExceptionGroup as errors:
            error = errors.exceptions[0]
            if isinstance(error, GatewayError):
                error.final |= self._began
            raise error from None
        return [task.result() for task in tasks]

    async def _send(self, index: int, message: pb.GenerateResponse) -> None:
        if message.HasField("started"):
            await self._open(message.started.request_id)
            assert self._answer is not None
            separate = self._call.separate_reasoning
            self._splitters[index] = Splitter(self._thinking() if separate else None)
            if self._kind == "chat":
                await self._write(self._answer.role(index))
        elif message.chunk.text:
            await self._send_text(index, message.chunk.text)

    async def _send_text(self, index: int, text: str, *, final: bool = False) -> None:
        assert self._answer is not None
        parts = self._splitters[index].take(text, final=final)
        if parts.reasoning:
            await self._write(self._answer.reasoning(index, parts.reasoning))
        if parts.content:
            await self._write(self._answer.text(index, parts.content))

    async def _send_finish(self, index: int, record: Record) -> None:
        assert self._answer is not None
        await self._send_text(index, "", final=True)
        await self._write(self._answer.finish(index, record))

    def _thinking(self) -> Thinking | None:
        """How thoughts are marked; known once a sample has its prompt's tokens."""
        assert self._shared.tokenized is not None
        return self._shared.tokenized.thinking

    async def _open(self, request_id: str) -> None:
        """Send the headers, once the first sample was accepted; before that, errors have theirs."""
        async with self._opening:
            if self._response is None:
                headers = {
                    "Content-Type": "text/event-stream",
                    "Cache-Control": "no-cache",
                    REQUEST_ID: request_id,
                }
                self._answer = self._answer_for(request_id)
                response = web.StreamResponse(headers=headers)
                try:
                    await response.prepare(self._request)
                except ConnectionError as error:
                    raise ClientGone from error
                self._response = response

    def _answer_for(self, request_id: str) -> Answer:
        return Answer(self._kind, self._call.model, self._created, request_id)

    async def _write(self, event: object) -> None:
        """One event; waits while the client does not read. Raises `ClientGone`, `ClientStalled`."""
        assert self._response is not None
        # In ASCII: some clients end a line at U+2028.
        text = event if isinstance(event, str) else json.dumps(event)
        stall = self._door._client_stall
        try:
            async with asyncio.timeout(stall):
                await self._response.write(f"data: {text}\n\n".encode())
        except TimeoutError as error:
            transport = self._request.transport
            if transport is not None:
                transport.abort()
            raise ClientStalled(
                f"the client did not read for {stall:g} s; the request was aborted"
            ) from error
        except ConnectionError as error:
            raise ClientGone from error


def _check_samples(count: int, tenant: Tenant) -> None:
    """The tenant can ever have so many requests at once: they begin together."""
    limits, name = tenant.limits.usage, tenant.name
    if limits.concurrent is not None and count > limits.concurrent:
        raise InvalidRequest(
            f"n: {count} samples are as many requests, and tenant {name} may have "
            f"{limits.concurrent} at once; ask for fewer, or have max_concurrent_requests raised"
        )
    if limits.requests_per_second is not None and count > limits.burst:
        raise InvalidRequest(
            f"n: {count} samples are as many requests, and tenant {name} may send "
            f"{limits.burst:g} at once; ask for fewer, or have requests_per_second raised"
        )


def _subject(request: web.Request) -> str | None:
    """The subject of the client certificate, which was verified in the handshake."""
    connection = request.get_extra_info("ssl_object")
    certificate = connection.getpeercert(binary_form=True) if connection is not None else None
    if not certificate:
        return None
    return x509.load_der_x509_certificate(certificate).subject.rfc4514_string()


def _unforeseen(request: web.Request) -> dict[str, Any]:
    """The body for the exception that is being handled, which is logged."""
    logger.exception("%s failed", request.path)
    text = f"{request.path} failed inside the gateway; its log has the reason"
    return answers.error_body(text, "api_error", "internal")


def _failure(
    status: int, body: dict[str, Any], headers: dict[str, str] | None = None
) -> web.Response:
    return web.json_response(body, status=status, headers=headers)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "vase_sgl"}
