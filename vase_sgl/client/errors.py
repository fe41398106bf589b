"""What a call can raise. The text is the gateway's own and says what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc


class VaseError(Exception):
    """A call failed. `code` is the gRPC status name, such as `INVALID_ARGUMENT`."""

    def __init__(self, message: str, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class AuthenticationError(VaseError):
    """No API key, or one that is unknown or revoked."""


class PermissionError_(VaseError):
    """The tenant lacks the role for this call."""


class InvalidRequest(VaseError):
    """A field of the request is wrong, or the record is not in a state that allows the call."""


class NotFound(VaseError):
    """No such record among the tenant's own."""


class RateLimited(VaseError):
    """Too much at once; try again later."""


class Unavailable(VaseError):
    """The gateway cannot be reached or has no worker; safe to try again."""


class DeadlineExceeded(VaseError):
    """The call's timeout passed; the request was aborted."""


class Cancelled(VaseError):
    """The call was cancelled; the request was aborted."""


_BY_CODE: dict[grpc.StatusCode, type[VaseError]] = {
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionError_,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RateLimited,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_status(code: grpc.StatusCode, details: str | None) -> VaseError:
    """The exception of a gRPC status."""
    if code is grpc.StatusCode.UNAVAILABLE and (details or "").startswith("failed to connect"):
        details = (
            "cannot connect to the gateway; check host and port, and that `vase-sgl serve` runs "
            f"there ({details})"
        )
    return _BY_CODE.get(code, VaseError)(details or code.name, code.name)


@contextmanager
def translated() -> Iterator[None]:
    """Turn gRPC errors of the body into `VaseError`s."""
    try:
        yield
    except asyncio.CancelledError:
        # gRPC says it so when the call, not the task that awaits it, was cancelled.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise from_status(grpc.StatusCode.CANCELLED, "the call was cancelled here") from None
    except grpc.aio.AioRpcError as error:
        raise from_status(error.code(), error.details()) from None
    except grpc.RpcError as error:
        if not isinstance(error, grpc.Call):
            raise
        raise from_status(error.code(), error.details()) from None
