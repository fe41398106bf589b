"""How long a test took, by one clock: that of the process that leads it.

Locust's times are of each worker's wall clock. Those of two machines differ, and one may be set
meanwhile. So a worker reports how long ago its last event was, not when.
"""

from __future__ import annotations

import math
import time
from typing import Any

_IDLE = "vase-idle-seconds"


class Span:
    """From the start of the test to the last event of any process. Every process has one.

    started: seconds since the epoch. What a report takes to arrive counts as time of the test.
    """

    def __init__(self, environment: Any) -> None:
        """`environment` is Locust's."""
        self._environment = environment
        self._last = -math.inf
        self._begin()
        events = environment.events
        events.test_start.add_listener(self._begin)
        # Locust's counters begin again with these two.
        events.reset_stats.add_listener(self._begin)
        events.spawning_complete.add_listener(self._on_spawned)
        events.report_to_master.add_listener(self._report)
        events.worker_report.add_listener(self._on_report)

    def extend(self) -> None:
        """Something happened now."""
        self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """0 if nothing has happened yet. Of all processes in the one that leads them."""
        return max(self._last - self._begun, 0.0)

    def _begin(self, **_: Any) -> None:
        self.started, self._begun = time.time(), time.perf_counter()

    def _on_spawned(self, **_: Any) -> None:
        if self._environment.reset_stats:
            self._begin()

    def _report(self, data: dict[str, Any], **_: Any) -> None:
        data[_IDLE] = time.perf_counter() - self._last

    def _on_report(self, data: dict[str, Any], **_: Any) -> None:
        self._last = max(self._last, time.perf_counter() - data[_IDLE])
