"""OpenTelemetry: one trace from a client's span through the server's to the access record, and no other trace in it."""

# ruff: noqa: E402 (what may be missing is looked for first)
from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pytest

pytest.importorskip("opentelemetry.sdk")
waitress: Any = pytest.importorskip("waitress")
pytest.importorskip("falcon")

from opentelemetry import baggage, context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.extras.served import served_proxy

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

NUMBERS = pa.schema([pa.field("n", pa.int64())])
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
OTHER = PARENT.replace("4bf9", "aaaa")


class Teapot(Exception):
    error_code = "NOT_FOUND"


@dataclasses.dataclass
class CountState(core.ProducerState):
    at: int
    end: int

    def produce(self, out: Any, ctx: Any) -> None:
        if self.at == 2 and self.end == 13:
            raise ValueError("unlucky")
        if self.at >= self.end:
            out.finish()
            return
        out.emit_pydict({"n": [self.at]})
        self.at += 1


@dataclasses.dataclass
class SumState(core.ExchangeState):
    total: int

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        self.total += sum(input.batch.column("n").to_pylist())
        out.emit_pydict({"n": [self.total]})


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def fail(self, kind: str) -> float: ...
    def inner(self) -> str: ...
    def count(self, end: int) -> core.Stream[core.ProducerState]: ...
    def total(self) -> core.Stream[core.ExchangeState]: ...


class Impl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def fail(self, kind: str) -> float:
        if kind == "interrupt":
            raise KeyboardInterrupt
        raise Teapot("short and stout") if kind == "client" else ValueError("secret of a user")

    def inner(self) -> str:
        """The current span; leaves another one current, as careless code does."""
        span = trace.get_current_span().get_span_context()
        context.attach(trace.set_span_in_context(trace.NonRecordingSpan(trace.SpanContext(7, 7, False))))
        return f"{span.trace_id:032x} {span.span_id:016x}"

    def count(self, end: int) -> core.Stream[CountState]:
        return core.Stream(NUMBERS, CountState(0, end))

    def total(self) -> core.Stream[SumState]:
        return core.Stream(NUMBERS, SumState(0), NUMBERS)


class Telemetry:
    """Providers of one party, and what they have recorded."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader])

    def config(self, **options: Any) -> Any:
        return otel().OtelConfig(tracer_provider=self.tracers, meter_provider=self.meters, **options)

    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def points(self) -> dict[str, list[NumberDataPoint | HistogramDataPoint]]:
        data = self.reader.get_metrics_data()
        found: dict[str, Any] = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                assert (scope.scope.name, scope.scope.version) == ("vgi_rpc", core.__version__)
                for metric in scope.metrics:
                    found[f"{metric.name} {metric.unit}"] = list(metric.data.data_points)
        return found


def otel() -> Any:
    loaded: Any = core
    return sys.modules[loaded.OtelConfig.__module__]


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def parent(span: ReadableSpan) -> tuple[str, str]:
    return ("", "") if span.parent is None else (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}")


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


class Records(logging.Handler):
    """The access records, as dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(dict(vars(record)))


@pytest.fixture
def access() -> Iterator[list[dict[str, Any]]]:
    logger, handler = logging.getLogger("vgi_rpc.access"), Records()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.found
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@contextlib.contextmanager
def http(server: core.RpcServer, **options: Any) -> Iterator[str]:
    """The server on waitress; gives its URL."""
    door: Any = core
    app = door.make_wsgi_app(server, token_key=b"k" * 32, **options)
    listener = waitress.create_server(app, host="127.0.0.1", port=0, threads=1)
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            listener.asyncore.loop(timeout=1, map=listener._map, count=1)
        listener.task_dispatcher.shutdown()
        listener.asyncore.close_all(listener._map)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.effective_port}"
    finally:
        ended.set()
        listener.pull_trigger()
        thread.join(10)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(kind: str, server: core.RpcServer, **options: Any) -> Iterator[Any]:
    """A proxy of the server over a pipe, a Unix socket, or HTTP."""
    door: Any = core
    if kind == "http":
        with http(server, **options) as url, door.http_connect(Calc, url, timeout=20) as proxy:
            yield proxy
        return
    with served_proxy(Calc, server, over=kind) as proxy:
        yield proxy


def make(far: Telemetry, **options: Any) -> core.RpcServer:
    server: core.RpcServer = otel().instrument_server(
        core.RpcServer(Calc, Impl(), server_id="s1"), far.config(**options)
    )
    return server


KINDS = pytest.mark.parametrize("kind", ["pipe", "unix", "http"])


@KINDS
def test_one_trace_from_the_client_to_the_access_record(kind: str, access: list[dict[str, Any]]) -> None:
    near, far = Telemetry(), Telemetry()
    tracer = near.tracers.get_tracer("test")
    with serving(kind, make(far)) as plain:
        proxy = otel().instrument_client(plain, near.config())
        with tracer.start_as_current_span("work"):
            assert proxy.add(1.0, b=2.0) == 3.0
            inner = proxy.inner()
        assert plain.add(2.0, 2.0) == 4.0
    first, second, work = near.spans()
    spans = far.spans()
    for client, server, record in zip((first, second), spans, access, strict=False):
        assert parent(client) == ids(work)
        assert parent(server) == ids(client)
        assert (record["trace_id"], record["span_id"]) == ids(server)
        assert (client.name, client.kind, server.kind) == (server.name, SpanKind.CLIENT, SpanKind.SERVER)
    assert first.name == "vgi_rpc/add"
    assert inner.split() == list(ids(spans[1]))
    # The call without context came last, over the same connection and thread, and is of no trace but its own.
    assert parent(spans[2]) == ("", "")
    assert (access[2]["trace_id"], access[2]["span_id"]) == ids(spans[2])
    assert len(spans) == len(access) == 3


@KINDS
def test_span_attributes_and_statistics(kind: str) -> None:
    near, far = Telemetry(), Telemetry()
    with serving(kind, make(far, custom_attributes={"deployment": "blue"})) as plain:
        proxy = otel().instrument_client(plain, near.config(custom_attributes={"deployment": "green"}))
        proxy.add(1.0, 2.0)
    found = attributes(far.spans()[0])
    if kind == "http":
        assert found.pop("client.address") == "127.0.0.1"
        assert found.pop("user_agent.original").startswith("vgi-rpc/")
    shared = {
        "rpc.system": "vgi_rpc",
        "rpc.service": "Calc",
        "rpc.method": "add",
        "rpc.vgi_rpc.method_type": "unary",
    }
    assert found == {
        **shared,
        "deployment": "blue",
        "rpc.vgi_rpc.server_id": "s1",
        "rpc.vgi_rpc.auth.authenticated": "false",
        "rpc.vgi_rpc.input_batches": 1,
        "rpc.vgi_rpc.output_batches": 1,
        "rpc.vgi_rpc.input_rows": 1,
        "rpc.vgi_rpc.output_rows": 1,
        "rpc.vgi_rpc.input_bytes": 16,
        "rpc.vgi_rpc.output_bytes": 8,
    }
    assert attributes(near.spans()[0]) == {**shared, "deployment": "green"}
    assert far.spans()[0].status.status_code is StatusCode.OK


@KINDS
def test_metrics(kind: str) -> None:
    far = Telemetry()
    with serving(kind, make(far, enable_tracing=False, custom_attributes={"not": "on these"})) as proxy:
        proxy.add(1.0, 2.0)
        proxy.add(1.0, 2.0)
        with pytest.raises(core.RpcError):
            proxy.fail("server")
    assert far.spans() == []
    points = far.points()
    assert sorted(points) == ["rpc.server.duration s", "rpc.server.requests {request}"]
    counted: dict[Any, Any] = {}
    for point in points["rpc.server.requests {request}"]:
        assert isinstance(point, NumberDataPoint)
        labels = dict(point.attributes or {})
        counted[labels.pop("rpc.method"), labels.pop("status")] = point.value
        assert labels == {"rpc.system": "vgi_rpc", "rpc.service": "Calc", "rpc.vgi_rpc.method_type": "unary"}
    assert counted == {("add", "ok"): 2, ("fail", "error"): 1}
    for point in points["rpc.server.duration s"]:
        assert isinstance(point, HistogramDataPoint)
        assert 0 < point.sum < 5 and point.explicit_bounds[0] == 0.005


@KINDS
def test_errors(kind: str) -> None:
    near, far = Telemetry(), Telemetry()
    with serving(kind, make(far)) as plain:
        proxy = otel().instrument_client(plain, near.config())
        for cause in ("server", "client"):
            with pytest.raises(core.RpcError):
                proxy.fail(cause)
        with pytest.raises(core.RpcArgumentError):
            proxy.add(1.0)
    blamed, excused = far.spans()
    assert (blamed.status.status_code, blamed.status.description) == (StatusCode.ERROR, "secret of a user")
    assert excused.status.status_code is StatusCode.UNSET
    found = [(attributes(s)["rpc.vgi_rpc.error_type"], attributes(s)["rpc.vgi_rpc.error_code"]) for s in far.spans()]
    assert found == [("ValueError", "UNKNOWN"), ("Teapot", "NOT_FOUND")]
    assert [event.name for event in blamed.events] == ["exception"]
    assert "secret of a user" in str(dict(blamed.events[0].attributes or {})["exception.stacktrace"])
    assert [attributes(s)["rpc.vgi_rpc.error_type"] for s in near.spans()][:2] == ["ValueError", "Teapot"]
    assert {s.status.status_code for s in near.spans()} == {StatusCode.ERROR} and len(near.spans()) == 3


@pytest.mark.parametrize("how", ["redactor", "broken redactor", "tracebacks", "no events"])
def test_texts_of_errors_can_be_kept_out(how: str) -> None:
    far = Telemetry()
    redactors: dict[str, Callable[[BaseException], str]] = {
        "redactor": lambda exc: f"a {type(exc).__name__}",
        "broken redactor": lambda exc: str(1 // 0),
    }
    server = core.RpcServer(Calc, Impl(), include_tracebacks=how != "tracebacks")
    options = {"error_redactor": redactors.get(how), "record_exceptions": how != "no events"}
    otel().instrument_server(server, far.config(**options))
    with serving("pipe", server) as proxy, pytest.raises(core.RpcError):
        proxy.fail("server")
    (span,) = far.spans()
    if how == "no events":
        assert span.events == ()
        return
    text = "a ValueError" if how == "redactor" else "ValueError"
    assert span.status.description == text
    assert [dict(e.attributes or {}) for e in span.events] == [
        {"exception.type": "ValueError", "exception.message": text}
    ]
    assert "secret" not in span.to_json()


@KINDS
def test_streams(kind: str, access: list[dict[str, Any]]) -> None:
    near, far = Telemetry(), Telemetry()
    with serving(kind, make(far)) as plain:
        proxy = otel().instrument_client(plain, near.config())
        with proxy.count(3) as session:
            assert [item.batch.column("n")[0].as_py() for item in session] == [0, 1, 2]
            assert near.spans()[0].name == "vgi_rpc/count", "it ends with the stream, not with the block"
        with proxy.total() as session:
            for _ in range(2):
                session.exchange(core.AnnotatedBatch.from_pydict({"n": [5]}, NUMBERS))
            assert len(near.spans()) == 1
    client_of = {s.name: ids(s) for s in near.spans()}
    assert sorted(client_of) == ["vgi_rpc/count", "vgi_rpc/total"]
    spans = far.spans()
    # One span for a stream over a byte stream; over HTTP each request is a call of its own.
    assert len(spans) == (2 if kind != "http" else 4 + 3)
    assert {attributes(s)["rpc.vgi_rpc.method_type"] for s in spans} == {"stream"}
    assert all(parent(s) == client_of[s.name] for s in spans)
    assert [(r["trace_id"], r["span_id"]) for r in access] == [ids(s) for s in spans]
    assert sum(attributes(s)["rpc.vgi_rpc.output_rows"] for s in spans) == 3 + 2


@KINDS
def test_an_error_inside_a_turn_is_an_error(kind: str) -> None:
    near, far = Telemetry(), Telemetry()
    with serving(kind, make(far)) as plain:
        proxy = otel().instrument_client(plain, near.config())
        session = proxy.count(13)
        with pytest.raises(core.RpcError, match="unlucky"):
            session.read_all()
        session.close()
        with pytest.raises(core.RpcError, match="closed"):
            session.tick(timeout=1)
    (client,), last = near.spans(), far.spans()[-1]
    assert client.status.status_code is last.status.status_code is StatusCode.ERROR
    assert last.status.description == "unlucky"
    assert attributes(last)["rpc.vgi_rpc.error_type"] == attributes(client)["rpc.vgi_rpc.error_type"] == "ValueError"
    statuses = [dict(p.attributes or {})["status"] for p in far.points()["rpc.server.requests {request}"]]
    assert statuses.count("error") == 1


def test_a_stream_that_is_dropped_or_cancelled_ends_its_span() -> None:
    near, far = Telemetry(), Telemetry()
    with serving("http", make(far)) as plain:
        proxy = otel().instrument_client(plain, near.config())
        session = proxy.count(5)
        assert session.next_with_token()[1], "what the transport's own session can do"
        assert session.schema == NUMBERS
        session.cancel()
        assert len(near.spans()) == 1
        session = proxy.count(5)
        del session
        gc.collect()
        assert len(near.spans()) == 2
        with pytest.raises(AttributeError, match="nonsense"):
            _ = proxy.count(1).nonsense


@KINDS
def test_calls_that_share_the_latency(kind: str) -> None:
    near, far = Telemetry(), Telemetry()
    with serving(kind, make(far)) as plain:
        proxy = otel().instrument_client(plain, near.config())
        assert list(core.map_calls(proxy.add, ({"a": 1.0, "b": float(k)} for k in range(20)))) == [
            1.0 + k for k in range(20)
        ]
        futures = [core.submit(proxy.add, 1.0, float(k)) for k in range(20)]
        assert [future.result(20) for future in futures] == [1.0 + k for k in range(20)]
        with pytest.raises(core.RpcError, match="stout"):
            list(core.map_calls(proxy.fail, [{"kind": "client"}]))
        assert isinstance(core.submit(proxy.fail, "client").exception(20), core.RpcError)
    deadline = time.monotonic() + 5
    while len(near.spans()) < 42 and time.monotonic() < deadline:
        time.sleep(0.01)  # a Future's callbacks run after its result can be had
    assert len(near.spans()) == 42
    assert [s.status.status_code for s in near.spans()].count(StatusCode.ERROR) == 2
    assert {parent(s) for s in far.spans()} == {ids(s) for s in near.spans()}


def add_request(metadata: Mapping[str, str]) -> bytes:
    schema = core.rpc_methods(Calc)["add"].params_schema
    batch = pa.RecordBatch.from_arrays([pa.array([1.0]), pa.array([2.0])], schema=schema)
    known = {"vgi_rpc.method": "add", "vgi_rpc.request_version": "1", "vgi_rpc.protocol": "Calc"}
    sink = pa.BufferOutputStream()
    with core.new_ipc_stream(sink, schema) as writer:
        writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata({**known, **metadata}))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def trace_of(far: Telemetry, batch: Mapping[str, str], headers: Mapping[str, str], **options: Any) -> tuple[str, str]:
    """The parent of the server's span for a request with this context."""
    door: Any = core
    client = sys.modules[door.make_wsgi_app.__module__.rpartition(".")[0]].make_sync_client(make(far), **options)
    content = {"Content-Type": "application/vnd.apache.arrow.stream"}
    response = client.post("/Calc/add", content=add_request(batch), headers={**content, **headers})
    assert response.status_code == 200, response.text
    return parent(far.spans()[-1])


def test_whose_context_counts() -> None:
    far = Telemetry()
    assert trace_of(far, {"traceparent": PARENT}, {}) == (TRACE, SPAN)
    assert trace_of(far, {}, {"traceparent": PARENT}) == (TRACE, SPAN)
    assert trace_of(far, {"traceparent": PARENT}, {"traceparent": OTHER}) == (TRACE, SPAN)
    assert trace_of(far, {"traceparent": PARENT, "tracestate": "v=1"}, {"tracestate": "v=2"}) == (TRACE, SPAN)
    assert (span := far.spans()[-1].context) is not None and span.trace_state.get("v") == "1"
    trace_of(far, {"traceparent": PARENT}, {"traceparent": OTHER, "tracestate": "v=2"})
    assert (span := far.spans()[-1].context) is not None and len(span.trace_state) == 0, "each with its own state"
    assert trace_of(far, {}, {}) == ("", "")


@pytest.mark.parametrize(
    "bad", ["", "00", PARENT.upper().replace("00-", "zz-"), PARENT + "\n", f"00-{'0' * 32}-{SPAN}-01", "x" * 100_000]
)
def test_malformed_contexts_are_ignored(bad: str) -> None:
    far = Telemetry()
    assert trace_of(far, {"traceparent": bad}, {}) == ("", "")
    if "0" * 32 not in bad:
        assert trace_of(far, {"traceparent": bad}, {"traceparent": PARENT}) == (TRACE, SPAN)
    assert trace_of(far, {}, {"traceparent": bad.strip() + "?"}) == ("", "")
    assert trace_of(far, {"traceparent": PARENT, "tracestate": "\x00" + "=" * 9999}, {}) == (TRACE, SPAN)


def test_a_callers_context_brings_nothing_else_of_the_thread() -> None:
    token = context.attach(baggage.set_baggage("left", "behind"))
    try:
        assert baggage.get_all(otel()._parent({"traceparent": PARENT})) == {}
        assert baggage.get_all(otel()._parent({})) == {"left": "behind"}
    finally:
        context.detach(token)


def test_an_instrumented_web_server_is_the_parent() -> None:
    """What opentelemetry-instrumentation-wsgi does: a current span that is a child of the header's."""
    far = Telemetry()
    header = {"traceparent": PARENT}
    remote = trace.SpanContext(int(TRACE, 16), int(SPAN, 16), True, trace.TraceFlags(1))
    outer = trace.set_span_in_context(trace.NonRecordingSpan(remote), context.Context())
    with far.tracers.get_tracer("wsgi").start_as_current_span("POST", outer) as post:
        assert trace_of(far, {}, header) == (TRACE, f"{post.get_span_context().span_id:016x}")
        assert trace_of(far, {}, header, otel_config=far.config())[0] == TRACE
        assert trace_of(far, {}, {"traceparent": OTHER}) == (OTHER.split("-")[1], SPAN)


def test_context_is_current_while_authenticating_and_gone_afterwards() -> None:
    far, seen = Telemetry(), list[str]()

    def authenticate(req: Any) -> Any:
        seen.append(f"{trace.get_current_span().get_span_context().trace_id:032x}")
        if not req.get_header("Authorization"):
            raise PermissionError("who are you?")
        claims = {"tenant": "acme", "age": 7, "roles": ["a"]}
        return core.AuthContext("jwt", True, "ann", claims)

    options = {"claim_attributes": {"tenant": "app.tenant", "age": "app.age", "roles": "app.roles"}}
    server, door = core.RpcServer(Calc, Impl()), sys.modules[getattr(core, "make_wsgi_app").__module__]  # noqa: B009
    config = far.config(custom_attributes={"deployment": "blue"}, **options)
    with http(server, authenticate=authenticate, otel_config=config) as url:
        lazy: Any = core
        for headers in ({"traceparent": PARENT}, {}, {"traceparent": PARENT, "Authorization": "x"}):
            with lazy.http_connect(Calc, url, headers=headers) as proxy, contextlib.suppress(core.RpcError):
                proxy.add(1.0, 2.0)
    assert door is not None and seen == [TRACE, "0" * 32, TRACE]
    (span,) = far.spans()
    found = attributes(span)
    assert parent(span) == (TRACE, SPAN)
    assert (found["app.tenant"], found["app.age"], "app.roles" in found) == ("acme", "7", False)
    assert found["rpc.vgi_rpc.auth.principal"] == "ann" and found["rpc.vgi_rpc.auth.domain"] == "jwt"
    assert found["rpc.vgi_rpc.auth.authenticated"] == "true"
    points = far.points()
    (failure,) = points["rpc.server.auth_failure {failure}"]
    assert isinstance(failure, NumberDataPoint) and failure.value == 2
    assert dict(failure.attributes or {}) == {
        "rpc.system": "vgi_rpc",
        "rpc.service": "Calc",
        "error.type": "PermissionError",
        "deployment": "blue",
    }
    (request,) = points["rpc.server.requests {request}"]
    assert dict(request.attributes or {})["rpc.vgi_rpc.auth.domain"] == "jwt"
    assert "ann" not in str(points), "no principal on a metric"


def test_a_call_that_is_interrupted_leaves_nothing_current() -> None:
    far = Telemetry()
    lazy: Any = core
    client = sys.modules[lazy.make_wsgi_app.__module__.rpartition(".")[0]].make_sync_client(make(far))
    with lazy.http_connect(Calc, client=client) as proxy, pytest.raises(KeyboardInterrupt):
        proxy.fail("interrupt")
    assert not trace.get_current_span().get_span_context().is_valid
    (span,) = far.spans()
    assert attributes(span)["rpc.vgi_rpc.error_type"] == "KeyboardInterrupt"


def test_two_servers_in_one_process_do_not_mix() -> None:
    one, two = Telemetry(), Telemetry()
    with serving("pipe", make(one)) as first, serving("pipe", make(two)) as second:
        first.add(1.0, 2.0)
        second.total().close()
    assert [s.name for s in one.spans()] == ["vgi_rpc/add"]
    assert [s.name for s in two.spans()] == ["vgi_rpc/total"]
    assert len(one.points()["rpc.server.requests {request}"]) == 1


@pytest.mark.parametrize("kind", ["unix", "http"])
def test_threads_do_not_mix(kind: str, access: list[dict[str, Any]]) -> None:
    near, far = Telemetry(), Telemetry()
    tracer = near.tracers.get_tracer("test")
    failures: list[str] = []

    def work(proxy: Any) -> None:
        for _ in range(15):
            with tracer.start_as_current_span("work") as span:
                wanted = f"{span.get_span_context().trace_id:032x}"
                if proxy.inner().split()[0] != wanted:
                    failures.append(wanted)

    with serving(kind, make(far)) as plain:
        proxy = otel().instrument_client(plain, near.config())
        threads = [threading.Thread(target=work, args=(proxy,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert failures == []
    assert len({ids(s)[0] for s in far.spans()}) == len(access) == 60
    assert {r["span_id"] for r in access} == {ids(s)[1] for s in far.spans()}


def test_a_second_time_replaces_the_first() -> None:
    first, second = Telemetry(), Telemetry()
    server = make(first)
    otel().instrument_server(server, second.config())
    with serving("pipe", server) as proxy:
        proxy.add(1.0, 2.0)
    assert (len(first.spans()), len(second.spans())) == (0, 1)
    with pytest.raises(TypeError, match="expected an OtelConfig, got dict"):
        otel().instrument_server(server, {})
    with pytest.raises(ValueError, match="not a dispatch hook of this server"):
        server.remove_dispatch_hook(broken("start"))
    server.remove_dispatch_hook(server.dispatch_hooks[0])
    assert server.dispatch_hook is None and server.dispatch_hooks == ()


class Broken:
    """A hook of both kinds that fails."""

    def __init__(self, at: str) -> None:
        self.at = at

    def on_dispatch_start(self, *args: Any) -> None:
        assert self.at != "start"

    def on_dispatch_end(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError

    def on_call_start(self, info: Any, metadata: dict[bytes, bytes]) -> None:
        metadata[b"vgi_rpc.method"] = b"nonsense"
        metadata[b"mine"] = b"1"
        assert self.at != "start"

    def on_call_end(self, token: Any, info: Any, error: Any) -> None:
        raise AssertionError


class Memory:
    """A BatchStore that keeps every batch; it fails as it is told."""

    compression: Any = None
    fault: BaseException | None = None

    def __init__(self) -> None:
        self.objects: list[bytes] = []

    def wants(self, batch: pa.RecordBatch) -> bool:
        return bool(batch.num_rows)

    def save(self, schema: pa.Schema, data: bytes) -> tuple[str, str, int]:
        if self.fault is not None:
            raise self.fault
        self.objects.append(data)
        return f"https://user:pass@store.example/{len(self.objects) - 1}?sig=hush", "", len(data) // 2

    def load(self, url: str, sha256: str | None, timeout: float | None) -> tuple[bytes, float]:
        if self.fault is not None:
            raise self.fault
        return self.objects[int(url.partition("?")[0].rpartition("/")[2])], 0.0123


def of_storage(party: Telemetry) -> list[ReadableSpan]:
    return [span for span in party.exporter.get_finished_spans() if span.name.startswith("vgi_rpc.external/")]


def stored_add(near: Telemetry, far: Telemetry, store: Memory) -> None:
    server = core.RpcServer(Calc, Impl(), external_location=store)
    otel().instrument_server(server, far.config())
    reads = getattr(core, "instrument_store")(store, near.config(custom_attributes={"team": "a"}))  # noqa: B009
    with served_proxy(Calc, server, external_location=reads) as proxy:
        assert proxy.add(a=1, b=2) == 3


def test_what_is_stored_elsewhere_has_spans() -> None:
    near, far, store = Telemetry(), Telemetry(), Memory()
    store.compression = SimpleNamespace(algorithm="zstd")
    stored_add(near, far, store)
    (upload,), (fetch,) = of_storage(far), of_storage(near)
    call = far.exporter.get_finished_spans()[-1]
    assert call.name == "vgi_rpc/add" and parent(upload) == ids(call) and parent(fetch) == ("", "")
    size = len(store.objects[0])
    assert (upload.name, upload.kind) == ("vgi_rpc.external/upload", SpanKind.CLIENT)
    assert attributes(upload) == {
        "url": "https://store.example/0",
        "upload_bytes": size // 2,
        "original_bytes": size,
        "compression": "zstd",
    }
    assert (fetch.name, fetch.kind) == ("vgi_rpc.external/fetch", SpanKind.CLIENT)
    assert attributes(fetch) == {"url": "https://store.example/0", "fetch_duration_ms": 12.3, "team": "a"}


@pytest.mark.parametrize("own", [True, False])
def test_spans_of_storage_end_with_an_error_and_show_no_url(own: bool) -> None:
    near, far, store = Telemetry(), Telemetry(), Memory()
    text = "no room" if own else "https://store.example/0?sig=hush"
    store.fault = core.ExternalLocationError(text) if own else ValueError(text)
    with pytest.raises(core.RpcError):
        stored_add(near, far, store)
    (upload,) = of_storage(far)
    assert upload.status.status_code is StatusCode.ERROR and len(upload.events) == 1
    assert attributes(upload)["rpc.vgi_rpc.error_type"] == ("ExternalLocationError" if own else "ValueError")
    assert "hush" not in upload.to_json() and ("no room" in upload.to_json()) is own
    with pytest.raises(core.RpcError):  # the caller's side
        store.fault = None
        loaded: Any = core
        config = near.config()
        data = pa.RecordBatch.from_pydict({"n": [1]}, schema=NUMBERS)
        found = core.externalize(store, data, [(data, None)])
        assert found is not None
        store.fault = core.ExternalLocationError(text) if own else ValueError(text)
        core.resolve_external_location(found.batch, found.metadata, loaded.instrument_store(store, config))
    (fetch,) = of_storage(near)
    assert fetch.status.status_code is StatusCode.ERROR and "hush" not in fetch.to_json()


def test_a_store_is_instrumented_once_or_not_at_all() -> None:
    loaded: Any = core
    store, config = Memory(), Telemetry().config()
    once = loaded.instrument_store(store, config)
    assert once.objects is store.objects and once.wants(pa.RecordBatch.from_pydict({"n": [1]}))
    assert loaded.instrument_store(once, config)._inner is store
    assert loaded.instrument_store(once, Telemetry().config(enable_tracing=False)) is store
    server = core.RpcServer(Calc, Impl(), external_location=store)
    otel().instrument_server(otel().instrument_server(server, config), config)
    assert getattr(server.external_location, "_inner", None) is store


def broken(at: str) -> Any:
    return Broken(at)


@KINDS
@pytest.mark.parametrize("at", ["start", "end"])
def test_hooks_that_fail_disturb_nobody(kind: str, at: str) -> None:
    far = Telemetry()
    server = make(far)
    server.add_dispatch_hook(broken(at))
    with serving(kind, server) as plain:
        proxy = core.with_options(plain, call_hook=broken(at))
        assert proxy.add(1.0, 2.0) == 3.0
        assert proxy.count(3).read_all().num_rows == 3
        with pytest.raises(core.RpcError, match="stout"):
            proxy.fail("client")
        assert core.with_options(proxy, call_hook=None).add(1.0, 1.0) == 2.0
    assert {s.name for s in far.spans()} == {"vgi_rpc/add", "vgi_rpc/count", "vgi_rpc/fail"}


def test_calls_without_a_hook_do_not_look_for_one() -> None:
    with serving("pipe", core.RpcServer(Calc, Impl())) as proxy:
        observed = core.with_options(proxy, call_hook=broken("end"))
        assert type(proxy.add) is not type(observed.add)
        with proxy.count(1) as plain, contextlib.ExitStack():
            assert type(plain).__name__ == "_ClientStream"


@KINDS
def test_only_the_api_is_needed(kind: str) -> None:
    """Without an SDK a context is passed on: whoever is instrumented further down is in the caller's trace."""
    far = Telemetry()
    no_sdk = otel().OtelConfig(tracer_provider=trace.NoOpTracerProvider())
    remote = trace.SpanContext(int(TRACE, 16), int(SPAN, 16), True, trace.TraceFlags(1))
    with serving(kind, make(far)) as plain:
        for config in (no_sdk, otel().OtelConfig(enable_tracing=False)):
            proxy = otel().instrument_client(plain, config)
            with trace.use_span(trace.NonRecordingSpan(remote)):
                proxy.add(1.0, 2.0)
                with proxy.count(2) as session:
                    assert len(list(session)) == 2
    assert {parent(s) for s in far.spans()} == {(TRACE, SPAN)}


def test_import_needs_no_sdk(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        f"import {core.__name__} as core\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry.')][1:]\n"
        "core.instrument_server, core.instrument_client, core.OtelConfig()\n"
        "assert 'OtelConfig' in dir(core); print('fine')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "fine\n", ran.stderr
