"""Traces, by OpenTelemetry: what was done for a request, in every process, under the trace id of whoever made it.

Spans are made by OpenTelemetry's API, which does nothing until `start` has set up its SDK, part of `graft[telemetry]`.
Knows spans and where they are sent; not requests, not jobs.
"""

import importlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import structlog
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind

from app.settings import Settings

# What a process waits at its end for a collector that does not answer; the spans that are left are lost.
LAST_EXPORT_SECONDS = 2.0

# Either of them turns tracing on, as with any program that OpenTelemetry's SDK is in.
_STANDARD_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

# The names of headers, and their values, by which a trace is handed on: `traceparent` for one.
TraceContext = dict[str, str]

log = structlog.get_logger(__name__)


def start(settings: Settings, *, service: str) -> None:
    """Has this process send its spans, if the settings or the standard variables (`OTEL_…`) name a collector.

    service: `service.name`, unless OTEL_SERVICE_NAME says another. Without the extra this is told, and nothing is sent.
    """
    named = settings.otlp_endpoint or any(os.environ.get(name) for name in _STANDARD_ENDPOINTS)
    if not named or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return
    try:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ModuleNotFoundError as error:
        log.warning("tracing_is_off", reason=f"There is no {error.name}.", remedy="pip install 'graft[telemetry]'")
        return
    said = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or service, "service.version": version("graft")}
    # Ended by `stop`, within limits: what the SDK would do by itself at exit may wait for half a minute.
    provider = sdk.TracerProvider(resource=resources.Resource.create(said), shutdown_on_exit=False)
    endpoint = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces" if settings.otlp_endpoint else None
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)


def stop() -> None:
    """Sends what is left, within LAST_EXPORT_SECONDS. Nothing is traced after."""
    provider: Any = trace.get_tracer_provider()
    if is_on():
        ending = threading.Thread(target=provider.shutdown, daemon=True)
        ending.start()
        ending.join(LAST_EXPORT_SECONDS)


def is_on() -> bool:
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def carrier(span: Span | None = None) -> TraceContext | None:
    """What another process goes on with the trace by: from `span`, or from the one that this code runs in."""
    found: TraceContext = {}
    propagate.inject(found, context=None if span is None else trace.set_span_in_context(span))
    return found or None


def current_span() -> Span:
    return trace.get_current_span()


def bind_trace_id(span: Span) -> None:
    """Has what is logged from here on, in this context, say which trace it belongs to."""
    structlog.contextvars.bind_contextvars(trace_id=_hexadecimal(span))


def start_span(
    name: str,
    context: Mapping[str, str] | Context | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    start_time: int | None = None,
    **attributes: Any,
) -> Span:
    """A span, to be ended by its caller. context: what it is part of, from a carrier; else what this code runs in.

    start_time: in nanoseconds since 1970. attributes: with `_` for `.` in their names; None is left out.
    """
    parent = context if isinstance(context, Context) else (propagate.extract(context) if context else None)
    told = {key.replace("_", "."): value for key, value in attributes.items() if value is not None}
    return _tracer().start_span(name, context=parent, kind=kind, attributes=told, start_time=start_time)


@contextmanager
def continued(
    name: str, context: Mapping[str, str] | None, *, kind: SpanKind = SpanKind.INTERNAL, **attributes: Any
) -> Iterator[Span]:
    """A span around a block, as `start_span` makes it; what is logged within has its `trace_id`."""
    span = start_span(name, context, kind=kind, **attributes)
    if is_on():
        bind_trace_id(span)
    with trace.use_span(span, end_on_exit=True):
        yield span


def trace_id(context: Mapping[str, str] | None) -> str | None:
    """Of a carrier, as log lines and trace viewers write it; None if it has none."""
    if not context:
        return None
    span = trace.get_current_span(propagate.extract(context))
    return _hexadecimal(span) if span.get_span_context().is_valid else None


def _hexadecimal(span: Span) -> str:
    return trace.format_trace_id(span.get_span_context().trace_id)


def _tracer() -> trace.Tracer:
    return trace.get_tracer("graft", version("graft"))
