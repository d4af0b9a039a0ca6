"""Room 13: the proxy; arguments, errors, messages, and functions that take a proxy."""

from __future__ import annotations

import enum
import logging
import threading
import time
from typing import Annotated, Protocol

import pyarrow as pa
import pytest

from tests.core import core


class Colour(enum.Enum):
    RED = "r"


class Svc(Protocol):
    def join(self, a: str, b: str = "-", times: int = 1) -> str: ...
    def maybe(self, a: int | None = 5) -> int | None: ...
    def colour(self, c: Colour) -> Colour: ...
    def talk(self, n: int) -> int: ...
    def fail(self, text: str) -> None: ...
    def ids(self, x: set[int]) -> set[int]: ...


class Impl:
    def join(self, a, b, times):
        return (a + b) * times

    def maybe(self, a):
        return a

    def colour(self, c):
        return c

    def talk(self, n, ctx):
        for i in range(n):
            ctx.client_log(core.Level.INFO, f"m{i}", i=i)
        return n

    def fail(self, text):
        raise KeyError(text)

    def ids(self, x):
        return x


@pytest.fixture
def proxy():
    with core.serve_pipe(Svc, Impl()) as found:
        yield found


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        (("x",), {}, "x-"),
        (("x", "y"), {}, "xy"),
        (("x",), {"times": 2}, "x-x-"),
        ((), {"b": "2", "a": "1", "times": 3}, "121212"),
    ],
)
def test_arguments_bind_like_the_protocols_signature(proxy, args, kwargs, want) -> None:
    assert proxy.join(*args, **kwargs) == want


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "missing required argument: 'a'"),
        (("x",), {"c": 1}, "unexpected argument 'c'"),
        (("x",), {"a": "y"}, "multiple values for argument 'a'"),
        (("x", "y", 1, 2), {}, "takes 3 argument"),
        ((None,), {}, "parameter 'a' is not optional but got None"),
        ((5,), {}, "parameter 'a'"),
        (("x", "y", "z"), {}, "parameter 'times'"),
        (("x", "y", 1.5), {}, "parameter 'times': expected int, got 1.5"),
        (("x", "y", True), {}, "parameter 'times'"),
        (("x", "y", 2**63), {}, "parameter 'times'"),
        (("\ud800",), {}, "parameter 'a'"),
    ],
)
def test_a_wrong_call_raises_here_and_costs_nothing(proxy, args, kwargs, text) -> None:
    for _ in range(2):  # before and after the layout is learned
        with pytest.raises(core.RpcArgumentError) as caught:
            proxy.join(*args, **kwargs)
        assert text in str(caught.value) and caught.value.sent == "no" and isinstance(caught.value, TypeError)
        assert proxy.join("a") == "a-"


def test_none_is_a_value_where_it_is_declared(proxy) -> None:
    for _ in range(3):
        assert proxy.maybe(None) is None and proxy.maybe() == 5 and proxy.maybe(7) == 7


def test_values_keep_their_python_types(proxy) -> None:
    for _ in range(3):
        assert proxy.colour(Colour.RED) is Colour.RED
        assert proxy.ids({1, 2}) == {1, 2}


def test_unknown_methods_and_attributes(proxy) -> None:
    with pytest.raises(AttributeError, match="no RPC method 'nope'"):
        proxy.nope()
    assert proxy.join is proxy.join
    assert "join" in dir(proxy) and "Svc" in repr(proxy)


def test_a_remote_error_keeps_the_connection_and_shows_its_traceback(proxy) -> None:
    for _ in range(3):
        with pytest.raises(core.RpcError) as caught:
            proxy.fail("gone")
        assert caught.value.error_type == "KeyError" and caught.value.sent == "answered"
        assert any("Remote traceback" in note and "in fail" in note for note in caught.value.__notes__)
        assert proxy.join("a") == "a-"


def test_messages_arrive_in_order_while_the_method_runs() -> None:
    seen, gate = [], threading.Event()

    class Slow(Impl):
        def talk(self, n, ctx):
            ctx.client_log(core.Level.WARN, "first")
            assert gate.wait(5)  # only the caller's callback opens it
            return n

    def on_log(message):
        seen.append((message.level, message.message))
        gate.set()

    with core.serve_pipe(Svc, Slow(), on_log=on_log) as proxy:
        assert proxy.talk(3) == 3
    assert seen == [(core.Level.WARN, "first")]


def test_a_callback_that_raises_does_not_cost_the_connection() -> None:
    def on_log(message):
        raise ZeroDivisionError(message.message)

    with core.serve_pipe(Svc, Impl(), on_log=on_log) as proxy:
        with pytest.raises(ZeroDivisionError, match="m0"):
            proxy.talk(3)
        assert proxy.join("a") == "a-"


def test_a_call_from_inside_a_callback_is_refused() -> None:
    refused = []

    def on_log(message):
        with pytest.raises(core.RpcError) as caught:
            proxy.join("x")
        refused.append(str(caught.value))

    with core.serve_pipe(Svc, Impl(), on_log=on_log) as proxy:
        assert proxy.talk(1) == 1
        assert "from inside" in refused[0]
        assert proxy.join("a") == "a-"


def test_with_options_shares_the_connection(proxy) -> None:
    seen = []
    other = core.with_options(proxy, on_log=seen.append, timeout=5)
    assert other.talk(2) == 2 and [m.extra["i"] for m in seen] == ["0", "1"]
    assert proxy.talk(1) == 1 and len(seen) == 2
    assert core.with_options(other)._options == other._options
    with pytest.raises(ValueError, match="positive"):
        core.with_options(proxy, timeout=0)
    with pytest.raises(TypeError, match="expected a proxy"):
        core.with_options(object(), timeout=1)


class Told:
    """A call hook: what it is told, and what it sends along."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[tuple[object, str, str]] = []

    def on_call_start(self, info, metadata):
        self.begun.append(info.name)
        metadata[b"mine"] = b"1"
        metadata[core.RPC_METHOD_KEY] = b"another"  # which it may not change
        return len(self.begun)

    def on_call_end(self, token, info, error):
        self.ended.append((token, info.name, type(error).__name__))


def test_a_call_hook_hears_of_every_call_of_its_proxy(proxy) -> None:
    told = Told()
    other = core.with_options(proxy, call_hook=told)
    assert other.join("a") == "a-" and core.with_options(other, timeout=5).join("b") == "b-"
    proxy.join("not told")
    with pytest.raises(core.RpcError):
        other.fail("x")
    with pytest.raises(core.RpcArgumentError):
        other.join()
    assert list(core.map_calls(other.maybe, [{"a": 1}, {"a": 2}])) == [1, 2]
    assert core.submit(other.maybe, 3).result(5) == 3
    with pytest.raises(core.RpcArgumentError):
        core.submit(other.maybe, 1, 2)
    with pytest.raises(core.RpcError):
        list(core.map_calls(other.fail, [{"text": "y"}]))
    deadline = time.monotonic() + 5
    while len(told.ended) < len(told.begun) and time.monotonic() < deadline:
        time.sleep(0.01)  # a Future's callbacks run after its result can be had
    assert sorted(token for token, _, _ in told.ended) == list(range(1, len(told.begun) + 1))
    outcomes = [(name, error) for _, name, error in sorted(told.ended)]
    assert outcomes[:4] == [
        ("join", "NoneType"),
        ("join", "NoneType"),
        ("fail", "RpcError"),
        ("join", "RpcArgumentError"),
    ]
    assert outcomes[-1] == ("fail", "RpcError")


def test_what_a_call_hook_adds_is_in_the_request_beside_the_deadline() -> None:
    plan = core._WirePlan(core.rpc_methods(Svc)["maybe"], "Svc", None)
    pieces = core._wire_request(plan, [1], 2.0, {b"mine": b"1", core.RPC_METHOD_KEY: b"another"})
    with pa.ipc.open_stream(b"".join(pieces)) as reader:
        _, metadata = reader.read_next_batch_with_custom_metadata()
    assert metadata[b"mine"] == b"1" and metadata[core.DEADLINE_KEY] == b"%016d" % 2_000_000
    assert metadata[core.RPC_METHOD_KEY] == b"maybe"


def test_ping_and_reflection_over_the_connection_in_hand(proxy) -> None:
    assert 0 < core.ping(proxy) < 5 and core.ping(proxy, timeout=5) > 0
    with pytest.raises(core.ReflectionNotSupportedError, match="enable_describe"):
        core.list_protocols(proxy)
    with pytest.raises(TypeError, match="expected a proxy or a transport"):
        core.list_protocols(object())
    assert proxy.join("a") == "a-"


def test_introspect_over_a_transport() -> None:
    client, served = core.make_pipe_pair()
    server = core.RpcServer(Svc, Impl(), enable_describe=True, server_id="me")
    thread = threading.Thread(target=server.serve, args=(served,))
    thread.start()
    found = core.introspect(client)
    assert (found.protocol_name, found.server_id, found.describe_version) == ("Svc", "me", "5")
    assert found.protocol_hash == server.protocol_hash
    assert found.methods["join"].params_schema == core.rpc_methods(Svc)["join"].params_schema
    with pytest.raises(core.RpcError) as caught:
        core.describe_protocol(client, "Nope")
    assert caught.value.error_kind == "protocol_not_supported"
    client.close()
    thread.join(5)
    served.close()


def test_a_deadline_travels_and_expires() -> None:
    class Patient(Impl):
        def talk(self, n, ctx):
            return int(ctx.time_left() * 1000)

        def fail(self, text):
            time.sleep(3)

    with core.serve_pipe(Svc, Patient()) as proxy:
        for _ in range(3):  # also when the request with its deadline is a learned layout
            assert 20_000 < core.with_options(proxy, timeout=30).talk(1) <= 30_000
        began = time.monotonic()
        with pytest.raises(core.DeadlineExceededError) as caught:
            core.with_options(proxy, timeout=0.3).fail("x")
        assert time.monotonic() - began < 2 and caught.value.sent == "maybe"
        with pytest.raises(core.ConnectionLostError, match=r"timeout of 0\.3 s") as lost:
            proxy.join("a")
        assert lost.value.sent == "no"


def test_foreign_transport_objects_work() -> None:
    class Plain:
        def __init__(self, reader, writer):
            self.reader, self.writer = reader, writer

        def close(self):
            self.reader.close()
            self.writer.close()

    class NoDescriptor:
        def __init__(self, stream):
            self._stream = stream

        def read(self, n):
            return self._stream.read(n)

        def write(self, data):
            return self._stream.write(data)

        def close(self):
            self._stream.close()

    for wrap in (lambda s: s, NoDescriptor):
        client, served = core.make_pipe_pair()
        thread = threading.Thread(target=core.RpcServer(Svc, Impl()).serve, args=(served,))
        thread.start()
        plain = Plain(wrap(client.reader), wrap(client.writer))
        with core.RpcConnection(Svc, plain) as proxy:
            assert proxy.join("a") == "a-" and proxy.join("b" * 300_000) == "b" * 300_000 + "-"
            with pytest.raises(core.RpcError):
                proxy.fail("x")
        thread.join(5)
        served.close()


class Words(Protocol):
    def echo(self, word: Annotated[str, core.ArrowType(pa.dictionary(pa.int16(), pa.utf8()))]) -> str: ...
    def long(self, text: str) -> int: ...


class WordsImpl:
    def echo(self, word, ctx):
        ctx.check_deadline()
        return word

    def long(self, text):
        return len(text)


def test_a_deadline_is_found_behind_dictionaries_of_any_size() -> None:
    with core.serve_pipe(Words, WordsImpl(), timeout=30) as proxy:
        for word in ("A", "B", "0" * 1000, "1" * 16, "A", "2" * 333):
            assert proxy.echo(word) == word  # its own digits must not be taken for the budget


def test_a_limit_holds_also_for_requests_that_look_familiar() -> None:
    client, served = core.make_pipe_pair()
    server = core.RpcServer(Words, WordsImpl(), limits=core.IpcLimits(max_message_bytes=1024))
    thread = threading.Thread(target=server.serve, args=(served,))
    thread.start()
    proxy = core.RpcProxy(Words, client)
    assert [proxy.long("x" * n) for n in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(core.RpcError, match="max_message_bytes=1024"):
        proxy.long("x" * 20_000)
    client.close()
    thread.join(5)
    served.close()


@pytest.mark.parametrize("columns", [{"other": 1, "result": 2}, {"wrong": 5}, {}])
def test_a_reply_of_another_shape_is_read_alike_every_time(columns: dict[str, int]) -> None:
    plan = core._WirePlan(core.rpc_methods(Words)["long"], "Words", None)
    fields = [pa.field(name, pa.int64(), nullable=False) for name in columns]
    arrays = [pa.array([value], pa.int64()) for value in columns.values()]
    writer = core._IpcWriter(pa.schema(fields))
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)))
    writer.close()
    data = b"".join(bytes(memoryview(piece)) for piece in writer.take())
    for _ in range(3):
        with pytest.raises((pa.ArrowInvalid, core.RpcError), match="answered with"):
            core._wire_value(plan, core._wire_read_reply(plan, core._IpcSource(data), core.IpcValidation.FULL, None))
    assert plan.replies == []


def test_an_error_of_another_connection_is_no_reason_to_call_again(tmp_path) -> None:
    runs = []

    class Counting(Impl):
        def talk(self, n, ctx):
            runs.append(n)
            ctx.client_log(core.Level.INFO, "x")
            return n

    def on_log(message):
        raise core.ConnectionLostError("another connection", sent="no")

    path = str(tmp_path / "s")
    bound = threading.Event()
    server = core.RpcServer(Svc, Counting())
    options = {"threaded": True, "idle_timeout": 0.1, "on_bound": lambda _: bound.set()}
    thread = threading.Thread(target=core.serve_unix, args=(server, path), kwargs=options)
    thread.start()
    assert bound.wait(5)
    with core.unix_connect(Svc, path, on_log=on_log, reconnect=True) as proxy:
        with pytest.raises(core.ConnectionLostError, match="another connection"):
            proxy.talk(1)
        assert runs == [1] and proxy.join("a") == "a-"
    thread.join(10)
    assert not thread.is_alive()


def test_every_reply_is_classified_in_the_wire_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vgi_rpc.wire.batch")
    with core.serve_pipe(Words, WordsImpl(), timeout=10) as proxy:
        for _ in range(4):
            proxy.long("x")
    said = [record.getMessage() for record in caplog.records if record.name == "vgi_rpc.wire.batch"]
    assert said.count("Classify batch: rows=1, no metadata -> data") >= 4
