"""A circuit breaker: stop sending to a worker that keeps failing, then try it with care.

closed -> open after `failures` within `window_seconds`; open -> half-open after `open_seconds`;
half-open lets one request through at a time, until its first output, and closes after `successes`;
one that fails, before or after that, opens it again at once.
"""

from __future__ import annotations

import collections
import enum
import time
from collections.abc import Callable

from vase_sgl.gateway.config import BreakerSection


class BreakerState(enum.StrEnum):
    """What the breaker lets through: all, nothing, or one at a time."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Trial:
    """A request that tries a half-open breaker."""


class CircuitBreaker:
    """The breaker of one worker. Every `enter` is followed by exactly one `leave`."""

    def __init__(
        self, settings: BreakerSection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._failures: collections.deque[float] = collections.deque(maxlen=settings.failures)
        self._opened: float | None = None
        #: Let through while half-open, and without output yet.
        self._trial: Trial | None = None
        self._successes = 0

    @property
    def state(self) -> BreakerState:
        """The state now."""
        if self._opened is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self.open_seconds > 0 else BreakerState.HALF_OPEN

    @property
    def open_seconds(self) -> float:
        """Seconds until it lets a request through again; 0 if it does."""
        opened = self._opened  # which another thread, that of the metrics, may see change
        if opened is None:
            return 0.0
        return max(opened + self._settings.open_seconds - self._clock(), 0.0)

    @property
    def allows(self) -> bool:
        """Whether a request may go through now."""
        state = self.state
        return state is BreakerState.CLOSED or (
            state is BreakerState.HALF_OPEN and self._trial is None
        )

    def enter(self) -> Trial | None:
        """A request goes through; a trial if the breaker is half-open."""
        if self.state is not BreakerState.HALF_OPEN:
            return None
        self._trial = Trial()
        return self._trial

    def answered(self, trial: Trial | None) -> None:
        """The request has output, so the worker works. Further calls do nothing."""
        if trial is None or trial is not self._trial:
            return
        self._trial = None
        if self.state is BreakerState.HALF_OPEN:
            self._successes += 1
            if self._successes >= self._settings.successes:
                self._opened = None
                self._failures.clear()

    def leave(self, trial: Trial | None, succeeded: bool | None) -> None:
        """It is over. None: it ended without telling anything about the worker."""
        if succeeded:
            self.answered(trial)
        if trial is self._trial:
            self._trial = None
        if succeeded is False:
            if self._opened is None:
                self._failed()
            elif trial is not None and self.state is BreakerState.HALF_OPEN:
                self._open()

    def _failed(self) -> None:
        now = self._clock()
        self._failures.append(now)
        recent = [at for at in self._failures if now - at <= self._settings.window_seconds]
        if len(recent) >= self._settings.failures:
            self._open()

    def _open(self) -> None:
        self._opened = self._clock()
        self._successes = 0
