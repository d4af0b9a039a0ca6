# Needs: opentelemetry-api. Install: pip install 'vgi-rpc-onefile[otel]'. Seams: DispatchHook, CallHook, BatchStore.
"""Traces and metrics of calls (observability.md section 2).

    instrument_server(server)              a span and two measurements for every dispatched call
    calc = instrument_client(calc)         a span for every call of this proxy, which the server's span is a child of
    store = instrument_store(store)        a span for every object that is uploaded or fetched; a server's has them

The application chooses providers, samplers and exporters, and needs the SDK for that; without one, contexts are passed
on and nothing is recorded. The parent of a server's span is, in this order: the trace context of the request's batch;
what is current in the thread, if the HTTP header is of that trace (an instrumented WSGI server); the HTTP header; what
is current.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry import context, metrics, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from . import core as _bound_core
from .common.urls import redact_url

if TYPE_CHECKING:
    import falcon
    import pyarrow as pa

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "OtelConfig",
    "TraceMiddleware",
    "instrument_client",
    "instrument_server",
    "instrument_store",
    "make_auth_failure_counter",
]

_P = TypeVar("_P")
_LOG = logging.getLogger("vgi_rpc.otel")
_SCOPE = ("vgi_rpc", core.__version__)
_W3C = TraceContextTextMapPropagator()
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
# The span of the call that this thread dispatches: what a method has left current is not it.
_dispatched: contextvars.ContextVar[trace.Span | None] = contextvars.ContextVar("vgi_rpc_otel", default=None)
_STATISTICS = ("input_batches", "output_batches", "input_rows", "output_rows", "input_bytes", "output_bytes")


@dataclasses.dataclass(frozen=True)
class OtelConfig:
    """What is recorded, and where it goes.

    Args:
        tracer_provider, meter_provider: None is the global one.
        record_exceptions: failed calls have an `exception` event.
        custom_attributes: on every span, and on `rpc.server.auth_failure`.
        claim_attributes: claim -> attribute of server spans, for claims that are str, int, float or bool.
        error_redactor: what spans say instead of an error's text, which may hold a user's data; its stack trace is
            then left out. A server with `include_tracebacks=False` says the class name by default.
    """

    tracer_provider: trace.TracerProvider | None = None
    meter_provider: metrics.MeterProvider | None = None
    enable_tracing: bool = True
    enable_metrics: bool = True
    record_exceptions: bool = True
    custom_attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    claim_attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    error_redactor: Callable[[BaseException], str] | None = None


def instrument_server(server: core.RpcServer, config: OtelConfig | None = None) -> core.RpcServer:
    """Record every call that `server` dispatches; returns it. Do it before serving; a second time replaces the first.

    Its `external_location` is instrumented, too (`instrument_store`).
    Records of the access log get `trace_id` and `span_id`: those of the call's span, else of the current one.
    """
    hook = _ServerHook(server, _checked(config))
    for old in server.dispatch_hooks:
        if isinstance(old, _ServerHook):
            server.remove_dispatch_hook(old)
    server.add_dispatch_hook(hook)
    if server.external_location is not None:
        server.external_location = instrument_store(server.external_location, config)
    logging.getLogger("vgi_rpc.access").addFilter(_correlate)  # which a logger holds at most once
    return server


def instrument_client(proxy: _P, config: OtelConfig | None = None) -> _P:
    """Return a proxy on the same connection whose calls have spans, and whose requests carry their context.

    The context travels in the metadata of the request, over HTTP in the headers `traceparent` and `tracestate` of every
    request; without tracing (`enable_tracing=False`) it is that of the current span. The span of a stream ends with
    the stream.
    """
    return core.with_options(proxy, call_hook=_ClientHook(_checked(config)))


def instrument_store(store: core.BatchStore, config: OtelConfig | None = None) -> core.BatchStore:
    """Return a store that does the same with spans (observability.md section 2); one that has spans gets other ones.

    `vgi_rpc.external/upload` has `url`, `upload_bytes` and `original_bytes`, and `compression` if the store compresses;
    `vgi_rpc.external/fetch` has `url` and `fetch_duration_ms`. URLs are without query. Requests that an HTTP client
    uploads because they are too large have none.
    """
    inner = store._inner if isinstance(store, _TracedStore) else store
    config = _checked(config)
    return _TracedStore(inner, config) if config.enable_tracing else inner


def make_auth_failure_counter(config: OtelConfig, protocol_name: str) -> Callable[[str | None, str], None]:
    """Return what counts refused requests: `count(who, error_type)`. Who it was is not recorded: it has no bound."""
    if not config.enable_metrics:
        return lambda who, error_type: None
    counter = _meter(config).create_counter(
        "rpc.server.auth_failure", "{failure}", "Requests whose caller was not let in"
    )
    always = {**config.custom_attributes, "rpc.system": "vgi_rpc", "rpc.service": protocol_name}
    return lambda who, error_type: counter.add(1, {**always, "error.type": error_type})


class TraceMiddleware:
    """Falcon middleware: the caller's context is current while `authenticate` runs; make_wsgi_app adds it."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Make it current."""
        fields = {name: req.get_header(name, default="") for name in ("traceparent", "tracestate")}
        req.context.otel_token = context.attach(_parent(fields))

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Restore what was current; falcon comes here after every error, too."""
        token = getattr(req.context, "otel_token", None)
        if token is not None:
            context.detach(token)


# ---- a server's calls


@dataclasses.dataclass(slots=True)
class _Call:
    """One dispatched call."""

    started: float
    labels: dict[str, str]
    span: trace.Span | None = None
    attached: Any = None
    dispatched: Any = None


class _ServerHook:
    """A core.DispatchHook. Nothing in it outlives a call: what it makes current, it takes away in the same thread."""

    def __init__(self, server: core.RpcServer, config: OtelConfig) -> None:
        self._server = server
        self._config = config
        self._tracer = _tracer(config)
        meter = _meter(config)
        self._requests = meter.create_counter("rpc.server.requests", "{request}", "Calls that were dispatched")
        self._duration = meter.create_histogram(
            "rpc.server.duration",
            "s",
            "Time from dispatch to the answer",
            explicit_bucket_boundaries_advisory=_SECONDS,  # the SDK's own are milliseconds
        )

    def on_dispatch_start(
        self,
        info: core.RpcMethodInfo,
        auth: core.AuthContext,
        transport_metadata: Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> _Call:
        labels = _labels(info, info.protocol_name or self._server.protocol_name)
        if auth.domain:
            labels["rpc.vgi_rpc.auth.domain"] = auth.domain
        call = _Call(time.perf_counter(), labels)
        if self._config.enable_tracing:
            parent = _parent(transport_metadata)
            call.span = self._tracer.start_span(
                f"vgi_rpc/{info.name}",
                parent,
                trace.SpanKind.SERVER,
                {**labels, **self._attributes(auth, transport_metadata)},
            )
            call.attached = context.attach(trace.set_span_in_context(call.span, parent))
            call.dispatched = _dispatched.set(call.span)
        return call

    def on_dispatch_end(
        self,
        token: _Call,
        info: core.RpcMethodInfo,
        error: BaseException | None,
        *,
        stats: core.CallStatistics | None = None,
    ) -> None:
        with contextlib.ExitStack() as ends:
            if token.attached is not None:
                ends.callback(context.detach, token.attached)
                ends.callback(_dispatched.reset, token.dispatched)
            if token.span is not None:
                ends.callback(token.span.end)
                self._conclude(token.span, error, stats)
            if self._config.enable_metrics:
                labels = {**token.labels, "status": "ok" if error is None else "error"}
                self._requests.add(1, labels)
                self._duration.record(time.perf_counter() - token.started, labels)

    def _attributes(self, auth: core.AuthContext, transport_metadata: Mapping[str, Any]) -> dict[str, str]:
        config = self._config
        found = {
            **config.custom_attributes,
            "rpc.vgi_rpc.server_id": self._server.server_id,
            "rpc.vgi_rpc.auth.authenticated": "true" if auth.authenticated else "false",
        }
        optional = {
            "rpc.vgi_rpc.auth.principal": auth.principal,
            "client.address": transport_metadata.get("remote_addr"),
            "user_agent.original": transport_metadata.get("user_agent"),
        }
        found.update((name, str(value)) for name, value in optional.items() if value)
        for claim, name in config.claim_attributes.items():
            value = auth.claims.get(claim)
            if isinstance(value, str | int | float):
                found[name] = str(value)
        return found

    def _conclude(self, span: trace.Span, error: BaseException | None, stats: core.CallStatistics | None) -> None:
        if stats is not None:
            span.set_attributes({f"rpc.vgi_rpc.{name}": getattr(stats, name) for name in _STATISTICS})
        if error is None:
            span.set_status(trace.StatusCode.OK)
            return
        blames = core.error_code_of(error) in core.OTEL_SERVER_ERROR_CODES
        _fail(span, error, self._config, blames=blames, may_quote=self._server.include_tracebacks)


# ---- a client's calls


class _ClientHook:
    """A core.CallHook. A span is never current: a stream's would stay so after its call."""

    def __init__(self, config: OtelConfig) -> None:
        self._config = config
        self._tracer = _tracer(config)

    def on_call_start(self, info: core.RpcMethodInfo, metadata: dict[bytes, bytes]) -> trace.Span | None:
        span, sent = None, context.get_current()
        if self._config.enable_tracing:
            attributes = {**self._config.custom_attributes, **_labels(info, info.protocol_name)}
            span = self._tracer.start_span(f"vgi_rpc/{info.name}", sent, trace.SpanKind.CLIENT, attributes)
            sent = trace.set_span_in_context(span, sent)
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, sent)
        metadata.update((name.encode(), value.encode()) for name, value in carrier.items())
        return span

    def on_call_end(self, token: trace.Span | None, info: core.RpcMethodInfo, error: BaseException | None) -> None:
        if token is None:
            return
        try:
            if error is not None:
                _fail(token, error, self._config, blames=True, may_quote=True)
        finally:
            token.end()


# ---- both


class _TracedStore:
    """A core.BatchStore; whatever else it is asked for is the inner one's."""

    def __init__(self, inner: core.BatchStore, config: OtelConfig) -> None:
        self._inner = inner
        self._config = config
        self._tracer = _tracer(config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def wants(self, batch: pa.RecordBatch) -> bool:
        return self._inner.wants(batch)

    def save(self, schema: pa.Schema, data: bytes) -> tuple[str, str, int]:
        with self._span("upload", {"original_bytes": len(data)}) as span:
            url, sha256, stored = self._inner.save(schema, data)
            span.set_attributes({"url": redact_url(url), "upload_bytes": stored})
            compression = getattr(self._inner, "compression", None)
            if compression is not None:
                span.set_attribute("compression", str(compression.algorithm))
            return url, sha256, stored

    def load(self, url: str, sha256: str | None, timeout: float | None) -> tuple[bytes, float]:
        with self._span("fetch", {"url": redact_url(url)}) as span:
            data, seconds = self._inner.load(url, sha256, timeout)
            span.set_attribute("fetch_duration_ms", seconds * 1000)
            return data, seconds

    @contextlib.contextmanager
    def _span(self, what: str, attributes: Mapping[str, str | int]) -> Iterator[trace.Span]:
        """Ends on every path. Of foreign errors only the class is shown: their texts may hold a signed URL."""
        given = {**self._config.custom_attributes, **attributes}
        span = self._tracer.start_span(f"vgi_rpc.external/{what}", None, trace.SpanKind.CLIENT, given)
        try:
            yield span
        except BaseException as exc:
            _fail(span, exc, self._config, blames=True, may_quote=isinstance(exc, core.ExternalLocationError))
            raise
        finally:
            span.end()


def _checked(config: OtelConfig | None) -> OtelConfig:
    if config is None:
        return OtelConfig()
    if not isinstance(config, OtelConfig):
        raise TypeError(f"expected an OtelConfig, got {type(config).__name__}")
    return config


def _tracer(config: OtelConfig) -> trace.Tracer:
    return trace.get_tracer(*_SCOPE, tracer_provider=config.tracer_provider)


def _meter(config: OtelConfig) -> metrics.Meter:
    return metrics.get_meter(*_SCOPE, meter_provider=config.meter_provider)


def _labels(info: core.RpcMethodInfo, service: str) -> dict[str, str]:
    """What spans and measurements share; none of it is a caller's to choose, so it is bounded."""
    return {
        "rpc.system": "vgi_rpc",
        "rpc.service": service,
        "rpc.method": info.name,
        "rpc.vgi_rpc.method_type": info.method_type.value,
    }


def _parent(fields: Mapping[str, Any]) -> context.Context:
    """The context that a request belongs to; a trace context that is malformed counts as absent."""
    current = context.get_current()
    parent = fields.get("traceparent")
    if not parent:
        return current
    carrier = {"traceparent": parent, "tracestate": fields.get("tracestate", "")}
    found = _W3C.extract(carrier, context.Context())
    known = trace.get_current_span(found).get_span_context()
    if not known.is_valid or known.trace_id == trace.get_current_span(current).get_span_context().trace_id:
        return current
    return found


def _fail(span: trace.Span, error: BaseException, config: OtelConfig, *, blames: bool, may_quote: bool) -> None:
    """Write an error into a span; `may_quote`: its text and its stack may be shown."""
    kind = error.error_type if isinstance(error, core.RpcError) else type(error).__name__
    span.set_attribute("rpc.vgi_rpc.error_type", kind)
    span.set_attribute("rpc.vgi_rpc.error_code", str(core.error_code_of(error)))
    text = core.exception_str(error) if may_quote else kind
    if config.error_redactor is not None:
        try:
            text = str(config.error_redactor(error))
        except Exception:
            text = kind
    if blames:
        span.set_status(trace.StatusCode.ERROR, text)
    if not config.record_exceptions:
        return
    if may_quote and config.error_redactor is None:
        span.record_exception(error)
    else:
        span.add_event("exception", {"exception.type": kind, "exception.message": text})


def _correlate(record: logging.LogRecord) -> bool:
    """A filter that drops nothing: it gives access records the ids of their span (runtime.md section 6)."""
    try:
        current = (_dispatched.get() or trace.get_current_span()).get_span_context()
        if current.is_valid:
            record.trace_id = trace.format_trace_id(current.trace_id)
            record.span_id = trace.format_span_id(current.span_id)
    except Exception:
        _LOG.debug("no ids for an access record", exc_info=True)
    return True
