"""Around every gRPC call: who calls, and the messages both ways."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from cryptography import x509
from google.protobuf.message import DecodeError, Message

from vase_sgl.gateway import telemetry
from vase_sgl.gateway.auth import Authenticator, Credential, bearer, set_current_tenant
from vase_sgl.gateway.errors import (
    ClientGone,
    ClientStalled,
    InvalidRequest,
    LimitExceeded,
    as_status,
    trailing_metadata,
)
from vase_sgl.gateway.patience import Patience
from vase_sgl.gateway.tenants import Tenant
from vase_sgl.gateway.unknown_fields import parse_known
from vase_sgl.gateway.validation import check_message_bytes

#: Services anyone may call: probes and tools have no key.
OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
#: Counted apart from all other calls: a gateway that is full is alive and ready all the same.
PROBE = "/grpc.health.v1.Health/Check"

Context = grpc.aio.ServicerContext[Any, Any]


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic
    """Puts the caller's tenant into the call's context, or ends the call with UNAUTHENTICATED.

    It also bounds how many calls there are, and how long, and how many, calls wait for what their
    clients have yet to send.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        client_stall_seconds: float,
        max_calls: int,
        on_full: Callable[[], None],
    ) -> None:
        """`on_full` is called for each call that is refused for being one too many."""
        self._authenticator = authenticator
        self._patience = Patience(seconds=client_stall_seconds, max_calls=max_calls)
        self._calls = _Calls(max_calls, on_full)
        self._probes = _Calls(max_calls, on_full)

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        open_to_all = method.startswith(OPEN_SERVICES)
        if handler.request_streaming:
            assert open_to_all, "the service has no call with a stream of requests"
            return self._bounded(handler)
        return self._guarded(handler, open_to_all, self._probes if method == PROBE else self._calls)

    def _guarded(
        self, handler: grpc.RpcMethodHandler[Any, Any], open_to_all: bool, calls: _Calls
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The same handler behind a check. Only there the certificate is known.

        For gRPC it takes a stream: it would wait for a single message before it calls anything.
        """
        behaviour: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def guarded(_: object, context: Context) -> None:
            async with calls.one(context), as_status(context, "the call"):
                caller = None if open_to_all else await self._admit(context)
                content = await self._message(context, None if caller is None else caller.name)
                check_message_bytes(len(content), caller)
                # Here and not by gRPC: nothing is parsed for strangers, and the error has a text.
                message = _parse(handler, content, known=not open_to_all)
                with telemetry.caller(context.invocation_metadata() or ()):
                    answer = await behaviour(message, context)
                if answer is not None:  # of a unary call; a stream's were written as they came
                    await write(context, answer, None)

        return grpc.stream_stream_rpc_method_handler(guarded, None, handler.response_serializer)

    def _bounded(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """The same handler of a stream that is open to all, for a while."""
        behaviour: Any = handler.stream_stream

        async def bounded(requests: AsyncIterator[Any], context: Context) -> None:
            async with self._calls.one(context), as_status(context, "an open stream"):
                try:
                    async with self._patience.wait(None):
                        async for answer in behaviour(requests, context):
                            await write(context, answer, None)
                except TimeoutError as error:
                    raise ClientStalled(
                        f"such a stream may last {self._patience.seconds:g} s, and less while "
                        "there are many; open another one"
                    ) from error

        return grpc.stream_stream_rpc_method_handler(
            bounded, handler.request_deserializer, handler.response_serializer
        )

    async def _admit(self, context: Context) -> Tenant:
        """Make the caller's tenant the current one. Raises `Unauthenticated`."""
        tenant = await self._authenticator.tenant_of(_credential(context))
        # The handler runs in this same task, so it sees the variable, and no other does.
        set_current_tenant(tenant)
        return tenant

    async def _message(self, context: Context, caller: str | None) -> bytes:
        """The call's message. Raises `ClientStalled` if it does not come."""
        try:
            async with self._patience.wait(caller):
                message = await context.read()
        except TimeoutError as error:
            raise ClientStalled(
                "the call's message did not come; the gateway waits for it for "
                f"{self._patience.seconds:g} s, and less while many calls send none"
            ) from error
        if not isinstance(message, bytes):  # grpc.aio.EOF
            raise InvalidRequest("the call ended without a message")
        return message


class _Calls:
    """The calls of one kind that there are now."""

    def __init__(self, most: int, on_full: Callable[[], None]) -> None:
        self._most = most
        self._on_full = on_full
        self._open = 0

    @asynccontextmanager
    async def one(self, context: Context) -> AsyncIterator[None]:
        """Count the call for the body, its end included, or end it if there are too many."""
        if self._open >= self._most:
            self._on_full()
            error = LimitExceeded(
                f"{self._most} calls run already, which is as many as may; try again",
                reason="calls",
                retry_seconds=1.0,
            )
            await context.abort(error.code, str(error), trailing_metadata(error))
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


async def write(context: Context, message: Message, stall_seconds: float | None) -> None:
    """Write to the client; waits while the client does not read.

    Raises `ClientGone`, and `ClientStalled` for a client that does not read for so long; None: it
    may take its time.
    """
    try:
        async with asyncio.timeout(stall_seconds):
            await context.write(message)
    except TimeoutError as error:
        raise ClientStalled(
            f"the client did not read for {stall_seconds:g} s; the request was aborted"
        ) from error
    except Exception as error:
        # gRPC raises a private type when the client leaves while a message waits to be sent.
        raise ClientGone from error


def _parse(handler: grpc.RpcMethodHandler[Any, Any], request: bytes, *, known: bool) -> Any:
    """The message. known: fields that it has beside those known here are an error."""
    parse = handler.request_deserializer
    assert parse is not None
    try:
        return parse_known(parse, request) if known else parse(request)
    except DecodeError as error:
        raise InvalidRequest(
            "the message cannot be decoded; it is no message of this call, or was damaged"
        ) from error


def _credential(context: Context) -> Credential:
    """What the call brings. Raises `Unauthenticated` for a malformed header."""
    key = None
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            key = bearer(value if isinstance(value, str) else value.decode("latin-1"))
    certificates = context.auth_context().get("x509_pem_cert", ())
    subject = next((_subject(bytes(pem)) for pem in certificates), None)
    return Credential(key, subject)


@functools.lru_cache(maxsize=1024)
def _subject(pem: bytes) -> str:
    return x509.load_pem_x509_certificate(pem).subject.rfc4514_string()
