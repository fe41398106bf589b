"""OpenTelemetry spans around a call. Without an SDK set up they cost nothing and go nowhere.

Attributes never hold seeds, keys, prompts or output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace

_tracer = trace.get_tracer("vase_sgl.gateway")


@contextmanager
def span(name: str, *, tenant: str) -> Iterator[trace.Span]:
    """A span that is current while the body runs; an exception of the body marks it as failed."""
    # The text of an exception may quote the request, so only its type is kept.
    with _tracer.start_as_current_span(
        name,
        attributes={"vase.tenant": tenant},
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except BaseException as error:
            current.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise


def describe_eviction(current: trace.Span, eviction: Mapping[str, object] | None) -> None:
    """Note policy and budget on a span."""
    current.set_attribute("vase.policy", str(eviction["policy"]) if eviction else "none")
    if eviction:
        current.set_attribute("vase.budget", int(str(eviction["budget"])))
