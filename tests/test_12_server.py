"""Room 12: what a server hosts, checks, dispatches and records."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import threading
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import pyarrow as pa
import pytest

from tests.core import core


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def noop(self) -> None: ...


class CalcImpl:
    def add(self, a, b):
        return a + b

    def noop(self):
        return None


def wait_for(condition) -> None:
    """The end of a call is told after its answer has been sent."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_every_misfit_is_in_one_type_error() -> None:
    class Misfit(Protocol):
        def bare(self, x: int) -> int: ...
        def col(self, a: int) -> int: ...
        def noop(self) -> None: ...
        def two(self, a: int, b: int) -> int: ...

    class Impl:
        noop = 5

        def col(self, a, extra):
            return a

        def two(self, a, **kwargs):
            return a

    with pytest.raises(TypeError) as caught:
        core.RpcServer(Misfit, Impl())
    assert str(caught.value).splitlines() == [
        "Impl does not implement Misfit:",
        "  - missing method bare(x: int)",
        "  - 'col()' has required parameter 'extra' not defined in Misfit",
        "  - 'noop' exists but is not callable",
        "  - 'two()' missing parameter 'b'",
    ]


def test_what_an_implementation_may_have_beyond_its_protocol() -> None:
    class Impl(CalcImpl):
        def add(self, a, b, ctx, extra=1, *args, **kwargs):
            return a + b

        def other(self, z):
            return z

    server = core.RpcServer(Calc, Impl())
    assert server.ctx_methods == {"add"}


def test_names_are_unique_and_not_reserved() -> None:
    class Reserved(Protocol):
        protocol_name: ClassVar[str] = "vgi_rpc.Mine"

    with pytest.raises(ValueError, match="Two protocols are hosted under the same name 'Calc'"):
        core.RpcServer(Calc, CalcImpl(), extra_protocols=[(Calc, CalcImpl())])
    with pytest.raises(ValueError, match="reserved"):
        core.RpcServer(Reserved, object())


def test_bad_versions_are_refused_at_construction() -> None:
    class Two(Protocol):
        protocol_version: ClassVar[str] = "1.2"

    class Number(Protocol):
        protocol_version: ClassVar[int] = 1

    with pytest.raises(ValueError, match="canonical semver"):
        core.RpcServer(Two, object())
    with pytest.raises(TypeError, match="must be a str, got int"):
        core.RpcServer(Number, object())


@pytest.fixture
def connected():
    """Serve a server from a thread; yields what connects a Protocol to it."""
    threads, transports = [], []

    def start(server, protocol, **options):
        client, served = core.make_pipe_pair()
        thread = threading.Thread(target=lambda: (server.serve(served), served.close()))
        thread.start()
        threads.append(thread)
        transports.append(client)
        return core.RpcProxy(protocol, client, **options)

    yield start
    for transport in transports:
        transport.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_several_protocols_on_one_connection(connected) -> None:
    class Words(Protocol):
        protocol_name: ClassVar[str] = "demo.Words.v1"

        def add(self, a: str, b: str) -> str: ...

    class WordsImpl:
        def add(self, a, b):
            return a + b

    server = core.RpcServer(Calc, CalcImpl(), extra_protocols=[(Words, WordsImpl())], enable_describe=True)
    calc = connected(server, Calc)
    words = core.RpcProxy(Words, calc._transport)
    assert (calc.add(1.0, 2.0), words.add("x", "y")) == (3.0, "xy")
    assert [p.name for p in core.list_protocols(calc)] == ["Calc", "demo.Words.v1", "vgi_rpc.Reflection.v1"]
    assert list(server.bindings) == ["Calc", "demo.Words.v1", "vgi_rpc.Reflection.v1"]


@pytest.mark.parametrize(
    ("client", "server", "side"),
    [("2.2.0", "2.3.4", "client is too old"), ("3.0.0", "2.3.4", "server is too old"), ("2.3.9", "2.3.4", None)],
)
def test_version_gate(connected, client: str, server: str, side: str | None) -> None:
    theirs = type("Calc", (Protocol,), {"protocol_version": client, "noop": Calc.noop})
    ours = type("Calc", (Protocol,), {"protocol_version": server, "noop": Calc.noop})
    proxy = connected(core.RpcServer(ours, CalcImpl()), theirs)
    if side is None:
        assert proxy.noop() is None
        return
    with pytest.raises(core.RpcError) as caught:
        proxy.noop()
    assert side in str(caught.value) and client in str(caught.value) and server in str(caught.value)
    assert caught.value.error_kind == "protocol_version_mismatch"
    assert caught.value.precondition_failure().violations[0].subject == "Calc"


def test_unrouted_calls_need_a_switch() -> None:
    for accept in (False, True):
        client, served = core.make_pipe_pair()
        server = core.RpcServer(Calc, CalcImpl(), accept_unrouted=accept)
        batch = core.empty_batch(core.EMPTY_SCHEMA)
        writer = core._IpcWriter(batch.schema)
        writer.write(batch, {b"vgi_rpc.method": b"noop", b"vgi_rpc.request_version": b"1"})
        writer.close()
        client.channel.send(writer.take())
        server.serve_one(served)
        reader = core._IpcReader(client.channel, core.IpcValidation.FULL)
        _, metadata = reader.read()
        assert (metadata is None) is accept
        if not accept:
            assert metadata[b"vgi_rpc.error_kind"] == b"protocol_not_specified"
        client.close()
        served.close()


def test_on_serve_start_runs_once_and_a_failure_ends_serving() -> None:
    class Impl(CalcImpl):
        def __init__(self, fail):
            self.kinds, self.fail = [], fail

        def on_serve_start(self, kind):
            self.kinds.append(kind)
            if self.fail:
                raise RuntimeError("no")

    impl = Impl(False)
    server = core.RpcServer(Calc, impl)
    for make in (core.make_pipe_pair, core.make_pipe_pair, core.make_unix_pair):
        client, served = make()
        client.close()
        server.serve(served)
        served.close()
    assert impl.kinds == [core.TransportKind.PIPE, core.TransportKind.UNIX]
    client, served = core.make_pipe_pair()
    with pytest.raises(RuntimeError, match="no"):
        core.RpcServer(Calc, Impl(True)).serve(served)
    client.close()
    served.close()


def test_hooks_start_in_order_end_reversed_and_may_fail(connected) -> None:
    seen = []

    class Hook:
        def __init__(self, name, fail=False):
            self.name, self.fail = name, fail

        def on_dispatch_start(self, info, auth, transport_metadata, kwargs):
            if self.fail:
                raise RuntimeError
            seen.append(("start", self.name, info.name, dict(kwargs)))
            return self.name

        def on_dispatch_end(self, token, info, error, *, stats=None):
            seen.append(("end", token, error, (stats.input_batches, stats.input_rows, stats.input_bytes)))

    server = core.RpcServer(Calc, CalcImpl())
    for hook in (Hook("a"), Hook("bad", fail=True), Hook("b")):
        server.add_dispatch_hook(hook)
    assert connected(server, Calc).add(1.0, 2.0) == 3.0
    wait_for(lambda: len(seen) == 4)
    arguments = {"a": 1.0, "b": 2.0}
    assert seen == [
        ("start", "a", "add", arguments),
        ("start", "b", "add", arguments),
        ("end", "b", None, (1, 1, 16)),
        ("end", "a", None, (1, 1, 16)),
    ]


def test_access_record_of_a_success_and_a_failure(connected, caplog) -> None:
    class Impl(CalcImpl):
        def noop(self):
            raise ValueError

    caplog.set_level(logging.INFO, "vgi_rpc.access")
    proxy = connected(core.RpcServer(Calc, Impl(), server_id="s1", server_version="1.2"), Calc)
    proxy.add(1.0, 2.0)
    with pytest.raises(core.RpcError):
        proxy.noop()
    with pytest.raises(core.RpcError):  # refused before dispatch: no record
        core._ClientMethod(proxy, core._WirePlan(core.rpc_methods(Calc)["add"], "Nope", None))(1.0, 2.0)
    wait_for(lambda: sum(r.name == "vgi_rpc.access" for r in caplog.records) == 2)
    ok, failed = [r for r in caplog.records if r.name == "vgi_rpc.access"]
    assert ok.getMessage() == "Calc.add ok" and failed.getMessage() == "Calc.noop error"
    counted = ["input_batches", "input_rows", "input_bytes", "output_batches", "output_rows", "output_bytes"]
    assert [getattr(ok, name) for name in counted] == [1, 1, 16, 1, 1, 8]
    assert ok.request_fields == [{"name": "a", "type": "double"}, {"name": "b", "type": "double"}]
    assert (ok.server_id, ok.server_version, ok.status, ok.error_type, ok.request_rows) == ("s1", "1.2", "ok", "", 1)
    assert len(ok.protocol_hash) == 64 and len(ok.request_id) == 16 and ok.duration_ms >= 0
    assert (failed.error_type, failed.error_message, failed.error_code) == ("ValueError", "ValueError", "UNKNOWN")
    assert not hasattr(ok, "error_message") and "request_data" not in vars(ok)


def test_tracebacks_can_be_left_out(connected) -> None:
    class Impl(CalcImpl):
        def noop(self):
            raise ValueError("x")

    for include in (True, False):
        proxy = connected(core.RpcServer(Calc, Impl(), include_tracebacks=include), Calc)
        with pytest.raises(core.RpcError) as caught:
            proxy.noop()
        assert bool(caught.value.remote_traceback) is include


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt()])
def test_an_implementation_that_exits_is_answered_and_obeyed(raised: BaseException) -> None:
    class Impl(CalcImpl):
        def noop(self):
            raise raised

    ended = []
    client, served = core.make_pipe_pair()

    def serve() -> None:
        try:
            core.RpcServer(Calc, Impl()).serve(served)
        except BaseException as exc:
            ended.append(exc)
        served.close()

    thread = threading.Thread(target=serve)
    thread.start()
    proxy = core.RpcProxy(Calc, client)
    with pytest.raises(core.RpcError) as caught:
        proxy.noop()
    assert caught.value.error_type == type(raised).__name__
    thread.join(5)
    assert ended == [raised]
    with pytest.raises(core.ConnectionLostError):
        proxy.add(1.0, 2.0)
    client.close()


def test_messages_from_helper_threads_stay_in_step_and_end_with_the_call(connected) -> None:
    kept = []

    class Impl(CalcImpl):
        def add(self, a, b, ctx):
            def talk():
                for i in range(50):
                    ctx.client_log(core.Level.INFO, str(i))

            threads = [threading.Thread(target=talk) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            kept.append(ctx)
            return a + b

    seen = []
    proxy = connected(core.RpcServer(Calc, Impl()), Calc, on_log=seen.append)
    assert proxy.add(1.0, 2.0) == 3.0 and len(seen) == 200
    with pytest.raises(RuntimeError, match="has ended"):
        kept[0].client_log(core.Level.INFO, "late")
    assert proxy.add(2.0, 2.0) == 4.0


@pytest.mark.parametrize("size", [3, 1 << 20])
def test_a_result_behind_messages_is_whole(connected, size: int) -> None:
    class Echo(Protocol):
        def echo(self, data: bytes) -> bytes: ...

    class Impl:
        def echo(self, data: bytes, ctx: core.CallContext) -> bytes:
            if data[:1] == b"m":
                ctx.client_log(core.Level.INFO, "hello")
            return data

    seen: list[str] = []
    proxy = connected(core.RpcServer(Echo, Impl()), Echo, on_log=lambda message: seen.append(message.message))
    for first in b"xmxmm":
        data = bytes([first]) + b"y" * size
        assert proxy.echo(data) == data
    assert seen == ["hello"] * 3


def test_an_exception_level_message_raises_at_the_caller(connected) -> None:
    class Impl(CalcImpl):
        def add(self, a, b, ctx):
            ctx.client_log(core.Level.EXCEPTION, "bad")
            return a + b

    proxy = connected(core.RpcServer(Calc, Impl()), Calc)
    with pytest.raises(core.RpcError) as caught:
        proxy.add(1.0, 2.0)
    assert caught.value.error_type == "EXCEPTION"
    assert proxy.noop() is None


def test_a_message_that_is_not_json_is_the_methods_error(connected) -> None:
    class Impl(CalcImpl):
        def add(self, a, b, ctx):
            ctx.client_log(core.Level.INFO, "x", bad=object())
            return a + b

    proxy = connected(core.RpcServer(Calc, Impl()), Calc)
    with pytest.raises(core.RpcError) as caught:
        proxy.add(1.0, 2.0)
    assert caught.value.error_type == "TypeError"
    assert proxy.noop() is None


@pytest.mark.parametrize(("value", "error"), [(None, "TypeError"), ("x", "TypeError"), (object(), "TypeError")])
def test_a_result_that_does_not_fit_is_an_ordinary_error(connected, value: object, error: str) -> None:
    class Impl(CalcImpl):
        def add(self, a, b):
            return value

    proxy = connected(core.RpcServer(Calc, Impl()), Calc)
    with pytest.raises(core.RpcError) as caught:
        proxy.add(1.0, 2.0)
    assert caught.value.error_type == error
    assert proxy.noop() is None


def test_log_level_follows_the_code(connected, caplog) -> None:
    class Impl(CalcImpl):
        def noop(self):
            raise core.StatusError("no such thing", code="NOT_FOUND", kind="k")

        def add(self, a, b):
            raise ValueError("unexpected")

    caplog.set_level(logging.DEBUG, "vgi_rpc.rpc")
    proxy = connected(core.RpcServer(Calc, Impl()), Calc)
    for call in (proxy.noop, lambda: proxy.add(1.0, 2.0)):
        with pytest.raises(core.RpcError):
            call()
    found = [(r.levelname, r.getMessage(), bool(r.exc_info)) for r in caplog.records if "Error in" in r.getMessage()]
    assert found == [
        ("INFO", "Error in Calc.noop: NOT_FOUND (k) StatusError: no such thing", False),
        ("ERROR", "Error in Calc.add: unexpected", True),
    ]


# ---- whole messages: the seam that HTTP is built on


def whole(name: str, protocol: str = "Calc", trace: dict[str, str] | None = None, **values: float) -> bytes:
    sink = pa.BufferOutputStream()
    schema = core.rpc_methods(Calc)[name].params_schema
    batch = pa.RecordBatch.from_pylist([values], schema) if values else core.empty_batch(schema)
    metadata = {"vgi_rpc.method": name, "vgi_rpc.request_version": "1", "vgi_rpc.protocol": protocol, **(trace or {})}
    with core.new_ipc_stream(sink, schema) as writer:
        writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(metadata))
    return sink.getvalue().to_pybytes()


def test_a_whole_request_goes_through_the_same_pipeline() -> None:
    server = core.RpcServer(Calc, CalcImpl())
    for _ in range(3):  # by pyarrow, then by the learned layout
        request = core.ServerRequest(server, "Calc", "add", core.TransportKind.HTTP)
        with pa.ipc.open_stream(request.unary(whole("add", a=1.0, b=2.0))) as reader:
            assert reader.read_all().to_pylist() == [{"result": 3.0}]
        assert request.error is None
    assert len(server._layouts) == core._ipc_learning
    other = core.ServerRequest(server, "Calc", "noop", core.TransportKind.HTTP)
    with pytest.raises(TypeError, match="the path has 'noop'"):
        other.unary(whole("add", a=1.0, b=2.0))
    with pytest.raises(EOFError):
        other.unary(whole("noop")[:-20])
    with pytest.raises(core.MethodNotImplementedError):
        core.ServerRequest(server, "Calc", "nope", core.TransportKind.HTTP)
    with pytest.raises(core.ProtocolNotSupportedError):
        core.ServerRequest(server, "Nope", "add", core.TransportKind.HTTP)


class Listener:
    """A hook that notes what it is told of a transport, and when."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_dispatch_start(self, info, auth, transport_metadata, kwargs):
        self.seen.append(dict(transport_metadata))

    def on_dispatch_end(self, token, info, error, *, stats=None):
        self.seen.append("end")


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("trace", "told"),
    [
        ({}, {"remote_addr": "me", "traceparent": "header", "tracestate": "h=1"}),
        ({"traceparent": PARENT}, {"remote_addr": "me", "traceparent": PARENT, "tracestate": ""}),
        (
            {"traceparent": PARENT, "tracestate": "b=2"},
            {"remote_addr": "me", "traceparent": PARENT, "tracestate": "b=2"},
        ),
        ({"traceparent": PARENT[:-1]}, {"remote_addr": "me", "traceparent": "header", "tracestate": "h=1"}),
        ({"tracestate": "b=2"}, {"remote_addr": "me", "traceparent": "header", "tracestate": "h=1"}),
    ],
)
def test_hooks_are_told_of_the_requests_own_trace_context_first(trace, told) -> None:
    server, hook = core.RpcServer(Calc, CalcImpl()), Listener()
    server.add_dispatch_hook(hook)
    known = {"remote_addr": "me", "traceparent": "header", "tracestate": "h=1"}
    for content in (trace, {}):  # the second on the same thread knows nothing of the first
        request = core.ServerRequest(
            server, "Calc", "add", core.TransportKind.HTTP, transport_metadata=dict(known) if content is trace else {}
        )
        request.unary(whole("add", trace=content, a=1.0, b=2.0))
        request.finish({})
    assert hook.seen == [told, "end", {}, "end"]


def test_a_call_ends_once_and_its_record_is_written_before_hooks_hear_of_it(caplog) -> None:
    server, hook = core.RpcServer(Calc, CalcImpl()), Listener()
    server.add_dispatch_hook(hook)
    caplog.set_level(logging.INFO, "vgi_rpc.access")
    handler = logging.Handler()
    handler.emit = lambda record: hook.seen.append("record")  # type: ignore[method-assign]
    logging.getLogger("vgi_rpc.access").addHandler(handler)
    try:
        request = core.ServerRequest(server, "Calc", "add", core.TransportKind.HTTP)
        request.finish({})  # nothing has begun
        request.unary(whole("add", a=1.0, b=2.0))
        request.finish({})
        request.finish({})
    finally:
        logging.getLogger("vgi_rpc.access").removeHandler(handler)
    assert hook.seen == [{}, "record", "end"]


def test_hooks_can_be_removed() -> None:
    server, first, second = core.RpcServer(Calc, CalcImpl()), Listener(), Listener()
    for hook in (first, second):
        server.add_dispatch_hook(hook)
    server.remove_dispatch_hook(first)
    assert server.dispatch_hooks == (second,)
    request = core.ServerRequest(server, "Calc", "add", core.TransportKind.HTTP)
    request.unary(whole("add", a=1.0, b=2.0))
    assert first.seen == [] and second.seen == [{}]
    with pytest.raises(ValueError, match="Listener is not a dispatch hook of this server"):
        server.remove_dispatch_hook(first)
    server.remove_dispatch_hook(second)
    assert server.dispatch_hook is None


def test_the_body_of_an_error() -> None:
    server = core.RpcServer(Calc, CalcImpl(), include_tracebacks=False)
    with pa.ipc.open_stream(server.error_body(ValueError("no"), "the-id")) as reader:
        _, metadata = reader.read_next_batch_with_custom_metadata()
    assert metadata[b"vgi_rpc.log_message"] == b"ValueError: no"
    assert metadata[b"vgi_rpc.request_id"] == b"the-id"


def test_what_a_server_learns_is_bounded() -> None:
    """Peers may send as many versions and lay out their requests as they like."""

    class Versioned(Protocol):
        protocol_version: ClassVar[str] = "1.2.0"

        def echo(self, text: str) -> str: ...

    class Echo:
        def echo(self, text: str) -> str:
            return text

    server = core.RpcServer(Versioned, Echo())
    client, served = core.make_pipe_pair()
    thread = threading.Thread(target=server.serve, args=(served,))
    thread.start()
    info = core.rpc_methods(Versioned)["echo"]
    try:
        for patch in range(300):
            proxy = core.RpcProxy(Versioned, client)
            assert core._ClientMethod(proxy, core._WirePlan(info, "Versioned", f"1.2.{patch}"))("hi") == "hi"
        layouts = server._layouts._known
        assert len(layouts) <= 256 and all(len(known) <= 64 for known in layouts.values())
    finally:
        client.close()
        thread.join(10)
        served.close()


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Point(core.ArrowSerializableDataclass):
    x: float
    name: str | None = None


class Echo(Protocol):
    def number(self, v: float) -> float: ...
    def small(self, v: Annotated[int, core.ArrowType(pa.int16())]) -> Annotated[int, core.ArrowType(pa.int16())]: ...
    def flag(self, v: bool) -> bool: ...
    def text(self, v: str) -> str: ...
    def raw(self, v: bytes) -> bytes: ...
    def maybe(self, v: str | None) -> str | None: ...
    def maybe_number(self, v: float | None) -> float | None: ...
    def maybe_flag(self, v: bool | None) -> bool | None: ...
    def numbers(self, v: list[int]) -> list[int]: ...
    def texts(self, v: list[str]) -> list[str]: ...
    def nested(self, v: list[list[float]]) -> list[list[float]]: ...
    def table(self, v: dict[str, int]) -> dict[str, int]: ...
    def maybe_table(self, v: dict[str, int] | None) -> dict[str, int] | None: ...
    def colour(self, v: Colour) -> Colour: ...
    def point(self, v: Point) -> Point: ...
    def nothing(self) -> None: ...


class EchoImpl:
    def nothing(self):
        return None

    def __getattr__(self, name):
        if name.startswith("_") or name not in vars(Echo):
            raise AttributeError(name)
        return self.echo

    @staticmethod
    def echo(v):
        return v


ECHOED: list[tuple[str, tuple[object, ...]]] = [
    ("number", (1.5,)),
    ("small", (7,)),
    ("flag", (True,)),
    *[("text", (v,)) for v in ("", "a", "ä" * 20, "x" * 100_000)],
    ("raw", (b"\0" * 9,)),
    *[("maybe", (v,)) for v in (None, "", "text")],
    *[("maybe_number", (v,)) for v in (None, 0.0)],
    *[("maybe_flag", (v,)) for v in (None, False)],
    *[("numbers", (v,)) for v in ([], [1], [1, 2, 3])],
    *[("texts", (v,)) for v in ([], [""], ["a", "bcd"])],
    *[("nested", (v,)) for v in ([], [[]], [[1.0], [2.0, 3.0]])],
    *[("table", (v,)) for v in ({}, {"a": 1, "bc": 2})],
    *[("maybe_table", (v,)) for v in (None, {"a": 1})],
    *[("colour", (v,)) for v in Colour],
    *[("point", (v,)) for v in (Point(1.0), Point(2.0, "two"))],
    ("nothing", ()),
]


def records_of_echoes(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """What the access log says of each call, made three times: read by pyarrow, and then perhaps from a layout."""
    caplog.clear()
    calls = [call for call in ECHOED for _ in range(3)]
    with core.serve_pipe(Echo, EchoImpl()) as proxy:
        for name, args in calls:
            assert getattr(proxy, name)(*args) == (args[0] if args else None)
        wait_for(lambda: len(caplog.records) == len(calls))
    varying = {"duration_ms", "request_id", "server_id"}
    fields = [field for field in vars(caplog.records[0]) if field.startswith(("in", "out", "request_", "method"))]
    return [{field: getattr(record, field) for field in fields if field not in varying} for record in caplog.records]


def test_observed_calls_are_counted_alike_by_layouts_and_by_pyarrow(caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO, "vgi_rpc.access")
    learned = records_of_echoes(caplog)
    read: list[object] = []
    monkeypatch.setattr(
        core, "_wire_read_request", lambda *args, real=core._wire_read_request: read.append(1) or real(*args)
    )
    assert records_of_echoes(caplog) == learned
    if core._ipc_learning:
        assert len(read) < 2 * len(ECHOED)  # the third call, at the latest, looks like one before
    monkeypatch.setattr(core, "_ipc_learning", False)
    assert records_of_echoes(caplog) == learned


def test_wire_lines_are_written_for_every_call(caplog) -> None:
    with core.serve_pipe(Calc, CalcImpl()) as proxy:
        for _ in range(3):
            assert proxy.add(1.0, 2.0) == 3.0
        caplog.set_level(logging.DEBUG, "vgi_rpc.wire")
        for _ in range(3):
            assert proxy.add(1.0, 2.0) == 3.0
    lines = [record.getMessage().partition(":")[0] for record in caplog.records]
    for line in ("Read request batch", "Parsed request", "Write result batch"):
        assert lines.count(line) == 3, (line, lines)


# ---- what goes wrong costs the call, not the connection


def garbled(schema: pa.Schema, size: int = 2) -> pa.RecordBatch:
    """One column of text that is not UTF-8: pyarrow writes it, and a reader that validates refuses it."""
    offsets = pa.array([0, size], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.utf8(), 1, [None, offsets, pa.py_buffer(b"\xff" * size)])
    return pa.RecordBatch.from_arrays([column], schema=schema)


@dataclass
class Say(core.ProducerState):
    def produce(self, out, ctx):
        out.emit_pydict({"s": ["x"]})


class Texts(Protocol):
    def say(self, text: str) -> core.Stream[Say]: ...
    def length(self, text: str) -> int: ...


class TextsImpl:
    def say(self, text):
        return core.Stream(pa.schema([("s", pa.utf8())]), Say())

    def length(self, text):
        return len(text)


def texts_request(method: str, *, good: bool = False) -> bytes:
    schema = core.rpc_methods(Texts)["length"].params_schema
    batch = pa.RecordBatch.from_pydict({"text": ["four"]}, schema=schema) if good else garbled(schema)
    about = {"vgi_rpc.method": method, "vgi_rpc.request_version": "1", "vgi_rpc.protocol": "Texts"}
    return core.serialize_record_batch_bytes(batch, pa.KeyValueMetadata(about))


def answers(sent: bytes) -> list[str]:
    """What a server says to these bytes, a word for each stream: `error: Class` or `rows: n`."""
    client, far = core.make_unix_pair()
    thread = threading.Thread(target=core.RpcServer(Texts, TextsImpl()).serve, args=(far,), daemon=True)
    thread.start()
    client._sock.sendall(sent)
    client._sock.shutdown(1)
    thread.join(10)
    assert not thread.is_alive()
    far.close()
    found = []
    with client._sock.makefile("rb") as source:
        while source.peek(1):
            word = ""
            with pa.ipc.open_stream(source) as reader:
                while True:
                    try:
                        batch, metadata = reader.read_next_batch_with_custom_metadata()
                    except StopIteration:
                        break
                    if metadata and b"vgi_rpc.log_extra" in metadata:
                        word = "error: " + json.loads(metadata[b"vgi_rpc.log_extra"])["exception_type"]
                    else:
                        word = f"rows: {batch.num_rows}"
            found.append(word)
    client.close()
    return found


def ticks(count: int) -> bytes:
    writer = core._IpcWriter(core.EMPTY_SCHEMA)
    writer.write_ticks(count)
    writer.close()
    return b"".join(writer.take())


GOOD = "rows: 1"
BAD = "error: IPCError"


def test_a_request_that_makes_no_sense_is_answered_and_the_next_one_served() -> None:
    good, bad = texts_request("length", good=True), texts_request("length")
    assert answers(bad + good) == [BAD, GOOD]
    assert answers(good + bad + good + bad + bad + good) == [GOOD, BAD, GOOD, BAD, BAD, GOOD]


def test_a_stream_request_that_makes_no_sense_has_its_input_swallowed() -> None:
    good, bad = texts_request("length", good=True), texts_request("say")
    assert answers(bad + ticks(0) + good) == [BAD, GOOD]
    assert answers(bad + ticks(3) + good + good) == [BAD, GOOD, GOOD]


def test_an_input_that_makes_no_sense_is_swallowed_too() -> None:
    good, bad, unknown = texts_request("length", good=True), texts_request("say"), texts_request("none", good=True)
    neither = core.serialize_record_batch_bytes(garbled(pa.schema([("s", pa.utf8())])))
    assert answers(bad + neither + good) == [BAD, GOOD]
    assert answers(unknown + neither + good + good) == ["error: MethodNotImplementedError", GOOD, GOOD]


def test_where_nobody_knows_what_it_was_the_connection_ends() -> None:
    neither = core.serialize_record_batch_bytes(garbled(pa.schema([("s", pa.utf8())]), 1 << 20))
    assert answers(texts_request("say") + neither + texts_request("length", good=True)) == [BAD, BAD]


def test_an_input_that_makes_no_sense_ends_its_stream_only() -> None:
    good = texts_request("length", good=True)
    neither = core.serialize_record_batch_bytes(garbled(pa.schema([("s", pa.utf8())])))
    assert answers(texts_request("say", good=True) + neither + good) == [BAD, GOOD]


def test_an_attribute_that_raises_costs_the_call() -> None:
    class Impl(CalcImpl):
        ready = True

        @property
        def add(self):
            if not self.ready:
                raise RuntimeError("not ready")
            return lambda a, b: a + b

    class Hook:
        ended: ClassVar[list] = []

        def on_dispatch_start(self, info, auth, known, kwargs):
            return 0

        def on_dispatch_end(self, token, info, error, *, stats):
            self.ended.append(type(error).__name__)

    impl = Impl()
    server = core.RpcServer(Calc, impl)
    client, far = core.make_unix_pair()
    thread = threading.Thread(target=server.serve, args=(far,), daemon=True)
    thread.start()
    with core.RpcConnection(Calc, client, timeout=10.0) as calc:
        for observed in (False, True):
            if observed:
                server.add_dispatch_hook(Hook())
            impl.ready = True
            assert calc.add(1.0, 2.0) == calc.add(2.0, 1.0) == 3.0
            impl.ready = False
            for _ in range(2):
                with pytest.raises(core.RpcError, match="not ready") as caught:
                    calc.add(1.0, 2.0)
                assert caught.value.error_type == "RuntimeError"
            assert calc.noop() is None
    thread.join(10)
    far.close()
    assert Hook.ended[2:4] == ["RuntimeError", "RuntimeError"]


class Nested(pa.ExtensionType):
    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, "tests.nested")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, data: bytes) -> pa.ExtensionType:
        return cls(storage)


UNION = pa.dense_union([pa.field("a", pa.int8()), pa.field("b", pa.utf8())])
ODD = [
    pa.run_end_encoded(pa.int32(), pa.utf8()),
    pa.list_(pa.run_end_encoded(pa.int32(), pa.utf8())),
    pa.struct([("x", pa.list_(pa.run_end_encoded(pa.int16(), pa.list_(pa.utf8()))))]),
    UNION,
    pa.dense_union([]),
    pa.sparse_union([]),
    pa.list_(pa.sparse_union([pa.field("r", pa.run_end_encoded(pa.int32(), pa.int8()))])),
    Nested(UNION),
    pa.map_(pa.utf8(), Nested(pa.list_(UNION))),
    pa.list_view(pa.list_(Nested(pa.run_end_encoded(pa.int32(), pa.utf8())), 2)),
    pa.dictionary(pa.int8(), pa.dense_union([])),
]


@dataclass
class LogOrFail(core.ProducerState):
    fails: bool

    def produce(self, out, ctx):
        if self.fails:
            raise ValueError("no")
        out.client_log(core.Level.INFO, "here")
        out.finish()


@pytest.mark.parametrize("dtype", ODD, ids=str)
def test_streams_of_every_type_log_fail_and_end(dtype: pa.DataType) -> None:
    schema = pa.schema([("x", dtype)])

    class Proto(Protocol):
        def odd(self, fails: bool) -> core.Stream[LogOrFail]: ...
        def alive(self) -> int: ...

    class Impl:
        def odd(self, fails):
            return core.Stream(schema, LogOrFail(fails))

        def alive(self):
            return 1

    logs: list = []
    with core.serve_pipe(Proto, Impl(), on_log=logs.append, timeout=10.0) as proxy:
        assert list(proxy.odd(False)) == []
        with pytest.raises(core.RpcError, match="no"):
            list(proxy.odd(True))
        assert proxy.alive() == 1
    assert [log.message for log in logs] == ["here"]


def test_what_cannot_be_written_ends_the_connection_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    class Proto(Protocol):
        def say(self) -> core.Stream[Say]: ...
        def alive(self) -> int: ...

    class Impl:
        def say(self):
            return core.Stream(pa.schema([("s", pa.utf8())]), Say())

        def alive(self):
            return 1

    client, far = core.make_unix_pair()
    server = core.RpcServer(Proto, Impl())
    ended: list = []
    thread = threading.Thread(target=lambda: (ended.append(server.serve(far)), far.close()), daemon=True)
    with pytest.MonkeyPatch.context() as patch, core.RpcConnection(Proto, client, timeout=10.0) as proxy:
        thread.start()
        session = proxy.say()
        assert session.tick().batch.num_rows == 1

        def cannot(*args: object) -> None:
            raise pa.ArrowNotImplementedError("no such type")

        patch.setattr(core._IpcWriter, "write", cannot)
        with pytest.raises(core.ConnectionLostError):
            session.tick()
        thread.join(10)
    assert ended == [None] and "no such type" in caplog.text


# ---- one answer, one call


class Newer(Protocol):
    protocol_name: ClassVar[str] = "Calc"

    def count(self, n: int) -> core.Stream[core.ProducerState]: ...
    def add(self, a: float, b: float) -> float: ...


def test_calls_served_one_by_one_are_one_connection() -> None:
    client, served = core.make_pipe_pair()
    server, ended = core.RpcServer(Calc, CalcImpl()), []

    def serve() -> None:
        try:
            while True:
                server.serve_one(served)
        except EOFError as exc:
            ended.append(str(exc))

    thread = threading.Thread(target=serve)
    thread.start()
    with core.RpcConnection(Newer, client, timeout=10.0) as proxy:
        for _ in range(3):
            with pytest.raises(core.RpcError, match="has no method 'count'"), proxy.count(3) as session:
                list(session)
            assert [proxy.add(float(k), 1.0) for k in range(3)] == [1.0, 2.0, 3.0]
    thread.join(5)
    assert ended == ["the peer closed the connection"]
    served.close()


def test_one_by_one_too_a_peer_that_makes_no_sense_is_told_and_left() -> None:
    client, served = core.make_unix_pair()
    server = core.RpcServer(Calc, CalcImpl())
    client._sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    client._sock.shutdown(1)
    for _ in range(2):
        with pytest.raises(EOFError, match=r"the server ended the connection: .*Arrow"):
            server.serve_one(served)
    assert b"EXCEPTION" in client.reader.read()
    for transport in (client, served):
        transport.close()


@dataclass
class Limits(core.ProducerState):
    turns: int = 0

    def produce(self, out, ctx):
        self.turns += 1
        if self.turns == 5:
            return out.finish()
        return out.emit_pydict({"deadline": [ctx.deadline], "left": [ctx.time_left()]})


class Limited(Protocol):
    def limits(self) -> core.Stream[Limits]: ...


class LimitedImpl:
    def limits(self):
        return core.Stream(pa.schema([("deadline", pa.float64()), ("left", pa.float64())]), Limits())


def test_a_deadline_is_of_each_turn() -> None:
    with core.serve_pipe(Limited, LimitedImpl(), timeout=30.0) as proxy:
        rows = [item.batch.to_pylist()[0] for item in proxy.limits()]
    deadlines = [row["deadline"] for row in rows]
    assert deadlines == sorted(set(deadlines))
    assert len(deadlines) == 4
    assert all(0 < row["left"] <= 30.0 for row in rows)


@dataclass
class Raising(core.ProducerState):
    """Raises in its first turn, or when it is cancelled."""

    raised: ClassVar[BaseException]
    first: bool = False

    def produce(self, out, ctx):
        if self.first:
            raise self.raised
        out.emit(core.empty_batch(core.EMPTY_SCHEMA))

    def on_cancel(self, ctx):
        raise self.raised


class Raisers(Protocol):
    def call(self) -> None: ...
    def call_ctx(self) -> None: ...
    def init(self) -> core.Stream[Raising]: ...
    def turn(self, first: bool) -> core.Stream[Raising]: ...


class RaisersImpl:
    def call(self):
        raise Raising.raised

    def call_ctx(self, ctx):
        raise Raising.raised

    def init(self):
        raise Raising.raised

    def turn(self, first):
        return core.Stream(core.EMPTY_SCHEMA, Raising(first))


@pytest.mark.parametrize("raised", [asyncio.CancelledError("enough"), GeneratorExit(), BaseException("odd")], ids=repr)
def test_what_is_no_exception_costs_the_call_only(connected, raised: BaseException) -> None:
    Raising.raised = raised
    proxy = connected(core.RpcServer(Raisers, RaisersImpl()), Raisers)
    calls = (proxy.call, proxy.call_ctx, lambda: list(proxy.init()), lambda: list(proxy.turn(True)))
    for call in (*calls, *calls):
        with pytest.raises(core.RpcError) as caught:
            call()
        assert caught.value.error_type == type(raised).__name__
    session = proxy.turn(False)
    session.tick()
    session.cancel()
    with pytest.raises(core.RpcError, match=type(raised).__name__):
        proxy.call()


def test_a_ready_answer_does_not_wait_for_the_next_method() -> None:
    gate, entered = threading.Event(), threading.Event()

    class P(Protocol):
        def nap(self, long: bool) -> bool: ...

    class Impl:
        def nap(self, long):
            if not long:
                return False
            entered.set()
            return gate.wait(10)

    with core.serve_pipe(P, Impl(), timeout=20.0) as proxy:
        answers = core.map_calls(proxy.nap, [{"long": False}, {"long": False}, {"long": True}])
        assert (next(answers), next(answers)) == (False, False)
        assert entered.wait(10)
        gate.set()
        assert list(answers) == [True]


def test_messages_between_turns_travel_with_the_next_one_or_with_the_end(connected) -> None:
    schema = pa.schema([("n", pa.int64())])
    contexts = []

    class Keep(core.ExchangeState):
        def exchange(self, input, out, ctx):
            contexts.append(ctx)
            out.emit(input.batch)

    class P(Protocol):
        def go(self) -> core.Stream[core.ExchangeState]: ...

    class Impl:
        def go(self, ctx):
            contexts.append(ctx)
            return core.Stream(schema, Keep(), input_schema=schema)

    def say(text: str, ctx: core.CallContext) -> None:
        thread = threading.Thread(target=ctx.client_log, args=(core.Level.INFO, text))
        thread.start()
        thread.join()

    heard: list[str] = []
    proxy = connected(core.RpcServer(P, Impl()), P, on_log=lambda message: heard.append(message.message))
    batch = core.AnnotatedBatch.from_pydict({"n": [1]}, schema)
    session = proxy.go()
    session.exchange(batch)
    for k, ctx in enumerate(contexts):
        say(f"between {k}", ctx)
    session.exchange(batch)
    assert heard == ["between 0", "between 1"]
    say("before the end", contexts[0])
    session.close()
    assert heard[2:] == ["before the end"]
    with pytest.raises(RuntimeError, match=r"go\(\) has ended"):
        contexts[0].client_log(core.Level.INFO, "too late")


@pytest.mark.parametrize("sent", [1, 60])
def test_a_peer_that_is_silent_within_a_request_is_told_and_left(sent: int) -> None:
    client, served = core.make_unix_pair()
    server = core.RpcServer(Calc, CalcImpl(), idle_message_timeout=0.3)
    thread = threading.Thread(target=server.serve, args=(served,))
    thread.start()
    with core.RpcConnection(Calc, client, timeout=10.0) as proxy:
        assert proxy.add(1.0, 2.0) == 3.0
        time.sleep(0.5)  # between two requests it may be
        assert proxy.add(1.0, 2.0) == 3.0
        client._sock.sendall(whole("add", a=1.0, b=2.0)[:sent])
        client._sock.settimeout(10)
        assert b"silent for 0.3 s (idle_message_timeout)" in client.reader.read()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="idle_message_timeout must be positive or None, got 0"):
        core.RpcServer(Calc, CalcImpl(), idle_message_timeout=0)
