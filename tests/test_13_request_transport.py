"""Proxies over a RequestTransport: the same calls, without a connection; and what a stream over one is made of."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

OUT = pa.schema([("i", pa.int64())])
ROW = pa.record_batch([pa.array([7], pa.int64())], schema=OUT)


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def fail(self) -> int: ...
    def count(self, n: int) -> core.Stream[core.ProducerState]: ...


class Impl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def fail(self) -> int:
        raise ValueError("no luck")

    def count(self, n: int) -> Any:
        raise NotImplementedError


SERVER = core.RpcServer(Calc, Impl(), enable_describe=True)


class Loopback(core.RequestTransport):  # type: ignore[misc, name-defined]
    """Each request goes to a server in this process."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, float | None]] = []
        self.metadata: list[Mapping[bytes, bytes]] = []
        self.opened: list[Any] = []
        self.garbled = False

    def request(
        self,
        protocol: str,
        method: str,
        pieces: Sequence[Any],
        *,
        timeout: float | None,
        doing: str,
        metadata: Mapping[bytes, bytes],
    ) -> bytes:
        self.calls.append((protocol, method, timeout))
        self.metadata.append(metadata)
        out = io.BytesIO()
        SERVER.serve_one(core.PipeTransport(io.BytesIO(b"".join(pieces)), out))
        return out.getvalue()[: 20 if self.garbled else None]

    def open_stream(self, call: Any) -> Any:
        self.opened.append(call)

    def ping(self, timeout: float | None) -> None:
        self.calls.append(("", "ping", timeout))

    def close(self) -> None:
        self.calls.append(("", "close", None))

    def proxy_attribute(self, proxy: Any, name: str) -> Any:
        return super().proxy_attribute(proxy, name) if name != "special" else (proxy, name)


def body(schema: pa.Schema, *batches: tuple[pa.RecordBatch, dict[str, str] | None]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch, metadata in batches:
            writer.write_batch(batch, custom_metadata=None if metadata is None else pa.KeyValueMetadata(metadata))
    return bytes(sink.getvalue())


def test_calls_are_those_of_any_proxy() -> None:
    transport = Loopback()
    with core.RpcConnection(Calc, transport, timeout=5.0) as calc:
        assert [calc.add(1.0, b=float(b)) for b in range(3)] == [1.0, 2.0, 3.0]
        with pytest.raises(core.RpcError, match="no luck") as caught:
            calc.fail()
        assert caught.value.sent == "answered"
        with pytest.raises(core.RpcArgumentError):
            calc.add(1.0)
        assert core.with_options(calc, timeout=None).add(1.0, 1.0) == 2.0
        assert core.ping(calc) >= 0.0
        assert core.list_protocols(calc)[0].name == "Calc"
        assert core.introspect(transport).protocol_name == "Calc"
        assert calc.special == (calc, "special")
        with pytest.raises(AttributeError, match="no RPC method 'other'"):
            calc.other()
    assert transport.calls[0] == ("Calc", "add", 5.0)
    assert ("Calc", "add", None) in transport.calls and ("", "ping", 5.0) in transport.calls
    assert transport.calls[-1] == ("", "close", None)


def test_the_same_proxy_over_another_transport() -> None:
    first, second = Loopback(), Loopback()
    given: list[Any] = []

    def derive(transport: Any) -> Any:
        given.append(transport)
        return second

    with core.RpcConnection(Calc, first, timeout=5.0) as calc:
        assert core.with_transport(calc, derive).add(1.0, 2.0) == calc.add(1.0, 2.0)
    assert given == [first] and second.calls == [("Calc", "add", 5.0)]
    with core.serve_pipe(Calc, Impl()) as piped, pytest.raises(TypeError, match="byte stream"):
        core.with_transport(piped, derive)
    with pytest.raises(TypeError, match="expected a proxy"):
        core.with_transport(3, derive)


class Along:
    """A call hook that sends something along."""

    def on_call_start(self, info: Any, metadata: dict[bytes, bytes]) -> None:
        metadata[b"traceparent"] = info.name.encode()

    def on_call_end(self, token: None, info: Any, error: BaseException | None) -> None:
        pass


def test_the_transport_is_given_what_a_call_hook_sends_along() -> None:
    transport = Loopback()
    with core.RpcConnection(Calc, transport) as plain:
        calc = core.with_options(plain, call_hook=Along())
        assert calc.add(1.0, 2.0) == plain.add(1.0, 2.0) == core.submit(calc.add, 1.0, 2.0).result(5)
        assert [dict(given) for given in transport.metadata] == [{b"traceparent": b"add"}, {}, {b"traceparent": b"add"}]
        with contextlib.suppress(AttributeError):  # this transport has no sessions
            calc.count(1)
        assert transport.opened[-1].metadata == {b"traceparent": b"count"}
        assert b"traceparent" not in b"".join(transport.opened[-1].request)


def test_an_answer_that_cannot_be_read_is_a_lost_connection() -> None:
    transport = Loopback()
    transport.garbled = True
    with core.RpcConnection(Calc, transport) as calc, pytest.raises(core.ConnectionLostError) as caught:
        calc.add(1.0, 2.0)
    assert caught.value.sent == "answered"


def opened(**options: Any) -> Any:
    transport = Loopback()
    with core.RpcConnection(Calc, transport, **options) as calc:
        calc.count(3)
    return transport.opened[0]


def test_a_stream_call_knows_what_to_send() -> None:
    call = opened(timeout=3.0)
    assert (call.protocol, call.info.name, call.timeout) == ("Calc", "count", 3.0)
    batch, metadata = pa.ipc.open_stream(b"".join(call.request)).read_next_batch_with_custom_metadata()
    assert batch.to_pylist() == [{"n": 3}] and metadata[b"vgi_rpc.method"] == b"count"
    stream = pa.ipc.open_stream(b"".join(call.write(ROW, {b"k": b"v"})))
    batch, metadata = stream.read_next_batch_with_custom_metadata()
    assert batch.equals(ROW) and dict(metadata) == {b"k": b"v"}
    with pytest.raises(core.RpcArgumentError, match="cannot be written"):
        call.write(ROW, {b"k": 5})


def test_a_stream_call_reads_turns() -> None:
    heard: list[str] = []
    call = opened(on_log=lambda message: heard.append(message.message))
    log = {"vgi_rpc.log_level": "INFO", "vgi_rpc.log_message": "hello"}
    bad = {"vgi_rpc.log_level": "EXCEPTION", "vgi_rpc.log_message": "ValueError: no"}
    none = ROW.slice(0, 0)
    reply = call.read_turn(body(OUT, (none, log), (ROW, None), (none, {"t": "1"}), (none, bad), (ROW, None)))
    assert reply.schema == OUT and heard == ["hello"]
    assert [(batch.num_rows, metadata) for batch, metadata in reply.batches] == [(1, None), (0, {b"t": b"1"})]
    assert isinstance(reply.error, core.RpcError)
    assert call.read_opening(body(OUT)).batches == []
    for garbage in (b"", b"<html>", body(OUT, (ROW, None))[:-20]):
        with pytest.raises(core.ConnectionLostError):
            call.read_turn(garbage)
    with pytest.raises(core.RpcError, match="external storage"):
        call.read_turn(body(OUT, (none, {"vgi_rpc.location": "https://x"})))


def test_a_resumed_call_sends_no_request() -> None:
    transport = Loopback()
    with core.RpcConnection(Calc, transport, timeout=2.0) as calc:
        call = core.StreamCall.resumed(calc, "count")
        assert (list(call.request), call.timeout) == ([], 2.0)
        with pytest.raises(TypeError, match="not a stream"):
            core.StreamCall.resumed(calc, "add")
        with pytest.raises(AttributeError):
            core.StreamCall.resumed(calc, "nope")
