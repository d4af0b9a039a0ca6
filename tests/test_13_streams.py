"""Room 13: streams as their caller sees them, against a real server."""

from __future__ import annotations

import contextlib
import gc
import threading
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pytest

from tests.core import core

N = pa.schema([("n", pa.int64())])
CANCELLED: list[str] = []


@dataclass
class Head(core.ArrowSerializableDataclass):
    total: int
    title: str = ""


@dataclass
class Count(core.ProducerState):
    left: int
    fail_at: int = -1
    at: int = 0

    def produce(self, out, ctx):
        if self.at == self.fail_at:
            raise ValueError(f"stopped at {self.at}")
        if self.at == self.left:
            out.client_log(core.Level.INFO, "done")
            out.finish()
            return
        out.client_log(core.Level.INFO, f"turn {self.at}")
        out.emit_pydict({"n": [self.at]}, metadata={"app.at": str(self.at)})
        self.at += 1

    def on_cancel(self, ctx):
        CANCELLED.append("producer")
        ctx.client_log(core.Level.WARN, "cancelled")


@dataclass
class TickEcho(core.StreamState):
    def process(self, input, out, ctx):
        seen = dict(input.custom_metadata or {}).get(b"app.k", b"-").decode()
        out.emit_pydict({"n": [len(seen)]}, metadata={"app.seen": seen})


@dataclass
class Double(core.ExchangeState):
    fail_on: int = -1

    def exchange(self, input, out, ctx):
        values = input.batch.column("n").to_pylist()
        if self.fail_on in values:
            raise KeyError("refused")
        out.emit_pydict({"n": [2 * v for v in values]})

    def on_cancel(self, ctx):
        CANCELLED.append("exchange")


@dataclass
class Empty(core.ExchangeState):
    turns: int = 0

    def exchange(self, input, out, ctx):
        self.turns += 1
        out.emit(pa.RecordBatch.from_pydict({"n": [self.turns]}, schema=N))


class Svc(Protocol):
    def count(self, n: int, fail_at: int = -1) -> core.Stream[Count]: ...
    def headed(self, n: int) -> core.Stream[Count, Head]: ...
    def bad_head(self) -> core.Stream[Count, Head]: ...
    def refused(self) -> core.Stream[Count]: ...
    def refused_head(self) -> core.Stream[Count, Head]: ...
    def not_a_stream(self) -> core.Stream[Count]: ...
    def double(self, fail_on: int = -1) -> core.Stream[Double]: ...
    def nothing(self) -> core.Stream[Empty]: ...
    def ticks(self) -> core.Stream[TickEcho]: ...
    def table(self, rows: int) -> core.Stream[core.ProducerState]: ...
    def alive(self) -> str: ...


class Impl:
    def count(self, n, fail_at, ctx):
        ctx.client_log(core.Level.INFO, "init")
        return core.Stream(N, Count(n, fail_at))

    def headed(self, n):
        return core.Stream(N, Count(n), header=Head(n, "t"))

    def bad_head(self):
        return core.Stream(N, Count(1), header="no")

    def refused(self):
        raise RuntimeError("no stream today")

    refused_head = refused

    def not_a_stream(self):
        return 5

    def double(self, fail_on):
        return core.Stream(N, Double(fail_on), input_schema=N)

    def nothing(self):
        return core.Stream(N, Empty())

    def ticks(self):
        return core.Stream(N, TickEcho())

    def table(self, rows):
        return core.Stream.from_arrow(pa.table({"n": list(range(rows))}))

    def alive(self):
        return "alive"


LOGS: list[str] = []


@pytest.fixture(params=["serve_pipe", "serve_unix_pipe", "serve_tcp_pipe"])
def proxy(request):
    LOGS.clear()
    CANCELLED.clear()
    with getattr(core, request.param)(Svc, Impl(), on_log=lambda m: LOGS.append(m.message)) as found:
        yield found
        assert found.alive() == "alive"  # whatever a test did, the connection is in step


def ns(batches) -> list[list[int]]:
    return [b.batch.column("n").to_pylist() for b in batches]


def annotated(*values: int) -> object:
    return core.AnnotatedBatch.from_pydict({"n": list(values)}, N)


def test_a_producer_in_order_with_messages_and_metadata(proxy) -> None:
    batches = list(proxy.count(2))
    assert ns(batches) == [[0], [1]]
    assert [b.custom_metadata[b"app.at"] for b in batches] == [b"0", b"1"]
    assert LOGS == ["init", "turn 0", "turn 1", "done"]
    assert ns(proxy.count(0)) == []


def test_tick_ends_with_stop_iteration_and_then_is_closed(proxy) -> None:
    session = proxy.count(1)
    assert ns([session.tick()]) == [[0]]
    with pytest.raises(StopIteration):
        session.tick()
    with pytest.raises(core.RpcError, match="closed or cancelled"):
        session.tick()
    session.close()
    session.cancel()


def test_tick_metadata_reaches_the_method(proxy) -> None:
    with proxy.ticks() as session:
        answer = session.tick(pa.KeyValueMetadata({"app.k": "hello"}))
        assert answer.custom_metadata[b"app.seen"] == b"hello"
        assert session.tick().custom_metadata[b"app.seen"] == b"-"


def test_headers(proxy) -> None:
    session = proxy.headed(2)
    assert session.header == Head(2, "t") and session.typed_header(Head).total == 2
    with pytest.raises(TypeError, match="Header type mismatch: expected Count, got Head"):
        session.typed_header(Count)
    assert ns(session) == [[0], [1]]
    with proxy.count(0) as plain, pytest.raises(TypeError, match=r"Stream has no header \(expected Head\)"):
        plain.typed_header(Head)


@pytest.mark.parametrize(("method", "error"), [("refused", "RuntimeError"), ("not_a_stream", "TypeError")])
def test_a_failed_init_shows_at_the_first_read_or_at_close(proxy, method: str, error: str) -> None:
    with pytest.raises(core.RpcError) as caught:
        getattr(proxy, method)().tick()
    assert caught.value.error_type == error
    assert proxy.alive() == "alive"
    with pytest.raises(core.RpcError) as caught:
        getattr(proxy, method)().close()
    assert caught.value.error_type == error
    getattr(proxy, method)().cancel()


@pytest.mark.parametrize(("method", "error"), [("refused_head", "RuntimeError"), ("bad_head", "TypeError")])
def test_a_failed_init_with_a_header_raises_at_once(proxy, method: str, error: str) -> None:
    with pytest.raises(core.RpcError) as caught:
        getattr(proxy, method)()
    assert caught.value.error_type == error


def test_an_error_in_a_turn_ends_the_stream(proxy) -> None:
    session = proxy.count(5, fail_at=1)
    assert ns([session.tick()]) == [[0]]
    with pytest.raises(core.RpcError, match="stopped at 1"):
        session.tick()
    assert LOGS == ["init", "turn 0"]
    with pytest.raises(core.RpcError, match="closed or cancelled"):
        session.tick()


def test_exchange(proxy) -> None:
    with proxy.double() as session:
        for value in range(50):
            assert ns([session.exchange(annotated(value, 1))]) == [[2 * value, 2]]
    with proxy.double(fail_on=3) as session:
        session.exchange(annotated(1))
        with pytest.raises(core.RpcError, match="refused"):
            session.exchange(annotated(3))


def test_an_exchange_input_is_reordered_cast_or_refused(proxy) -> None:
    small = pa.RecordBatch.from_pydict({"n": pa.array([4], pa.int8())})
    with proxy.double() as session:
        assert ns([session.exchange(core.AnnotatedBatch(small))]) == [[8]]
        with pytest.raises(core.RpcArgumentError, match="one schema"):
            session.exchange(annotated(1))
        assert ns([session.exchange(core.AnnotatedBatch(small))]) == [[8]]
    for wrong in ({"m": [1]}, {"n": ["x"]}):
        with pytest.raises(core.RpcError, match="Input schema mismatch"), proxy.double() as session:
            session.exchange(core.AnnotatedBatch.from_pydict(wrong))


def test_ticking_an_exchange_and_exchanging_with_a_producer_are_refused(proxy) -> None:
    with pytest.raises(core.RpcError, match="Input schema mismatch"):
        proxy.double().tick()
    with pytest.raises(core.RpcError, match="Input schema mismatch"):
        proxy.count(3).exchange(annotated(1))


def test_a_zero_column_exchange_is_a_producer_for_many_turns(proxy) -> None:
    empty = core.AnnotatedBatch(core.empty_batch(core.EMPTY_SCHEMA))
    with proxy.nothing() as session:
        assert [ns([session.exchange(empty)])[0][0] for _ in range(120)] == list(range(1, 121))


def test_cancel_runs_on_cancel_and_close_does_not(proxy) -> None:
    session = proxy.count(10**9)
    session.tick()
    session.cancel()
    assert CANCELLED == ["producer"] and LOGS[-1] == "cancelled"
    with proxy.count(10**9) as session:
        session.tick()
    assert CANCELLED == ["producer"]
    proxy.double().cancel()
    assert CANCELLED == ["producer", "exchange"]


def test_early_close_before_and_after_reading(proxy) -> None:
    proxy.count(10**9).close()
    with proxy.count(10**9) as session:
        for _ in range(3):
            session.tick()


def test_one_conversation_at_a_time(proxy) -> None:
    with proxy.count(3) as session:
        session.tick()
        for attempt in (proxy.alive, lambda: proxy.count(1), lambda: core.ping(proxy)):
            with pytest.raises(core.RpcError, match="a stream is open") as caught:
                attempt()
            assert caught.value.sent == "no"
        assert ns([session.tick()]) == [[1]]


def test_a_dropped_session_warns_and_frees_the_connection(proxy) -> None:
    with pytest.warns(ResourceWarning, match="count"):
        proxy.count(10**9).tick()
        gc.collect()
    assert proxy.alive() == "alive"


def test_the_arrow_interface_reads_everything_once(proxy) -> None:
    assert proxy.count(3).read_all().to_pydict() == {"n": [0, 1, 2]}
    session = proxy.count(3)
    assert session.schema == N and session.schema == N
    reader = pa.RecordBatchReader.from_stream(session)
    assert reader.schema == N and reader.read_all().num_rows == 3
    with pytest.raises(core.RpcError, match="has been consumed"):
        session.to_reader()
    empty = proxy.count(0)
    assert empty.read_all().schema == N
    with proxy.double() as exchange, pytest.raises(core.RpcError, match="exchange"):
        exchange.to_reader()


def test_a_schema_asked_for_keeps_the_first_batch(proxy) -> None:
    session = proxy.count(2)
    assert session.schema == N
    assert ns(session) == [[0], [1]]


def test_serving_any_arrow_stream(proxy) -> None:
    assert proxy.table(7).read_all().column("n").to_pylist() == list(range(7))
    assert proxy.table(0).read_all().num_rows == 0


KIND = pa.dictionary(pa.int16(), pa.utf8())
WIDE = pa.schema([("k", KIND), ("v", pa.float64())])


@dataclass
class Echo(core.ExchangeState):
    def exchange(self, input, out, ctx):
        out.emit(input.batch)


class Wide(Protocol):
    def echo(self) -> core.Stream[Echo]: ...


class WideImpl:
    def echo(self):
        return core.Stream(WIDE, Echo(), input_schema=WIDE)


def test_large_batches_and_dictionaries() -> None:
    with core.serve_unix_pipe(Wide, WideImpl()) as proxy, proxy.echo() as session:
        for rows, words in ((0, ["a"]), (3, ["a", "b"]), (200_000, ["b", "c"]), (2, ["z"])):
            keys = pa.array([words[i % len(words)] for i in range(rows)], pa.utf8()).cast(KIND)
            batch = pa.RecordBatch.from_arrays([keys, pa.array([float(i) for i in range(rows)])], schema=WIDE)
            assert session.exchange(core.AnnotatedBatch(batch)).batch.to_pydict() == batch.to_pydict()


def test_a_turn_that_was_refused_leaves_the_stream_as_it_was() -> None:
    def words(*values: str) -> object:
        keys = pa.array(values, pa.utf8()).cast(KIND)
        batch = pa.RecordBatch.from_arrays([keys, pa.array([0.0] * len(values))], schema=WIDE)
        return core.AnnotatedBatch(batch)

    with core.serve_pipe(Wide, WideImpl()) as proxy, proxy.echo() as session:
        channel = session._channel
        taken, done = threading.Event(), threading.Event()

        def hold() -> None:
            with channel.lock:
                taken.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        assert taken.wait(5)
        for _ in range(2):  # the schema, then a new dictionary, must not be lost with the refused turn
            with pytest.raises(core.DeadlineExceededError) as caught:
                session.exchange(words("right"), timeout=0.05)
            assert caught.value.sent == "no"
        done.set()
        thread.join()
        assert session.exchange(words("right")).batch.column("k").to_pylist() == ["right"]
        with pytest.raises(core.RpcArgumentError):
            session.exchange(core.AnnotatedBatch(words("x").batch, {"a": 1}))
        answer = session.exchange(core.AnnotatedBatch(words("y").batch, pa.KeyValueMetadata({"a": "1"})))
        assert answer.batch.column("k").to_pylist() == ["y"]


# ---- messages that make no sense, in frames that are in order


TEXT = pa.schema([("s", pa.utf8())])


def garbled(rows: int = 1) -> pa.RecordBatch:
    """Text that is not UTF-8: pyarrow writes it, and a reader that validates refuses it."""
    data = pa.py_buffer(b"\xff\xfe" * rows)
    offsets = pa.array(range(0, 2 * rows + 1, 2), pa.int32()).buffers()[1]
    return pa.RecordBatch.from_arrays([pa.Array.from_buffers(pa.utf8(), rows, [None, offsets, data])], schema=TEXT)


@dataclass
class Garble(core.ProducerState):
    bad_at: int
    at: int = 0

    def produce(self, out, ctx):
        self.at += 1
        if self.at > 200:
            out.finish()
        else:
            out.emit(garbled() if self.at > self.bad_at else pa.RecordBatch.from_pydict({"s": ["ok"]}))


@dataclass
class Answers(core.ExchangeState):
    def exchange(self, input, out, ctx):
        text = input.batch.column("s").to_pylist()
        out.emit(garbled() if text == ["garble"] else input.batch)


@dataclass
class TextHead(core.ArrowSerializableDataclass):
    text: str

    def to_row(self):
        return self


class Garbler(Protocol):
    def produce(self, bad_at: int) -> core.Stream[Garble]: ...
    def answers(self) -> core.Stream[Answers]: ...
    def alive(self) -> str: ...


class GarblerImpl:
    def produce(self, bad_at):
        return core.Stream(TEXT, Garble(bad_at))

    def answers(self):
        return core.Stream(TEXT, Answers(), input_schema=TEXT)

    def alive(self):
        return "alive"


@pytest.fixture(params=["serve_pipe", "serve_unix_pipe", "serve_tcp_pipe"])
def garbler(request):
    with getattr(core, request.param)(Garbler, GarblerImpl(), timeout=20.0) as proxy:
        yield proxy


def refusal(step) -> core.RpcError:
    with pytest.raises(core.RpcError) as caught:
        step()
    assert not isinstance(caught.value, core.ConnectionLostError)
    return caught.value


@pytest.mark.parametrize("read_ahead", [0, 1, 40])
@pytest.mark.parametrize("bad_at", [0, 1, 5])
def test_an_answer_that_makes_no_sense_costs_its_stream_only(garbler, bad_at, read_ahead):
    session = core.with_options(garbler, read_ahead=read_ahead).produce(bad_at)
    for _ in range(bad_at):
        session.tick()
    error = refusal(session.tick)
    assert (error.error_type, error.sent) == ("IPCError", "answered") and "UTF8" in str(error)
    assert garbler.alive() == "alive"
    session.close()
    with pytest.raises(core.RpcError, match="closed"):
        session.tick()
    assert garbler.alive() == "alive"


def test_leaving_a_stream_reads_over_what_makes_no_sense(garbler):
    for bad_at in (1, 3):
        with core.with_options(garbler, read_ahead=20).produce(bad_at) as session:
            session.tick()
        assert garbler.alive() == "alive"
    session = garbler.produce(0)
    with pytest.raises(core.RpcError, match="UTF8"):
        _ = session.schema
    session = core.with_options(garbler, read_ahead=20).produce(1)
    session.tick()
    session.cancel()
    assert garbler.alive() == "alive"


def test_an_exchange_whose_answer_or_input_makes_no_sense(garbler):
    def item(text: str) -> core.AnnotatedBatch:
        return core.AnnotatedBatch.from_pydict({"s": [text]}, TEXT)

    for first in (0, 2):
        session = garbler.answers()
        for _ in range(first):
            assert session.exchange(item("x")).batch.column("s").to_pylist() == ["x"]
        error = refusal(lambda session=session: session.exchange(item("garble")))
        assert "answer cannot be read" in str(error) and error.sent == "answered"
        assert garbler.alive() == "alive"
        session = garbler.answers()
        for _ in range(first):
            session.exchange(item("x"))
        error = refusal(lambda session=session: session.exchange(core.AnnotatedBatch(garbled())))
        assert error.error_type == "IPCError" and "UTF8" in str(error)  # the server's words
        assert garbler.alive() == "alive"


def test_an_endless_answer_is_given_up(monkeypatch):
    """A peer that goes on after what makes no sense is left when the deadline has passed, or after 10,000 messages."""
    monkeypatch.setattr(core, "_CLIENT_MAX_DRAIN", 50)
    client, far = core.make_unix_pair()
    writer = core._IpcWriter(TEXT)
    for _ in range(80):
        writer.write(garbled())
    far.channel.send(writer.take())
    with (
        core.RpcConnection(Garbler, client, timeout=20.0) as proxy,
        pytest.raises(core.ConnectionLostError, match="50"),
    ):
        proxy.produce(0).tick()
    far.close()
    client, far = core.make_unix_pair()
    writer = core._IpcWriter(TEXT)
    writer.write(garbled())
    far.channel.send(writer.take())
    with core.RpcConnection(Garbler, client, timeout=0.2) as proxy, pytest.raises(core.DeadlineExceededError):
        proxy.produce(0).tick()
    far.close()


def test_a_reply_a_header_and_a_ping_that_make_no_sense():
    def whole(batch: pa.RecordBatch, metadata=None) -> bytes:
        return core.serialize_record_batch_bytes(batch, metadata)

    result = pa.RecordBatch.from_arrays(garbled().columns, schema=pa.schema([pa.field("result", pa.utf8(), False)]))
    client, far = core.make_unix_pair()
    with core.RpcConnection(Svc, client, timeout=20.0) as proxy:
        far.channel.send(whole(result))
        error = refusal(proxy.alive)
        assert (error.error_type, error.sent) == ("IPCError", "answered")
        far.channel.send(whole(pa.RecordBatch.from_pydict({"result": ["alive"]}, schema=result.schema)))
        assert proxy.alive() == "alive"
        head = pa.RecordBatch.from_pylist([{"total": 1, "title": "?"}], schema=Head.ARROW_SCHEMA)
        head = pa.RecordBatch.from_arrays([head.column(0), garbled().column(0)], schema=head.schema)
        far.channel.send(whole(head) + whole(core.empty_batch(N)))  # the header, then the output of an empty input
        assert "cannot be read" in str(refusal(lambda: proxy.headed(1)))
        far.channel.send(whole(garbled()))
        core.ping(proxy)
        far.channel.send(whole(pa.RecordBatch.from_pydict({"result": ["alive"]}, schema=result.schema)))
        assert proxy.alive() == "alive"
    far.close()


# ---- metadata of a caller


@pytest.mark.parametrize(
    "metadata",
    [
        {"vgi_rpc.cancel": "1"},
        {b"vgi_rpc.shm_offset": b"65536"},
        {b"vgi_rpc.log_level": b"ERROR"},
        {"k": 1},
        {"k": "x" * (1 << 20) + "y"},
        ["k"],
    ],
    ids=["cancel", "shm", "log_level", "int", "large", "list"],
)
def test_metadata_that_a_caller_may_not_send(proxy, metadata):
    with proxy.ticks() as session:
        with pytest.raises(core.RpcArgumentError, match=r"ticks\(\): "):
            session.tick(metadata)
        assert session.tick().batch.num_rows == 1
    with proxy.double() as session:
        with pytest.raises(core.RpcArgumentError, match=r"double\(\): "):
            session.exchange(core.AnnotatedBatch(pa.RecordBatch.from_pydict({"n": [1]}, schema=N), metadata))
        assert session.exchange(core.AnnotatedBatch.from_pydict({"n": [2]}, N)).batch.column("n").to_pylist() == [4]
    assert proxy.alive() == "alive"


def test_what_a_hook_may_not_send_is_left_out(proxy):
    class Hook:
        def on_call_start(self, info, metadata):
            metadata[b"vgi_rpc.method"] = b"other"

        def on_call_end(self, token, info, error):
            pass

    assert core.with_options(proxy, call_hook=Hook()).alive() == "alive"


def test_an_empty_input_with_an_offset(proxy):
    whole = pa.RecordBatch.from_pydict({"n": [1, 2, 3]}, schema=N)
    struct = whole.slice(2, 0).to_struct_array()
    empty = pa.RecordBatch.from_struct_array(pa.Array._import_from_c_capsule(*struct.__arrow_c_array__()))
    with proxy.double() as session:
        assert session.exchange(core.AnnotatedBatch(empty)).batch.num_rows == 0
        assert session.exchange(core.AnnotatedBatch(whole)).batch.num_rows == 3


# ---- law 10: an answer of an undeclared shape


class Newer(Protocol):
    """What the server has."""

    protocol_name = "Drift"

    def total(self) -> int: ...
    def nothing(self) -> None: ...
    def headed(self) -> core.Stream[Count, Head]: ...
    def bare(self) -> core.Stream[Count]: ...
    def one(self) -> core.Stream[Once]: ...
    def alive(self) -> str: ...


class Older(Protocol):
    """What its caller believes."""

    protocol_name = "Drift"

    def total(self) -> core.Stream[Count]: ...
    def nothing(self) -> core.Stream[Count]: ...
    def headed(self) -> core.Stream[Count]: ...
    def bare(self) -> core.Stream[Count, Head]: ...
    def one(self) -> core.Stream[Once]: ...
    def alive(self) -> str: ...


class Once(core.ProducerState):
    def produce(self, out, ctx):
        out.emit_pydict({"result": [7]})
        out.finish()


class NewerImpl:
    def total(self):
        return 7

    def nothing(self):
        return None

    def headed(self):
        return core.Stream(N, Count(3), header=Head(1, "title"))

    def bare(self):
        return core.Stream(N, Count(3))

    def one(self):
        return core.Stream(pa.schema([("result", pa.int64())]), Once())

    def alive(self):
        return "alive"


@contextlib.contextmanager
def drifted(**options):
    client, far = core.make_unix_pair()
    thread = threading.Thread(target=core.RpcServer(Newer, NewerImpl()).serve, args=(far,), daemon=True)
    thread.start()
    with core.RpcConnection(Older, client, timeout=10.0, **options) as proxy:
        yield proxy
    thread.join(5.0)
    far.close()


@pytest.mark.parametrize("method", ["total", "nothing", "headed"])
@pytest.mark.parametrize(
    "use",
    [lambda s: s.tick(), lambda s: list(s), lambda s: s.close(), lambda s: s.cancel(), lambda s: s.read_all()],
    ids=["tick", "list", "close", "cancel", "read_all"],
)
def test_an_answer_of_another_kind_is_an_error_and_ends_the_connection(method, use):
    with drifted() as proxy:
        error = refusal(lambda: use(getattr(proxy, method)()))
        assert error.error_type == "ProtocolError" and "declared as a stream" in str(error)
        assert proxy._link.channel.gone()
        with pytest.raises(core.ConnectionLostError, match="another version") as caught:
            proxy.alive()
        assert caught.value.sent == "no"


def test_a_stream_of_one_row_called_result_is_still_a_stream():
    with drifted() as proxy:
        session = proxy.one()
        assert session.tick().batch.to_pydict() == {"result": [7]}
        with pytest.raises(StopIteration):
            session.tick()
        assert [item.batch.to_pydict() for item in proxy.one()] == [{"result": [7]}]
        assert proxy.one().read_all().to_pydict() == {"result": [7]}
        proxy.one().close()
        assert proxy.alive() == "alive"


@pytest.mark.parametrize("schema, rows", [(TEXT, 0), (TEXT, 1), (Head.ARROW_SCHEMA, 0), (Head.ARROW_SCHEMA, 2)])
def test_what_is_no_header_ends_the_connection(schema, rows, monkeypatch):
    """A server that has lost the header shows the schema of its output and waits; a unary one sends its result."""
    monkeypatch.setattr(core, "_CLIENT_HEADER_WAIT", 0.05)
    client, far = core.make_unix_pair()
    writer = core._IpcWriter(schema)
    for _ in range(rows):
        row = {"total": 1, "title": "?", "t": "x"}
        writer.write(pa.RecordBatch.from_pylist([{name: row.get(name, "") for name in schema.names}], schema=schema))
    if rows:
        writer.close()
    far.channel.send(writer.take())
    with core.RpcConnection(Older, client, timeout=10.0) as proxy:
        assert "with a header Head" in str(refusal(proxy.bare))
        assert proxy._link.channel.gone()
    far.close()


# ---- closed sessions, and turns out of order


@pytest.mark.parametrize("end", ["close", "cancel", "__exit__"])
@pytest.mark.parametrize("begun", [False, True, "schema"])
def test_a_closed_stream_raises_on_every_use(proxy, end, begun):
    session = proxy.count(3)
    if begun:
        session.tick() if begun is True else session.schema
    getattr(session, end)(*([None] * 3 if end == "__exit__" else []))
    uses = (session.tick, session.read_all, session.to_reader, lambda: list(session), lambda: session.schema)
    for use in uses:
        assert "closed" in str(refusal(use))


def test_a_stream_that_has_ended_is_empty_and_not_closed(proxy):
    session = proxy.count(2)
    assert ns(session) == [[0], [1]]
    assert list(session) == []
    session = proxy.count(0)
    assert session.schema == N
    with pytest.raises(StopIteration):
        session.tick()


def test_metadata_does_not_overtake_a_batch_that_the_schema_has_read(proxy):
    with proxy.count(3) as session:
        assert session.schema == N
        with pytest.raises(core.RpcArgumentError, match="schema"):
            session.tick(pa.KeyValueMetadata({"a": "b"}))
        assert ns([session.tick(), session.tick(pa.KeyValueMetadata({"a": "b"})), session.tick()]) == [[0], [1], [2]]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", 1e10])
def test_the_timeout_of_a_turn_is_checked_like_any_other(proxy, timeout):
    with proxy.count(1) as session:
        with pytest.raises(ValueError, match="timeout"):
            session.tick(timeout=timeout)
        assert ns([session.tick(timeout=3e8)]) == [[0]]  # more milliseconds than poll() takes at once
    with proxy.double() as session, pytest.raises(ValueError, match="timeout"):
        session.exchange(core.AnnotatedBatch.from_pydict({"n": [1]}, N), timeout=timeout)
