"""The end of a distributed test: nothing is counted twice, nothing is lost.

When Locust's master quits it waits half a second for the last reports of its workers. Calls that
end later would be recorded by the gateway and missing in the report. So the master asks every
worker to stop, and waits until each has sent its last report.
"""

from __future__ import annotations

import time
from typing import Any

import gevent
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

_DRAIN = "vase-drain"
_DRAINED = "vase-drained"
#: Seconds a worker may take beyond the stop timeout.
_GRACE_SECONDS = 15.0


class Draining:
    """Master's side. `active` while it waits; `problems`: workers whose last report is missing."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._drained: set[str] = set()
        self._workers: set[str] = set()
        self.active = False
        self.problems: list[str] = []
        environment.runner.register_message(_DRAINED, self._on_drained)
        environment.events.test_start.add_listener(self._on_start)
        environment.events.test_stopping.add_listener(self._on_stopping)

    def _on_start(self, **_: Any) -> None:
        self._drained.clear()
        self._workers.clear()
        self.problems.clear()

    def _on_drained(self, environment: Any, msg: Any, **_: Any) -> None:
        self._drained.add(msg.node_id)

    def see_workers(self) -> None:
        """Remember who takes part, so that a worker that vanishes is missed."""
        self._workers.update(client.id for client in self._environment.runner.clients.all)

    def _on_stopping(self, **_: Any) -> None:
        runner = self._environment.runner
        self.see_workers()
        self.active = True
        present = {client.id for client in runner.clients.all if client.state != STATE_MISSING}
        for worker in present:
            runner.send_message(_DRAIN, client_id=worker)
        deadline = time.monotonic() + self._environment.stop_timeout + _GRACE_SECONDS
        while not present <= self._drained and time.monotonic() < deadline:
            gevent.sleep(0.05)
        self.active = False
        for worker in sorted(self._workers - self._drained):
            self.problems.append(f"worker {worker} was lost: its last calls are not in the report")


def watch(environment: Any) -> Draining | None:
    """Take part in it on this node; the master's side is returned."""
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        runner.register_message(_DRAIN, _drain, concurrent=True)
        return None
    return Draining(environment) if isinstance(runner, MasterRunner) else None


def _drain(environment: Any, msg: Any, **_: Any) -> None:
    runner = environment.runner
    runner.stop()
    # As Locust's own reporter does it; the message after it cannot overtake it.
    report: dict[str, Any] = {}
    environment.events.report_to_master.fire(client_id=runner.client_id, data=report)
    runner.send_message("stats", report)
    runner.send_message(_DRAINED)
