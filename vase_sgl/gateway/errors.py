"""Failures of the gateway and the one mapping to gRPC status codes.

Texts reach the client as they are: they name the field or the state, and the next step. They never
hold a prompt, a key, a seed or a stack trace.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Self

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

logger = logging.getLogger(__name__)

#: Trailing metadata that carries a `google.rpc.Status`, as every gRPC library knows it.
STATUS_DETAILS = "grpc-status-details-bin"
#: Trailing metadata, and HTTP header, that carries the id of the request.
REQUEST_ID = "x-request-id"
#: Trailing metadata with which gRPC's own clients, below zero, do not try again.
RETRY_PUSHBACK = "grpc-retry-pushback-ms"
#: Bytes of a text, in UTF-8. It travels twice, up to three times as long, and gRPC's clients take
#: 8 KiB of metadata: with more they see RESOURCE_EXHAUSTED instead of the status.
_MAX_TEXT_BYTES = 1500


class GatewayError(Exception):
    """A failure with a text for the client. `str(error)` is that text, cut where it is too long.

    own_words: of it what may be logged: not what a worker said, which may quote a prompt.
    retry_seconds: when the client may come back; None: nothing is known about that.
    request_id: of the generation that it ended; None: it ended none.
    final: output had come, so that another try would be another generation, charged like this one.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, said: str = "", retry_seconds: float | None = None) -> None:
        """said: what a worker answered, which the text ends with."""
        # What a client sent may be quoted in it, too.
        text = (f"{message}: {said}" if said else message).encode(errors="replace")
        cut = text[:_MAX_TEXT_BYTES].decode(errors="ignore")
        super().__init__(cut if len(text) <= _MAX_TEXT_BYTES else f"{cut} …")
        self.own_words = message
        self.retry_seconds = retry_seconds
        self.request_id: str | None = None
        self.final = False

    def of_generation(self, request_id: str, *, final: bool) -> Self:
        """The same error of this generation. This instance may be that of others too."""
        error = type(self).__new__(type(self), *self.args)
        error.__dict__.update(self.__dict__, request_id=request_id, final=final)
        return error


class Defect(GatewayError):
    """Something unforeseen, which was logged with its stack."""


class InvalidRequest(GatewayError):
    """A field of the request is wrong or above a ceiling. Its text may quote the field."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, *, said: str = "") -> None:
        super().__init__(message, said=said)
        self.own_words = "a field is wrong or above a ceiling"


class Unauthenticated(GatewayError):
    """No API key or certificate, or one that is unknown or revoked."""

    code = grpc.StatusCode.UNAUTHENTICATED


class KeyNotChecked(GatewayError):
    """An API key was neither found right nor wrong; nothing is known of the caller."""

    code = grpc.StatusCode.UNAVAILABLE


class PermissionDenied(GatewayError):
    """The tenant lacks the role for this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(GatewayError):
    """No such record among the tenant's own."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(GatewayError):
    """The record is not in a state that allows the call."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class LimitExceeded(GatewayError):
    """A limit of the tenant, the length or time of the queue, or the number of calls.

    `reason` is its metric label.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, reason: str, retry_seconds: float) -> None:
        super().__init__(message, retry_seconds=retry_seconds)
        self.reason = reason


class LimitsUnavailable(GatewayError):
    """The shared state of the limits cannot be reached."""

    code = grpc.StatusCode.UNAVAILABLE


class WorkerUnavailable(GatewayError):
    """No worker is ready, or it was lost during the call."""

    code = grpc.StatusCode.UNAVAILABLE


class TokenizingTimeout(GatewayError):
    """A worker did not tokenize a prompt in time. No other one gets it: it may be the prompt."""

    code = grpc.StatusCode.UNAVAILABLE


class GatewayStopped(GatewayError):
    """The gateway stopped, and the time for what still ran was over."""

    code = grpc.StatusCode.UNAVAILABLE


class AuditUnavailable(GatewayError):
    """The audit store cannot be used now; a record that was to be stored may not be."""

    code = grpc.StatusCode.UNAVAILABLE


class WorkerAborted(GatewayError):
    """The worker gave the request up without being asked to."""

    code = grpc.StatusCode.ABORTED


class ClientStalled(GatewayError):
    """The client did not read for too long, so its request was given up."""

    code = grpc.StatusCode.ABORTED


class ClientGone(Exception):
    """A message could not be written: the client has cancelled or is no longer there."""


def trailing_metadata(error: GatewayError) -> tuple[tuple[str, str | bytes], ...]:
    """What a client is told beside status and text, as far as it is known."""
    metadata: list[tuple[str, str | bytes]] = []
    if error.request_id is not None:
        metadata.append((REQUEST_ID, error.request_id))
    if error.final:
        metadata.append((RETRY_PUSHBACK, "-1"))
    if error.retry_seconds is not None:
        metadata.append((STATUS_DETAILS, _retry_info(error, error.retry_seconds)))
    return tuple(metadata)


def _retry_info(error: GatewayError, seconds: float) -> bytes:
    """A `google.rpc.Status` with `google.rpc.RetryInfo`."""
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.code.value[0], message=str(error), details=[detail])
    return bytes(status.SerializeToString())


@asynccontextmanager
async def as_status(context: grpc.aio.ServicerContext[Any, Any], call: str) -> AsyncIterator[None]:
    """End the call with the status that belongs to an exception of the body.

    Cancellation passes through. Anything unforeseen is logged with its stack and becomes INTERNAL.
    """
    try:
        yield
    except GatewayError as error:
        await context.abort(error.code, str(error), trailing_metadata(error))
    except grpc.aio.AbortError:
        raise
    except ClientGone:
        logger.info("%s: the client left", call)
    except Exception:
        logger.exception("%s failed", call)
        await context.abort(
            grpc.StatusCode.INTERNAL,
            f"{call} failed inside the gateway; its log has the reason",
        )
