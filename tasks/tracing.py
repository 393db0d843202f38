"""OpenTelemetry spans along a job's way, sent by OTLP where OTEL_EXPORTER_OTLP_ENDPOINT says so.

Without that variable nothing is imported and every call here costs next to nothing. With it, one trace holds a job from
the request that made it to the fold of its outcome: who publishes its message notes the traceparent (W3C Trace Context)
in the message's headers for the worker, and in the store for whoever sends it again or folds it. Spans carry ids,
types and outcomes; never what a client sent.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from tasks.settings import SettingsError

#: OTLP's own variables; the SDK and its exporter read the others of theirs by themselves.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
INSTALL = "pip install -r requirements/traces.txt"

Kind = Literal["internal", "server", "producer", "consumer"]

_provider: Any = None
_tracer: Any = None
_OFF: AbstractContextManager[Any] = nullcontext()


def start(service: str, environ: Mapping[str, str]) -> None:
    """Send this process's spans, if the environment names where to. Raises SettingsError without the packages."""
    global _provider, _tracer
    if _tracer is not None or not wanted(environ):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(f"Traces are switched on, but {error.name} is not installed: {INSTALL}") from error
    resource = Resource.create({"service.name": environ.get("OTEL_SERVICE_NAME") or f"gpu-{service}"})
    _provider = TracerProvider(resource=resource)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("gpu-inference")


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for traces."""
    return environ.get("OTEL_SDK_DISABLED", "").lower() != "true" and any(environ.get(name) for name in ENDPOINTS)


def stop() -> None:
    """Send what is left; no more spans are made."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


def on() -> bool:
    """Whether spans are made."""
    return _tracer is not None


def span(
    name: str, *, parent: str = "", kind: Kind = "internal", **attributes: str | int | float | None
) -> AbstractContextManager[Any]:
    """A span around a block, below the one at hand or `parent` (a traceparent); gives the span, None while off."""
    return _OFF if _tracer is None else _span(name, parent, kind, attributes)


def traceparent() -> str:
    """The span at hand, for another process; empty if there is none."""
    if _tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def _span(name: str, parent: str, kind: Kind, attributes: Mapping[str, str | int | float | None]) -> Any:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    known = {f"gpu.{key}": value for key, value in attributes.items() if value is not None}
    with _tracer.start_as_current_span(
        name,
        context,
        kind=trace.SpanKind[kind.upper()],
        attributes=known,
        # Its words may quote what a client sent.
        record_exception=False,
        set_status_on_exception=False,
    ) as made:
        try:
            yield made
        except Exception as error:
            made.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
