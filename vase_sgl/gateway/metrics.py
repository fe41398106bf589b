"""What the gateway counts and measures, as OpenTelemetry instruments.

Names follow the GenAI semantic conventions where these have one. The label `vase.tenant` only ever
holds names from the tenants file: who is not known has no tenant. Histograms have it on demand:
each is some twenty lines of a page, and those of a thousand tenants take seconds to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from vase_sgl.gateway.breaker import BreakerState
from vase_sgl.gateway.telemetry import PROVIDER

if TYPE_CHECKING:
    from vase_sgl.gateway.audit import Record
    from vase_sgl.gateway.fleet import WorkerStatus

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


class Metrics:
    """The instruments. Calls are cheap, and go nowhere without a reader."""

    def __init__(self, provider: MeterProvider, *, tenant_histograms: bool = False) -> None:
        """`tenant_histograms`: label the histograms by tenant, as the counters are."""
        self._tenant_histograms = tenant_histograms
        meter = self._meter = provider.get_meter("vase_sgl.gateway")
        self._requests = meter.create_counter(
            "vase.requests", description="Requests that ended, by tenant, operation and outcome."
        )
        self._rejections = meter.create_counter(
            "vase.rejections", description="Requests refused before they ran, by reason."
        )
        self._retries = meter.create_counter(
            "vase.worker.retries", description="Requests that went on to another worker."
        )
        self._used = meter.create_counter(
            "vase.tokens",
            unit="{token}",
            description="Prompt (input) and output tokens of requests that ended, by tenant.",
        )
        self._rounds = meter.create_counter(
            "vase.eviction.rounds", description="Eviction rounds of requests that ended."
        )
        self._evicted = meter.create_counter(
            "vase.eviction.tokens",
            unit="{token}",
            description="Tokens evicted, per layer and KV head.",
        )
        self._queue = meter.create_histogram(
            "vase.queue.duration",
            unit="s",
            description="Wait for a worker with room.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            unit="s",
            description="Arrival of a request to the end of its output.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._ttft = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="Arrival of a request to its first output token.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._tpot = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            unit="s",
            description="Time per output token after the first.",
            explicit_bucket_boundaries_advisory=_TOKEN_SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Prompt (input) and output tokens of a request.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )
        self._commit = meter.create_histogram(
            "vase.audit.commit.duration",
            unit="s",
            description="Wait of a request that ended for its record to be stored.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.open_requests = 0
        meter.create_observable_gauge(
            "vase.requests.open",
            [lambda _: [Observation(self.open_requests)]],
            description="Requests at the gateway now, waiting or running.",
        )

    def watch(
        self, workers: Callable[[], Iterable[WorkerStatus]], waiting: Callable[[], int]
    ) -> None:
        """Observe the workers and the queue from now on.

        Both are called from other threads.
        """

        def gauge(name: str, value: Callable[[WorkerStatus], int], description: str) -> None:
            def observe(_: CallbackOptions) -> list[Observation]:
                return [Observation(value(w), {"vase.worker": w.name}) for w in workers()]

            self._meter.create_observable_gauge(name, [observe], description=description)

        gauge("vase.worker.ready", lambda w: int(w.ready), "Whether the worker answers.")
        gauge("vase.worker.in_flight", lambda w: w.in_flight, "Requests this gateway gave it.")
        gauge("vase.worker.reserved_slots", lambda w: w.reserved_slots, "Reserved KV slots.")

        def breakers(_: CallbackOptions) -> list[Observation]:
            return [
                Observation(
                    int(worker.breaker is state),
                    {"vase.worker": worker.name, "vase.breaker.state": state.value},
                )
                for worker in workers()
                for state in BreakerState
            ]

        self._meter.create_observable_gauge(
            "vase.worker.breaker",
            [breakers],
            description="1 for its state, else 0.",
        )
        self._meter.create_observable_gauge(
            "vase.queue.waiting",
            [lambda _: [Observation(waiting())]],
            description="Requests that wait for a worker.",
        )

    def watch_store(self, write_failures: Callable[[], int]) -> None:
        """Observe the audit store from now on."""
        self._meter.create_observable_counter(
            "vase.audit.write_failures",
            [lambda _: [Observation(write_failures())]],
            description="Batches of records that could not be written; their answers failed.",
        )

    def ended(self, tenant: str, operation: str, outcome: str) -> None:
        """A request that was let in has ended; `outcome` is the name of its gRPC status."""
        labels = {"vase.tenant": tenant, "vase.operation": operation, "vase.outcome": outcome}
        self._requests.add(1, labels)

    def rejected(self, reason: str, tenant: str = "") -> None:
        """A request was refused before it ran. Without a tenant: nobody knows whose it was."""
        self._rejections.add(1, {"vase.tenant": tenant, "vase.reason": reason})

    def retried(self) -> None:
        """A request goes on to another worker."""
        self._retries.add(1)

    def waited(self, tenant: str, seconds: float) -> None:
        """A request left the queue, with a worker or without."""
        self._queue.record(seconds, self._tenant(tenant))

    def answered(
        self, tenant: str, operation: str, fingerprint: Mapping[str, str], seconds: float
    ) -> None:
        """The first token of a generation came from a worker of this fingerprint."""
        self._ttft.record(seconds, self._labels(tenant, operation, fingerprint))

    def stored(self, seconds: float) -> None:
        """A record was stored, or could not be."""
        self._commit.record(seconds)

    def generated(self, record: Record, operation: str, error: str | None) -> None:
        """A generation ended. `error`: the name of its gRPC status, unless it completed."""
        timings, output = record.timings, len(record.output_token_ids)
        labels = self._labels(record.tenant, operation, record.fingerprint)
        failed = {} if error is None else {"error.type": error}
        self._duration.record(timings.total_seconds, labels | failed)
        if timings.ttft_seconds is not None and output > 1:
            rest = timings.total_seconds - timings.ttft_seconds
            self._tpot.record(rest / (output - 1), labels)
        for kind, tokens in (("input", len(record.prompt_token_ids)), ("output", output)):
            self._tokens.record(tokens, labels | {"gen_ai.token.type": kind})
            self._used.add(tokens, {"vase.tenant": record.tenant, "gen_ai.token.type": kind})
        if record.cache is not None and record.eviction is not None:
            evicted = {"vase.tenant": record.tenant, "vase.policy": str(record.eviction["policy"])}
            self._rounds.add(record.cache.rounds, evicted)
            self._evicted.add(record.cache.evicted_tokens, evicted)

    def _labels(
        self, tenant: str, operation: str, fingerprint: Mapping[str, str]
    ) -> dict[str, str]:
        """Of the histograms that the GenAI conventions name."""
        return {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": fingerprint.get("model", ""),
            **self._tenant(tenant),
        }

    def _tenant(self, tenant: str) -> dict[str, str]:
        """Of all histograms."""
        return {"vase.tenant": tenant} if self._tenant_histograms else {}
