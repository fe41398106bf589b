"""Failures of the gateway and the one mapping to gRPC status codes.

Texts reach the client as they are: they name the field or the state, and the next step. They never
hold a prompt, a key, a seed or a stack trace.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import grpc

logger = logging.getLogger(__name__)


class GatewayError(Exception):
    """A failure with a text for the client. `str(error)` is that text."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL


class InvalidRequest(GatewayError):
    """A field of the request is wrong or above a ceiling."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(GatewayError):
    """No API key, or one that is unknown or revoked."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(GatewayError):
    """The tenant lacks the role for this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(GatewayError):
    """No such record among the tenant's own."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(GatewayError):
    """The record is not in a state that allows the call."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class WorkerUnavailable(GatewayError):
    """No worker is ready, or it was lost during the call."""

    code = grpc.StatusCode.UNAVAILABLE


class AuditUnavailable(GatewayError):
    """The audit store cannot be used now; a record that was to be stored may not be."""

    code = grpc.StatusCode.UNAVAILABLE


class WorkerAborted(GatewayError):
    """The worker gave the request up without being asked to."""

    code = grpc.StatusCode.ABORTED


class ClientGone(Exception):
    """A message could not be written: the client has cancelled or is no longer there."""


@asynccontextmanager
async def as_status(context: grpc.aio.ServicerContext[Any, Any], call: str) -> AsyncIterator[None]:
    """End the call with the status that belongs to an exception of the body.

    Cancellation passes through. Anything unforeseen is logged with its stack and becomes INTERNAL.
    """
    try:
        yield
    except GatewayError as error:
        await context.abort(error.code, str(error))
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
