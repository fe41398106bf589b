"""OpenTelemetry spans around a call. Without a provider there are none.

A call's span is the child of the caller's, by the W3C header `traceparent`; in it lie the wait in
the queue and one span for each worker that was tried, which is the parent of the worker's own.
Attributes never hold seeds, keys, prompts or output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vase_sgl.gateway.workers import WorkerChunk, WorkerInfo, WorkerRequest

_SCOPE = "vase_sgl.gateway"
#: None: spans go nowhere, so none are made; the caller's context is passed on all the same.
_tracer: trace.Tracer | None = None
_propagator = TraceContextTextMapPropagator()

#: What this system is called in `gen_ai.provider.name`.
PROVIDER = "vase_sgl"


def use(provider: trace.TracerProvider | None) -> None:
    """Send the spans of this process to `provider`. None: nowhere."""
    global _tracer
    _tracer = None if provider is None else provider.get_tracer(_SCOPE)


@contextmanager
def caller(headers: Iterable[tuple[str, str | bytes]]) -> Iterator[None]:
    """Make the spans of the body children of the caller's, if `headers` name one.

    Where the environment instruments the server it has made a span from them already, which stays.
    """
    if trace.get_current_span().get_span_context().is_valid:
        yield
        return
    carrier = {
        name.lower(): value
        for name, value in headers
        if name.lower() in _propagator.fields and isinstance(value, str)
    }
    token = context.attach(_propagator.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)


def outgoing() -> dict[str, str]:
    """HTTP headers that make the receiver's spans children of the current one."""
    headers: dict[str, str] = {}
    _propagator.inject(headers)
    return headers


def trace_id() -> str | None:
    """32 hex digits of the current trace. None: there is none."""
    current = trace.get_current_span().get_span_context()
    return trace.format_trace_id(current.trace_id) if current.is_valid else None


@contextmanager
def span(name: str, *, tenant: str) -> Iterator[trace.Span]:
    """The span of a call, current while the body runs; an exception marks it as failed."""
    with _span(name, trace.SpanKind.SERVER, {"vase.tenant": tenant}) as current:
        yield current


@contextmanager
def waiting() -> Iterator[None]:
    """The span of the wait in the queue."""
    with _span("vase.queue", trace.SpanKind.INTERNAL, {}):
        yield


class WorkerSpan:
    """The span of one request on one worker; eviction rounds are its events."""

    def __init__(self, current: trace.Span) -> None:
        self._span = current
        self._rounds = 0

    def see(self, chunk: WorkerChunk) -> None:
        """Note rounds, and at the end what it came to."""
        cache = chunk.cache
        if cache is not None and cache.rounds > self._rounds:
            self._rounds = cache.rounds
            self._span.add_event(
                "vase.eviction_round",
                {
                    "vase.round": cache.rounds,
                    "vase.evicted_tokens": cache.evicted_tokens,
                    "vase.physical_length": cache.physical_length,
                    "vase.logical_length": cache.logical_length,
                },
            )
        if chunk.finish is not None:
            self._span.set_attribute("gen_ai.usage.output_tokens", len(chunk.token_ids))
            self._span.set_attribute("gen_ai.response.finish_reasons", [chunk.finish.reason])


@contextmanager
def on_worker(
    operation: str, name: str, info: WorkerInfo, request: WorkerRequest
) -> Iterator[WorkerSpan]:
    """The span of `request` on the worker `name`."""
    model = info.fingerprint.get("model", "")
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": int(request.sampling["max_new_tokens"]),
        "gen_ai.request.temperature": float(request.sampling["temperature"]),
        "gen_ai.request.top_p": float(request.sampling["top_p"]),
        "gen_ai.response.id": request.request_id,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "vase.worker": name,
    }
    with _span(f"{operation} {model}", trace.SpanKind.CLIENT, attributes) as current:
        yield WorkerSpan(current)


def describe_eviction(current: trace.Span, eviction: Mapping[str, object] | None) -> None:
    """Note policy and budget on a span."""
    current.set_attribute("vase.policy", str(eviction["policy"]) if eviction else "none")
    if eviction:
        current.set_attribute("vase.budget", int(str(eviction["budget"])))


@contextmanager
def _span(
    name: str, kind: trace.SpanKind, attributes: Mapping[str, str | int | float]
) -> Iterator[trace.Span]:
    if _tracer is None:
        yield trace.INVALID_SPAN
        return
    # The text of an exception may quote the request, so only its type is kept.
    with _tracer.start_as_current_span(
        name,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except BaseException as error:
            current.set_status(trace.StatusCode.ERROR, type(error).__name__)
            current.set_attribute("error.type", type(error).__name__)
            raise
