"""The clock of a session: times since the epoch that nobody sets."""

from __future__ import annotations

import time


class SessionClock:
    """Reads the wall clock once, at its start.

    A wall clock set back meanwhile would put requests into the time of earlier ones.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        #: Seconds since the epoch, as all of its times.
        self.started = time.time()

    def now(self) -> float:
        """`started`, and what has passed since."""
        return self.started + (time.monotonic() - self._begun)
