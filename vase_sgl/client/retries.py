"""When a call is tried again: the gateway was away or asked to come back, and nothing had come."""

from __future__ import annotations

import dataclasses
import random
import time

from vase_sgl.client.errors import InvalidRequest, RateLimited, Unavailable, VaseError


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How often and after which waits a call is tried again.

    attempts: tries in all. first_seconds: wait after the first, doubled after each further one and
    shortened at random by up to half. Where the gateway says when to come back, that counts
    instead. longest_seconds: a longer wait than this is not taken; the error is raised at once.
    """

    attempts: int = 3
    first_seconds: float = 0.5
    longest_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not (self.first_seconds >= 0 and self.longest_seconds >= 0):
            raise ValueError(f"a retry policy has at least 1 attempt and no negative wait: {self}")


#: What clients do unless told otherwise.
DEFAULT = RetryPolicy()
#: Every call is tried once.
NEVER = RetryPolicy(attempts=1)
#: 31 years. gRPC takes much longer timeouts, and infinity, for moments that have passed.
_LONGEST_TIMEOUT = 1e9


class Attempts:
    """The attempts of one call, within its timeout in seconds."""

    def __init__(self, policy: RetryPolicy, timeout: float | None) -> None:
        """Raises `InvalidRequest` for what is not a timeout. None: any time."""
        if timeout is not None and not (
            isinstance(timeout, int | float) and timeout <= _LONGEST_TIMEOUT
        ):
            raise InvalidRequest(
                f"timeout: must be seconds, up to {_LONGEST_TIMEOUT:g}, or None for no limit; "
                f"got {timeout!r}",
                "INVALID_ARGUMENT",
            )
        self._policy = policy
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._made = 0

    def begin(self) -> float | None:
        """Count an attempt; the timeout it has. None: any."""
        self._made += 1
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def wait_after(self, error: VaseError) -> float:
        """Seconds to wait before the next attempt. Raises `error` if there is none."""
        again = isinstance(error, (Unavailable, RateLimited)) and not error.final
        if not again or self._made >= self._policy.attempts:
            raise error
        if error.retry_seconds is None:
            backoff = self._policy.first_seconds * 2.0 ** (self._made - 1)
            seconds = backoff * random.uniform(0.5, 1.0)
        else:
            # A little later each, or all who were told the same come back at the same moment.
            seconds = error.retry_seconds * random.uniform(1.0, 1.1)
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if seconds > self._policy.longest_seconds or (left is not None and seconds >= left):
            raise error
        return seconds
