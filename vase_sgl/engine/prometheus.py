"""The budget's metrics on SGLang's own `/metrics` (`--enable-metrics`), prefix `vase:`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang.srt.runtime_context import get_parallel

from vase_sgl.engine.integrity_log import logged_errors
from vase_sgl.engine.pool import BudgetPool
from vase_sgl.engine.request_cache import RequestCache
from vase_sgl.engine.slots import Slots
from vase_sgl.eviction import EvictionParams

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

#: Gauges are refreshed at most this often; a refresh looks at every running request.
_REFRESH_SECONDS = 1.0
_BUDGET_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class EngineMetrics:
    """Prometheus series of one scheduler process, labelled as `model_name` and `dp_rank`.

    `registry`: prometheus_client's default one if None.
    """

    def __init__(self, labels: dict[str, str], registry: CollectorRegistry | None = None) -> None:
        # Imported now, because SGLang decides about the multiprocess folder before.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        self._labels = labels
        names = list(labels)

        def gauge(name: str, text: str) -> Any:
            series = Gauge(
                f"vase:{name}", text, names, multiprocess_mode="mostrecent", registry=registry
            )
            return series.labels(**labels)

        def counter(name: str, text: str, *more: str) -> Any:
            series = Counter(f"vase:{name}", text, [*names, *more], registry=registry)
            return series if more else series.labels(**labels)

        self._requests = counter(
            "requests", "Requests with eviction parameters.", "policy", "prompt"
        )
        self._finished = counter(
            "finished_requests",
            "Ended requests with a budget; evicted=false: no round happened.",
            "policy",
            "evicted",
        )
        self._rounds = counter("rounds", "Eviction rounds carried out.")
        self._evicted = counter("evicted_tokens", "Tokens evicted, per layer and KV head.")
        self._seconds = counter("compaction_seconds", "Host time spent in eviction rounds.")
        self._integrity = counter(
            "integrity_errors", "Failed checks of VASE_CHECK_INTEGRITY in VASE_INTEGRITY_LOG."
        )
        self._budgets = Histogram(
            "vase:budget_tokens",
            "Budgets asked for.",
            [*names, "policy"],
            buckets=_BUDGET_BUCKETS,
            registry=registry,
        )
        self._slots = {
            "total": gauge("total_slots", "KV slots of the pool."),
            "available": gauge("available_slots", "KV slots a request could have."),
            "reserved": gauge("reserved_slots", "KV slots the running requests may hold at most."),
            "owned": gauge("owned_slots", "KV slots the running requests hold."),
        }
        self._ratio = gauge(
            "physical_to_logical_ratio",
            "Cached over seen tokens of the running requests with a budget; 1 without any.",
        )
        self._counted = (0, 0, 0.0)
        self._refreshed = 0.0

    def count_request(self, params: EvictionParams) -> None:
        """A request with valid eviction parameters has arrived."""
        policy = params.policy.name
        self._requests.labels(**self._labels, policy=policy, prompt=params.prompt).inc()
        if params.policy.evicts:
            self._budgets.labels(**self._labels, policy=policy).observe(params.budget)

    def count_finished(self, cache: RequestCache, rounds: int) -> None:
        """A request has ended after `rounds` rounds."""
        if cache.evicts:
            evicted = str(rounds > 0).lower()
            policy = cache.params.policy.name
            self._finished.labels(**self._labels, policy=policy, evicted=evicted).inc()

    def count_integrity_errors(self, count: int) -> None:
        """So many ended the workers before this one."""
        self._integrity.inc(count)

    def refresh(self, scheduler: Any) -> None:
        """Bring gauges and round counters up to date, once a second at most."""
        now = time.monotonic()
        if now - self._refreshed < _REFRESH_SECONDS:
            return
        self._refreshed = now
        slots = Slots.of(scheduler)
        for name, gauge in self._slots.items():
            gauge.set(getattr(slots, name))
        self._ratio.set(slots.physical / slots.logical if slots.logical else 1.0)
        compaction = BudgetPool.of(scheduler.req_to_token_pool).compaction
        totals = (compaction.rounds, compaction.evicted_tokens, compaction.seconds)
        series = (self._rounds, self._evicted, self._seconds)
        for one, total, counted in zip(series, totals, self._counted, strict=True):
            one.inc(total - counted)
        self._counted = totals


_metrics: EngineMetrics | None = None


def engine_metrics() -> EngineMetrics | None:
    """The metrics of this scheduler process; None without `--enable-metrics`."""
    return _metrics


def start_metrics(scheduler: Any) -> None:
    """Create the series if SGLang publishes metrics from this process.

    SGLang's own count of retractions too, in every process that may add to it: SGLang creates it
    with the first retraction, which `increase` then does not see.
    """
    global _metrics
    if scheduler.metrics_reporter.enable_metrics:
        scheduler.metrics_reporter.metrics_collector.increment_retracted_reqs(0, 0, 0)
    if scheduler.metrics_reporter.current_scheduler_metrics_enabled:
        _metrics = EngineMetrics(
            {
                "model_name": scheduler.server_args.served_model_name,
                "dp_rank": str(get_parallel().dp_rank or 0),
            }
        )
        if get_parallel().attn_tp_rank == 0:  # it counts for all
            _metrics.count_integrity_errors(logged_errors())


def refresh_metrics(result: Any, scheduler: Any, *args: Any) -> None:
    """AFTER `Scheduler.process_batch_result` and `Scheduler.on_idle`."""
    if _metrics is not None:
        _metrics.refresh(scheduler)
