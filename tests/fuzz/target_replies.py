"""Answers of a hostile server: the caller gets what pyarrow reads there, or an RpcError; never another's answer."""

from __future__ import annotations

import queue
import random
import socket
import threading
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import LIMITS, core, same_batch, tolerate
from tests.fuzz.messages import Corpus, write_stream
from tests.fuzz.service import METHODS, NUMBER, Service, number_reply
from tests.fuzz.target_nested import Color, Record, random_record

TIMEOUT = 10.0
ERROR = {b"vgi_rpc.log_level": b"EXCEPTION", b"vgi_rpc.log_message": b"no", b"vgi_rpc.log_extra": b"{}"}
LOG = {b"vgi_rpc.log_level": b"INFO", b"vgi_rpc.log_message": b"hello", b"vgi_rpc.log_extra": b'{"a": 1}'}
ARGUMENTS: dict[str, list[Any]] = {
    "add": [1, 2],
    "scale": [0.5, 1.0],
    "text": ["s", b"b"],
    "many": [[[1]], [b"x"]],
    "color": [Color.RED],
    "record": [Record(1, 0.5, None, b"", True, [], {}, Color.RED, None)],
    "batch": [core.empty_batch(NUMBER)],
    "schema": [NUMBER],
    "nothing": [],
    "table": [{"a": 1}],
}


class Hostile:
    """A server that answers each request with bytes of its own choice, then ends the connection when it is told."""

    def __init__(self) -> None:
        client, self.sock = socket.socketpair()
        self.transport = core.UnixTransport(client)
        self.connection = core.RpcConnection(Service, self.transport, timeout=TIMEOUT, limits=LIMITS)
        self.proxy = self.connection.__enter__()
        self.jobs: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.answer, daemon=True)
        self.thread.start()
        self.dead = False

    def answer(self) -> None:
        """One answer for whatever comes first after it was chosen; the client's further bytes are swallowed."""
        begun = False  # the next request has arrived already
        while (reply := self.jobs.get()) is not None:
            try:
                if not begun and not self.sock.recv(1 << 20):
                    continue
                begun = False
                self.sock.sendall(reply)
                self.sock.settimeout(0.02)
                try:
                    while not begun and self.sock.recv(1 << 20):
                        begun = not self.jobs.empty()
                except TimeoutError:  # a client that wants more than there is shall not wait for its deadline
                    if self.jobs.empty():
                        self.sock.shutdown(socket.SHUT_WR)
                self.sock.settimeout(None)
            except OSError:
                continue

    def close(self) -> None:
        """End both sides."""
        self.dead = True
        self.jobs.put(None)
        self.connection.__exit__(None, None, None)
        self.sock.close()
        self.thread.join(TIMEOUT)


def honest(rng: random.Random, method: str, nested: Corpus) -> bytes:
    """An answer; streams in it are mutants."""
    schema = METHODS[method].result_schema
    number = rng.choice((0, 7, -1))
    if not len(schema):
        batch = core.empty_batch(schema)
    else:
        value: Any = {
            "add": number,
            "scale": 1.5,
            "text": rng.choice(("", "häß", "long " * 9)),
            "many": [number] * rng.randrange(3),
            "color": rng.choice(("RED", "GREEN", "BLUE")),
            "table": [("k", number)] * rng.randrange(2),
        }.get(method)
        if method == "record":
            value = random_record(rng).serialize_to_bytes()
        elif method in ("batch", "schema"):
            value = nested.mutant(rng)
        batch = pa.RecordBatch.from_arrays([pa.array([value], schema.field(0).type)], schema=schema)
    items: list[tuple[pa.RecordBatch, dict[bytes, bytes] | None]] = [(batch, None)]
    how = rng.random()
    if how < 0.15:
        items.insert(0, (core.empty_batch(schema), LOG))
    elif how < 0.25:
        items[0] = (core.empty_batch(schema), ERROR)
    elif how < 0.3:
        items *= 2
    return write_stream(schema, items)


class Target:
    """One answer a case, and one honest call after it."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        self.nested = Corpus.of(f"replies {seed}", 60, depth=2)
        rng = random.Random(f"replies {seed}")
        self.names = [rng.choice(list(ARGUMENTS)) for _ in range(100)]
        self.corpus = Corpus([honest(rng, name, self.nested) for name in self.names])
        self.streams = Corpus.of(f"outputs {seed}", 40, depth=2)
        self.server = Hostile()
        self.number = 1 << 41

    def case(self, rng: random.Random) -> str:
        """A call, or a stream."""
        if self.server.dead:
            self.server = Hostile()
        if rng.random() < 0.15:
            return self.stream(rng)
        i = rng.randrange(len(self.names))
        name = self.names[i]
        data = self.corpus.mutant(rng, i) if rng.random() < 0.7 else honest(rng, name, self.nested)
        if rng.random() < 0.1:  # an answer to another method
            data = self.corpus.mutant(rng)
        self.server.jobs.put(data)
        outcome, value = "answered", None
        with self.box.ours(data):
            try:
                value = getattr(self.server.proxy, name)(*ARGUMENTS[name])
            except core.RpcError:
                outcome = "refused"
        if outcome == "answered":
            self.judge(name, value, data)
        channel = self.server.transport.channel
        if channel.pos < len(channel.buf):  # more than one answer (issue 17: the connection itself is to refuse that)
            self.server.close()
            return outcome
        self.follow()
        return outcome

    def follow(self) -> None:
        """The next call is answered with its own answer, or not at all."""
        self.number += 1
        self.server.jobs.put(number_reply(self.number))
        try:
            found = self.server.proxy.add(self.number, 0)
        except core.RpcError:
            self.server.close()
            return
        if found != self.number:
            raise Finding(f"the next call was answered with {found}, not {self.number}")

    def judge(self, name: str, value: Any, data: bytes) -> None:
        """A returned value is what pyarrow reads."""
        try:
            with ipc.open_stream(pa.py_buffer(data)) as reader:
                for batch, metadata in reader.iter_batches_with_custom_metadata():
                    batch.validate(full=True)
                    if batch.num_rows or b"vgi_rpc.log_level" not in dict(metadata or {}):
                        break
        except (pa.ArrowException, OSError, ValueError) as exc:
            tolerate(exc, data)
            raise Finding(f"{name}() returned {value!r:.200} of what pyarrow refuses: {exc}") from exc
        if value is None or isinstance(value, Record):
            return
        cell = batch.column("result")[0].as_py()
        if isinstance(value, pa.RecordBatch):
            with ipc.open_stream(pa.py_buffer(cell)) as reader:
                first = next(iter(reader), None)
            if first is not None:
                same_batch(value, first)
            return
        if isinstance(value, pa.Schema):
            if not value.equals(ipc.read_schema(pa.py_buffer(cell)), check_metadata=True):
                raise Finding(f"{name}() returned {value}")
            return
        value = value.name if isinstance(value, Color) else value
        cell = dict(cell) if isinstance(value, dict) else cell
        if repr(value) != repr(cell) and not (isinstance(value, float) and value == cell):
            raise Finding(f"{name}() returned {value!r:.200} for {cell!r:.200}")

    def stream(self, rng: random.Random) -> str:
        """The output of a producer or of an exchange."""
        data = self.streams.mutant(rng) if rng.random() < 0.7 else self.streams.valid(rng)
        self.server.jobs.put(data)
        got: list[pa.RecordBatch] = []
        outcome = "answered"
        with self.box.ours(data):
            try:
                if rng.random() < 0.5:
                    with self.server.proxy.count(3) as session:
                        got.extend(item.batch for item in session)
                else:
                    with self.server.proxy.go() as session:
                        for _ in range(3):
                            got.append(session.exchange(core.AnnotatedBatch(core.empty_batch(NUMBER), None)).batch)
            except (core.RpcError, StopIteration):
                outcome = "refused"
        self.server.close()
        if not got:
            return outcome
        try:
            with ipc.open_stream(pa.py_buffer(data)) as reader:
                for batch in got:
                    other = reader.read_next_batch()
                    if other.num_rows or batch.num_rows:
                        same_batch(batch, other)
        except (pa.ArrowException, OSError, ValueError, StopIteration) as exc:
            tolerate(exc, data)
            raise Finding(f"{len(got)} outputs of what pyarrow refuses: {exc}") from exc
        return outcome

    def close(self) -> None:
        """End the last connection."""
        if not self.server.dead:
            self.server.close()
