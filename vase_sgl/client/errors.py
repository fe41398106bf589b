"""What a call can raise. The text is the gateway's own and says what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc

from vase_sgl.rpc.v1.status_pb2 import RetryInfo, Status


class VaseError(Exception):
    """A call failed. `code` is the gRPC status name, such as `INVALID_ARGUMENT`.

    retry_seconds: when the gateway says that it is worth coming back; None: it does not say.
    request_id: of the generation that failed, for the gateway's log and, if it reached a worker,
    its record; None: it has none, or none is known.
    final: the gateway says not to try again, for output had come: another try would be another
    generation, charged like this one.
    """

    def __init__(
        self, message: str, code: str = "UNKNOWN", retry_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_seconds = retry_seconds
        self.request_id: str | None = None
        self.final = False


class AuthenticationError(VaseError):
    """No API key, or one that is unknown or revoked."""


class PermissionError_(VaseError):
    """The tenant lacks the role for this call."""


class InvalidRequest(VaseError):
    """An argument is wrong, the request or answer is too large, the API key cannot be one, or the
    record is not in a state that allows the call."""


class NotFound(VaseError):
    """No such record among the tenant's own."""


class RateLimited(VaseError):
    """A limit of the tenant or the gateway's queue; `retry_seconds` says when to come back."""


class Unavailable(VaseError):
    """The gateway cannot be reached, has no worker or lost it; safe to try again unless `final`."""


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
#: How gRPC's own text begins where there is no connection.
_NOT_CONNECTED = ("failed to connect", "errors resolving")
#: The same where a connection was there and ended. The gateway's own texts begin otherwise.
_LOST = ("Stream removed", "Socket closed", "ping timeout", "recvmsg:", "keepalive watchdog")


def from_status(
    code: grpc.StatusCode, details: str | None, retry_seconds: float | None = None
) -> VaseError:
    """The exception of a gRPC status."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (details or ""):
        # gRPC's own limit of a message's size: unlike the gateway's limits, waiting cannot help.
        return InvalidRequest(f"request or answer is too large ({details})", code.name)
    if code is grpc.StatusCode.UNAVAILABLE and (details or "").startswith(_NOT_CONNECTED):
        details = f"cannot connect to the gateway; {_advice(details or '')} ({details})"
    elif code is grpc.StatusCode.UNAVAILABLE and (details or "").startswith(_LOST):
        details = (
            "the connection to the gateway was lost; try again, and check that `vase-sgl serve` "
            f"still runs there ({details})"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details == "Deadline Exceeded":  # gRPC's own
        details = "the call's timeout passed; the request was aborted"
    return _BY_CODE.get(code, VaseError)(details or code.name, code.name, retry_seconds)


def _advice(details: str) -> str:
    """What to check where gRPC could not connect."""
    if "andshake" in details or "Verification" in details:
        return (
            "TLS failed: check the certificates, and that it uses TLS and its own names this host"
        )
    if "Socket closed" in details:
        return "it hung up: does it want TLS, or a client's certificate?"
    if "http1.x" in details:
        return "an HTTP server answers there: take the gateway's gRPC port, not --http-port"
    if details.startswith(("errors resolving http://", "errors resolving https://")):
        return "write it as host:port, without http:// or https://"
    return "check host and port, and that `vase-sgl serve` runs there"


def cancelled_here() -> Cancelled:
    """The exception of a call that this side gave up."""
    return Cancelled("the call was cancelled here", grpc.StatusCode.CANCELLED.name)


def client_closed() -> VaseError:
    """The exception of a call on a client that was closed before."""
    return VaseError("this client was closed; make another one")


def _of_call(
    code: grpc.StatusCode, details: str | None, trailing_metadata: Iterable[Any] | None
) -> VaseError:
    """The exception of a call that failed, with what its trailing metadata says."""
    trailing: dict[str, str | bytes] = dict(trailing_metadata or ())
    found = from_status(code, details, _retry_seconds(trailing))
    request_id = trailing.get("x-request-id")
    found.request_id = request_id if isinstance(request_id, str) else None
    pushback = trailing.get("grpc-retry-pushback-ms")
    found.final = isinstance(pushback, str) and pushback.startswith("-")
    return found


def _retry_seconds(trailing: Mapping[str, str | bytes]) -> float | None:
    """The delay of the `google.rpc.RetryInfo` in trailing metadata."""
    status = trailing.get("grpc-status-details-bin")
    if isinstance(status, bytes):
        for detail in Status.FromString(status).details:
            if detail.type_url.endswith("/google.rpc.RetryInfo"):
                delay = RetryInfo.FromString(detail.value).retry_delay
                return delay.seconds + delay.nanos / 1e9
    return None


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
        raise cancelled_here() from None
    except grpc.aio.AioRpcError as error:
        raise _of_call(error.code(), error.details(), error.trailing_metadata()) from None
    except grpc.RpcError as error:
        if not isinstance(error, grpc.Call):
            raise
        raise _of_call(error.code(), error.details(), error.trailing_metadata()) from None
