"""A service in this process, over socket pairs, and the raw connections that are mistreated."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz.child import Finding
from tests.fuzz.judge import LIMITS, core
from tests.fuzz.messages import write_stream
from tests.fuzz.target_nested import Color, Record

PATIENCE = 10.0  # seconds until a connection that neither answers nor ends is a hang
IDLE = 0.02  # seconds of silence after which the sender says that nothing more comes


@dataclasses.dataclass
class Keep(core.ExchangeState):
    """Keeps what it is given."""

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        """One input."""
        Impl.inputs.append(input.batch)
        out.emit_pydict({"n": [input.batch.num_rows]})


@dataclasses.dataclass
class Count(core.ProducerState):
    """Counts down."""

    left: int

    def produce(self, out: Any, ctx: Any) -> None:
        """One number."""
        if not self.left:
            out.finish()
            return
        out.emit_pydict({"n": [self.left]})
        self.left -= 1


class Service(Protocol):
    """What is called."""

    def add(self, a: int, b: int) -> int: ...
    def scale(self, a: float, f: float) -> float: ...
    def text(self, s: str, b: bytes) -> str: ...
    def mixed(
        self, i: int, f: float, s: str | None, b: bytes, words: list[str], o: int | None, t: bool, m: dict[str, int]
    ) -> str: ...
    def many(self, rows: list[list[int]], blobs: list[bytes]) -> list[int]: ...
    def color(self, c: Color) -> Color: ...
    def record(self, r: Record) -> Record: ...
    def batch(self, b: pa.RecordBatch) -> pa.RecordBatch: ...
    def schema(self, s: pa.Schema) -> pa.Schema: ...
    def nothing(self) -> None: ...
    def table(self, m: dict[str, int]) -> dict[str, int]: ...
    def go(self) -> core.Stream[Keep]: ...
    def count(self, n: int) -> core.Stream[Count]: ...


class Impl:
    """Answers with what it got, and remembers it."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 (of this process)
    inputs: list[pa.RecordBatch] = []  # noqa: RUF012
    declared = pa.schema([("n", pa.int64())])

    def _note(self, name: str, **values: Any) -> None:
        self.calls.append((name, values))

    def add(self, a: int, b: int) -> int:
        self._note("add", a=a, b=b)
        return a + b if abs(a + b) < 1 << 62 else 0

    def scale(self, a: float, f: float) -> float:
        self._note("scale", a=a, f=f)
        return a

    def text(self, s: str, b: bytes) -> str:
        self._note("text", s=s, b=b)
        return s

    def mixed(self, **values: Any) -> str:
        self._note("mixed", **values)
        return "done"

    def many(self, rows: list[list[int]], blobs: list[bytes]) -> list[int]:
        self._note("many", rows=rows, blobs=blobs)
        return [len(rows), len(blobs)]

    def color(self, c: Color) -> Color:
        self._note("color", c=c)
        return c

    def record(self, r: Record) -> Record:
        self._note("record", r=r)
        return r

    def batch(self, b: pa.RecordBatch) -> pa.RecordBatch:
        self._note("batch", b=b)
        return b

    def schema(self, s: pa.Schema) -> pa.Schema:
        self._note("schema", s=s)
        return s

    def nothing(self) -> None:
        self._note("nothing")

    def table(self, m: dict[str, int]) -> dict[str, int]:
        self._note("table", m=m)
        return m

    def go(self) -> core.Stream[Keep]:
        return core.Stream(output_schema=NUMBER, state=Keep(), input_schema=self.declared)

    def count(self, n: int) -> core.Stream[Count]:
        return core.Stream(output_schema=NUMBER, state=Count(min(n, 5)))


Impl.mixed.__signature__ = __import__("inspect").signature(Service.mixed)  # type: ignore[attr-defined]
NUMBER = pa.schema([("n", pa.int64())])
METHODS = core.rpc_methods(Service)
RESULT = METHODS["add"].result_schema


def request(method: str, values: list[Any], extra: dict[bytes, bytes] | None = None) -> bytes:
    """An honest request, as pyarrow writes it."""
    schema = METHODS[method].params_schema
    arrays = [pa.array([value], field.type) for value, field in zip(values, schema, strict=True)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays else core.empty_batch(schema)
    metadata = {b"vgi_rpc.method": method.encode(), b"vgi_rpc.request_version": b"1", b"vgi_rpc.protocol": b"Service"}
    return write_stream(schema, [(batch, {**metadata, **(extra or {})})])


def number_reply(number: int) -> bytes:
    """How `add` answers."""
    batch = pa.RecordBatch.from_arrays([pa.array([number], pa.int64())], schema=RESULT)
    return write_stream(RESULT, [(batch, None)])


class Server:
    """One server, and as many connections as it takes."""

    def __init__(self) -> None:
        self.server = core.RpcServer(Service, Impl(), limits=LIMITS, server_id="fuzzed")
        self.number = 1 << 40

    def connect(self) -> Connection:
        """A raw connection to a thread that serves it."""
        return Connection(self.server)

    def control(self) -> tuple[bytes, bytes]:
        """An honest request that nobody has sent before, and its answer."""
        self.number += 1
        return request("add", [self.number, 1]), number_reply(self.number + 1)

    def prove(self) -> Connection:
        """A new connection must work."""
        connection = self.connect()
        asked, answer = self.control()
        connection.send(asked)
        if not connection.read(answer, PATIENCE) or bytes(connection.got) != answer:
            raise Finding(f"a new connection answered {bytes(connection.got)[:300]!r} to an honest call")
        return connection


class Connection:
    """Our end of a socket pair; the other is served."""

    def __init__(self, server: Any) -> None:
        self.sock, served = socket.socketpair()
        self.sock.settimeout(PATIENCE)
        transport = core.UnixTransport(served)
        self.ended = False
        self.got = bytearray()
        self.error: BaseException | None = None

        def serve() -> None:
            try:
                server.serve(transport)
            except BaseException as exc:
                self.error = exc
            finally:
                transport.close()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()

    def send(self, data: bytes) -> None:
        """Send everything that the server still takes."""
        self.got.clear()
        try:
            self.sock.sendall(data)
        except TimeoutError as exc:
            raise Finding("the server reads no more") from exc
        except OSError:
            pass

    def read(self, answer: bytes, patience: float) -> bool:
        """Read up to an answer (True), the end, or so many seconds of silence."""
        self.sock.settimeout(patience)
        while not self.got.endswith(answer):
            try:
                piece = self.sock.recv(1 << 20)
            except TimeoutError:
                return False
            except OSError:
                piece = b""
            if not piece:
                self.ended = True
                return False
            self.got += piece
        return True

    def ask(self, data: bytes, control: bytes, answer: bytes) -> bool:
        """Send something and an honest call behind it; True: the call was answered on this connection.

        Finding: neither an answer nor an end.
        """
        self.send(data + control)
        if self.read(answer, IDLE):
            return True
        if self.ended:
            self.close()
            return False
        self.sock.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        while not self.ended:
            if self.read(answer, 1.0):
                answered = True
                break
            if time.monotonic() - began > PATIENCE:
                raise Finding("a connection that neither answers nor ends")
        else:
            answered = False
        self.close()
        return answered

    def close(self) -> None:
        """End it and wait for its thread."""
        self.ended = True  # a server that has ended it waits for that, so that its last words are read
        self.sock.close()
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            raise Finding("the thread of a connection that is closed goes on")
        if self.error is not None and not isinstance(self.error, EOFError | ConnectionError):
            raise Finding(f"serve() raised {type(self.error).__name__}: {self.error}") from self.error


def replies(data: bytes) -> list[list[tuple[pa.RecordBatch, dict[bytes, bytes]]]]:
    """The streams of an answer; Finding when it is not whole streams that pyarrow reads."""
    found = []
    source = pa.BufferReader(data)
    try:
        while source.tell() < len(data):
            with ipc.open_stream(source) as reader:
                items = list(reader.iter_batches_with_custom_metadata())
            for batch, _ in items:
                batch.validate(full=True)
            found.append([(batch, dict(metadata or {})) for batch, metadata in items])
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise Finding(f"an answer that pyarrow does not read: {exc}; {data[:400].hex()}") from exc
    return found
