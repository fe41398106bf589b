"""The locustfile: a gateway under load. `python -m loadtest --help` lists the options.

Exit status: 0; 1 a call failed or none was completed (without --slo), or the report is not
complete; 2 a bad option or no gateway; 3 a threshold of --slo was missed.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import grpc.experimental.gevent as grpc_gevent
import locust.stats
from locust import LoadTestShape, User, events
from locust.runners import STATE_INIT, STATE_RUNNING, STATE_SPAWNING, WorkerRunner

from loadtest import draining, results, slo
from loadtest.options import Settings, add_options
from loadtest.problems import BadSetup
from loadtest.rows import Row, bucket
from loadtest.scenarios import users_at
from loadtest.session import Session
from loadtest.span import Span
from loadtest.users import GatewayUser
from vase_sgl.client import Capacity

logger = logging.getLogger("loadtest")

# Keys may be fractions: they are only ever sorted and compared.
locust.stats.bucket_response_time = bucket  # type: ignore[assignment]


class AnyUser(GatewayUser):
    """Stands here for the users of the tenants, whose classes are made once the options are read:
    Locust wants to see a class before that."""


class Test:
    """One test in the process that leads it: alone, or the master."""

    def __init__(self, environment: Any, session: Session, span: Span) -> None:
        self.environment = environment
        self.session = session
        self._span = span
        self.draining = draining.watch(environment)
        self._capacity: Capacity | None = None
        self._started: tuple[Settings, Capacity] | None = None
        #: Whether a test was refused when it should have started.
        self.refused = False
        self.ending = False
        environment.events.test_start.add_listener(self._on_start)

    def _on_start(self, **_: Any) -> None:
        # What is prepared after this may be a next test, which is refused.
        assert self._capacity is not None
        self._started = self.session.settings, self._capacity

    def end(self) -> None:
        """Let the test end as if its time were over."""
        self.ending = True

    def prepare(self) -> None:
        """Check that the gateway will take what the users are about to send. Raises `BadSetup`."""
        self.session.read_settings()
        self.session.check_times()
        for tenant in self.session.tenants:
            capacity = self.session.capacity(self.environment.host, tenant)
            self.session.settings.check_against(capacity, tenant.name)
        self._capacity = capacity

    def finish(self) -> None:
        """Write the result and judge it; sets Locust's exit status.

        A test that never started has no result and is no success, unless it is the web page that
        nobody used.
        """
        environment = self.environment
        # SIGTERM leads here before the users were stopped, when there is a web page.
        if environment.runner.state in (STATE_SPAWNING, STATE_RUNNING):
            environment.runner.stop()
        if self._started is None:
            if self.refused or environment.parsed_options.headless:
                logger.error("the test did not start: no call was sent")
                environment.process_exit_code = 2
            return
        result = self._result(*self._started)
        problems = result["problems"]
        for problem in problems:
            logger.error("the report is not complete: %s", problem)
        missed = False
        if self.session.slo is not None:
            checks = slo.evaluate(self.session.slo, result)
            for check in checks:
                logger.log(logging.INFO if check.passed else logging.ERROR, "SLO %s", check)
            missed = not all(check.passed for check in checks)
            result["slo"] = {"passed": not missed, "checks": [str(check) for check in checks]}
            environment.process_exit_code = 3 if missed else 1 if problems else 0
        elif not result["all"]["completed"]:
            logger.error("no call was completed")
            environment.process_exit_code = 1
        elif problems:
            environment.process_exit_code = 1
        if environment.parsed_options.result:
            results.write(environment.parsed_options.result, result)

    def _result(self, settings: Settings, before: Capacity) -> dict[str, Any]:
        environment, options = self.environment, self.environment.parsed_options
        stats = environment.stats
        problems = list(self.draining.problems) if self.draining else []
        for exception in environment.runner.exceptions.values():
            problems.append(f"a user broke {exception['count']} times: {exception['msg']}")
        return results.document(
            [
                Row(
                    *(kind, tenant, entry.num_requests, entry.num_failures),
                    *(entry.total_response_time, entry.max_response_time),
                    *(entry.total_content_length, dict(entry.response_times)),
                )
                for (tenant, kind), entry in stats.entries.items()
            ],
            self._span.started,
            self._span.seconds,
            problems,
            users=options.num_users,
            run_time=options.run_time,
            options=settings.model_dump(),
            gateway=self._gateway(before, problems),
            failures={
                f"{e.name} {e.method}: {e.error}": e.occurrences for e in stats.errors.values()
            },
        )

    def _gateway(self, before: Capacity, problems: list[str]) -> dict[str, Any]:
        try:
            after = self.session.capacity(self.environment.host, self.session.tenants[0])
        except BadSetup as error:
            problems.append(str(error))
            after = before
        return {
            "target": self.environment.host,
            "fingerprint": dict(after.fingerprint),
            "total_slots": after.total_slots,
            # Of all callers of these workers, not of this test alone.
            "eviction_rounds": after.rounds - before.rounds,
            "evicted_tokens": after.evicted_tokens - before.evicted_tokens,
        }


class Profile(LoadTestShape):
    """The number of users over time: --users, --spawn-rate, --run-time and the scenario."""

    use_common_options = True
    test: Test

    def tick(self) -> tuple[int, float] | tuple[int, float, list[type[User]] | None] | None:
        """Users wanted now, and how many may start in a second."""
        assert self.runner is not None
        options = self.test.environment.parsed_options
        if self.runner.state == STATE_INIT:  # a new test: the web form may have changed the options
            try:
                self.test.prepare()
            except BadSetup as error:
                logger.error("%s", error)
                self.test.refused = True
                return None
        if self.test.draining is not None:
            if self.test.draining.active:
                return self.runner.shape_last_tick
            self.test.draining.see_workers()
        users = users_at(
            self.test.session.settings.load,
            options.num_users or 1,
            self.get_run_time(),
            options.run_time,
        )
        return None if users is None or self.test.ending else (users, options.spawn_rate)


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    add_options(parser)


@events.init.add_listener
def _start(environment: Any, runner: Any, **_: Any) -> None:
    # Not at import: with --processes Locust forks in between.
    grpc_gevent.init_gevent()
    with _ending():
        session = Session(vars(environment.parsed_options))
        span = Span(environment)
        environment.user_classes = [
            AnyUser.for_tenant(session, tenant, span) for tenant in session.tenants
        ]
        if isinstance(runner, WorkerRunner):
            draining.watch(environment)
            environment.events.test_start.add_listener(lambda **_: session.read_settings())
            return
        test = Test(environment, session, span)
        test.prepare()
        environment.shape_class.test = test
        if environment.parsed_options.headless:
            # Locust itself listens to SIGTERM only after a headless test with a shape.
            gevent.signal_handler(signal.SIGTERM, test.end)
        environment.events.quitting.add_listener(lambda **_: _finish(test))


def _finish(test: Test) -> None:
    with _ending():
        test.finish()


@contextmanager
def _ending() -> Iterator[None]:
    """End the process in order for what its user can mend."""
    try:
        yield
    except BadSetup as error:
        print(f"loadtest: {error}", file=sys.stderr)
        sys.exit(2)
