"""Bad bytes against live servers, workers and clients: an answer or an end, never a hang (DESIGN.md law 8)."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pytest
from pyarrow import ipc

from tests.core import core

pytestmark = pytest.mark.timeout(120)
PATIENCE = 20.0  # seconds; a bound, not a speed
EOS = b"\xff\xff\xff\xff\0\0\0\0"

SERVICE = """
from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from typing import Protocol

import pyarrow as pa

core = importlib.import_module(os.environ["VGI_RPC_CORE"])


@dataclasses.dataclass
class Adder(core.ExchangeState):
    total: int = 0

    def exchange(self, input, out, ctx):
        self.total += input.batch.column(0)[0].as_py()
        out.emit_pydict({"i": [self.total]})


class Service(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def words(self, s: str, many: list[str]) -> str: ...
    def noop(self) -> None: ...
    def die(self, how: int) -> int: ...
    def running(self) -> core.Stream[Adder]: ...


class Impl:
    def add(self, a, b):
        return a + b

    def words(self, s, many):
        return s + " ".join(many)

    def noop(self):
        return None

    def die(self, how):
        print("last words", file=sys.stderr, flush=True)
        os._exit(how)

    def running(self):
        schema = pa.schema([("i", pa.int64())])
        return core.Stream(output_schema=schema, state=Adder(), input_schema=schema)


if __name__ == "__main__":
    core.run_server(Service, Impl())
"""


class Service(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def words(self, s: str, many: list[str]) -> str: ...
    def noop(self) -> None: ...
    def die(self, how: int) -> int: ...


class Impl:
    def add(self, a, b):
        return a + b

    def words(self, s, many):
        return s + " ".join(many)

    def noop(self):
        return None

    def die(self, how):
        raise SystemError(how)


def request(method: str, schema: pa.Schema, **values: object) -> bytes:
    arrays = [pa.array([values[field.name]], type=field.type) for field in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays else core.empty_batch(schema)
    metadata = {b"vgi_rpc.method": method.encode(), b"vgi_rpc.request_version": b"1", b"vgi_rpc.protocol": b"Service"}
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(metadata))
    return sink.getvalue().to_pybytes()


METHODS = core.rpc_methods(Service)
ADD = request("add", METHODS["add"].params_schema, a=1.0, b=2.0)
WORDS = request("words", METHODS["words"].params_schema, s="hello", many=["x", "", "yz"])
NOOP = request("noop", pa.schema([]))
SCHEMA_SIZE = 8 + struct.unpack_from("<i", ADD, 4)[0]


def claim(metadata_size: int) -> bytes:
    return b"\xff\xff\xff\xff" + struct.pack("<i", metadata_size)


def with_body(size: int) -> bytes:
    """A request whose batch claims another body."""
    shape = core._ipc_shape(core._ipc_split(ADD)[1])
    at = SCHEMA_SIZE + shape.body_size
    return ADD[:at] + struct.pack("<q", size) + ADD[at + 8 :]


# Told at once: the peer need not close for the server to know.
HOPELESS = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a letter": b"h",
    "zeros": b"\0" * 64,
    "TLS hello": bytes.fromhex("1603010200010001fc0303"),
    "almost a marker": b"\xff\xff\xff\xfe",
    "legacy framing": ADD[4:],
    "end of stream": EOS,
    "negative metadata": claim(-1),
    "huge metadata": claim(2**31 - 1),
    "tiny metadata": claim(3),
    "negative body": with_body(-1),
    "most negative body": with_body(-(1 << 63)),
    "good call, then print()": ADD + b"hello\n",
    "schema twice": ADD[:SCHEMA_SIZE] * 2,
    "batch first": ADD[SCHEMA_SIZE:],
    "flatbuffer of 0xff": claim(64) + b"\xff" * 64,
    "flatbuffer of zeros": claim(64) + b"\0" * 64,
    "impossible body": with_body((1 << 63) - 1),
}
# Might still go on: the peer closes in the middle.
HALVES = {
    "nothing": b"",
    "half a marker": b"\xff\xff",
    "half a size": claim(64)[:6],
    "metadata of 16 MiB": claim(16 << 20) + b"\0" * 100,
    "half a schema": ADD[: SCHEMA_SIZE // 2],
    "schema only": ADD[:SCHEMA_SIZE],
    "half a batch": ADD[: SCHEMA_SIZE + 100],
    "no end of stream": ADD[:-8],
    "half an end": ADD[:-3],
    "large body": with_body(1 << 20),
    "body of a gigabyte": with_body(1 << 30),
    "body of a terabyte": with_body(1 << 40),
    "good call, then half": ADD + ADD[:200],
}


def answers(data: bytes) -> list[str]:
    """Read whole replies: `value`, or the exception type's text of a typed error."""
    source = core._IpcSource(data)
    found = []
    while source.pos < len(data):
        reader = core._IpcReader(source, core.IpcValidation.FULL)
        kinds = []
        while (item := reader.read()) is not None:
            kind = core._elsewhere_kind(*item)
            kinds.append((item[1] or {})[b"vgi_rpc.log_message"].decode() if kind == "error" else kind)
        found += kinds
    return found


class Server:
    """One server, a thread per connection."""

    def __init__(self) -> None:
        self.server = core.RpcServer(Service, Impl())
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def dial(self) -> core.UnixTransport:
        client, served = core.make_unix_pair()

        def serve() -> None:
            try:
                self.server.serve(served)
            except BaseException as exc:  # what would have ended an accept loop
                self.failures.append(exc)
            finally:
                served.close()

        thread = threading.Thread(target=serve)
        thread.start()
        self.threads.append(thread)
        return client

    def talk(self, data: bytes, *, close: bool) -> bytes:
        """Send bytes; return all that comes back until the server ends the connection."""
        client = self.dial()
        sock = socket.socket(fileno=os.dup(client.channel.inp))
        sock.settimeout(PATIENCE)
        received = b""
        try:
            sock.sendall(data)
            if close:
                sock.shutdown(socket.SHUT_WR)
            while chunk := sock.recv(1 << 16):
                received += chunk
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            sock.close()
            client.close()
        self.threads[-1].join(PATIENCE)
        assert not self.threads[-1].is_alive()
        assert self.failures == []
        return received


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    for thread in found.threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def bystander(server: Server) -> Iterator[Service]:
    """Another connection of the same server, open all the time."""
    with core.RpcConnection(Service, server.dial(), timeout=PATIENCE) as proxy:
        yield proxy


# ---- a server in threads


@pytest.mark.parametrize("name", HOPELESS)
def test_a_server_ends_what_cannot_be_right_without_waiting(name: str, server: Server, bystander: Service) -> None:
    *before, last = answers(server.talk(HOPELESS[name], close=False))
    assert before == (["data"] if name.startswith("good call") else [])
    assert last.startswith(("ArrowInvalid: ", "OSError: "))
    assert bystander.add(1.0, 2.0) == 3.0


@pytest.mark.parametrize("name", HALVES)
def test_a_server_survives_a_peer_that_closes_in_the_middle(name: str, server: Server, bystander: Service) -> None:
    found = answers(server.talk(HALVES[name], close=True))
    if name == "body of a terabyte":  # some machines refuse to promise that much memory, and say so
        assert found == [] or "max_message_bytes" in found[0]
    else:
        assert found == (["data"] if name.startswith("good call") else [])
    assert bystander.add(1.0, 2.0) == 3.0


def mutant(rng: random.Random) -> bytes:
    """A real request with one to four changes: a byte, four bytes, a piece left out or a piece twice."""
    data = bytearray(rng.choice((ADD, WORDS, NOOP)))
    for _ in range(rng.randint(1, 4)):
        how, at = rng.random(), rng.randrange(len(data))
        if how < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        elif how < 0.75:
            data[at : at + 4] = struct.pack("<i", rng.choice((0, 1, -1, 8, 2**31 - 1, -(2**31), rng.randrange(999))))
        elif how < 0.9:
            del data[at : at + rng.randint(1, 16)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 16)]
    return bytes(data)


def test_mutated_requests_are_answered_or_end_their_connection(server: Server, bystander: Service) -> None:
    rng = random.Random(9)
    seen = set()
    for number in range(200):
        data = mutant(rng)
        for answer in answers(server.talk(data, close=True)):  # whole replies only
            seen.add(answer.split(":")[0])
        if number % 10 == 0:
            assert bystander.words("a", ["b", "c"]) == "ab c"
    assert {"ArrowInvalid", "data"} <= seen
    assert bystander.add(1.0, 2.0) == 3.0


def test_learning_from_good_calls_does_not_open_a_door(server: Server, bystander: Service) -> None:
    """The same mutants in front of and behind good calls on one connection; a good call's answer stays its own."""
    rng = random.Random(10)
    for _ in range(40):
        first, *_ = answers(server.talk(ADD + WORDS + mutant(rng), close=True))
        assert first == "data"
    assert bystander.words("a", ["b"]) == "ab"


# ---- a worker in a process


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad_input") / "service.py"
    path.write_text(SERVICE)
    return path


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VGI_RPC_CORE", core.__name__)
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield


WORKER_INPUTS = {
    "http": (HOPELESS["http"], False),
    "print()": (ADD + b"hello\n", False),
    "huge metadata": (claim(2**31 - 1), False),
    "half a request": (ADD[:300], True),
}


def test_a_worker_answers_bad_bytes_and_ends(script: Path) -> None:
    workers = {
        name: subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name in WORKER_INPUTS
    }
    try:
        for name, worker in workers.items():  # each has started once it has answered
            worker.stdin.write(NOOP)
            worker.stdin.flush()
            assert len(worker.stdout.read(136)) == 136, name
        for name, worker in workers.items():
            data, close = WORKER_INPUTS[name]
            began = time.monotonic()
            worker.stdin.write(data)
            worker.stdin.flush()
            if close:
                worker.stdin.close()
            found = answers(worker.stdout.read())
            worker.wait(PATIENCE)
            assert time.monotonic() - began < PATIENCE, name
            if close:
                assert found == []
            else:
                assert found[-1].startswith("ArrowInvalid: "), name
            assert b"Traceback" not in worker.stderr.read(), name
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout, worker.stderr):
                stream.close()


def test_a_worker_that_dies_in_a_call_leaves_a_certificate(script: Path) -> None:
    command = [sys.executable, str(script)]
    with core.connect(Service, command, stderr=core.StderrMode.PIPE, timeout=60) as proxy:
        assert proxy.add(1.0, 2.0) == 3.0
        with pytest.raises(core.WorkerDiedError) as caught:
            proxy.die(7)
        error = caught.value
        assert (error.command, error.returncode) == (tuple(command), 7)
        assert error.pid > 0
        assert error.lifetime > 0
        assert "last words" in error.stderr_tail
        assert error.sent == "maybe"
        assert "last words" in "\n".join(error.__notes__)
        with pytest.raises(core.ConnectionLostError) as again:
            proxy.add(1.0, 2.0)
        assert again.value.sent == "no"


def test_a_worker_that_writes_garbage_is_not_waited_for() -> None:
    program = "import sys, time; sys.stdout.write('hello'); sys.stdout.flush(); sys.stdin.read()"
    with core.connect(Service, [sys.executable, "-c", program], timeout=60) as proxy:
        with pytest.raises(core.ConnectionLostError, match="hello"):
            proxy.add(1.0, 2.0)
        with pytest.raises(core.ConnectionLostError):
            proxy.add(1.0, 2.0)


def test_a_worker_that_cannot_be_started_is_the_systems_own_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "no such program")
    with pytest.raises(FileNotFoundError) as caught, core.connect(Service, [missing]):
        pass
    assert any(missing in note and "cmd is a list" in note for note in caught.value.__notes__)


# ---- a client that faces garbage


def reply(value: float) -> bytes:
    schema = METHODS["add"].result_schema
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array([value])], schema=schema))
    return sink.getvalue().to_pybytes()


def call_against(data: bytes, *, close: bool, first: bytes = b"") -> float:
    """Call add() on a server that says `data`, whatever it is asked; with `first`, after one good call."""
    end, fake = socket.socketpair()
    try:
        with core.RpcConnection(Service, core.UnixTransport(end), timeout=PATIENCE) as proxy:
            if first:
                fake.sendall(first)
                assert proxy.add(1.0, 2.0) == 3.0
            fake.sendall(data)
            if close:
                fake.shutdown(socket.SHUT_WR)
            try:
                return proxy.add(1.0, 2.0)
            except core.ConnectionLostError:
                with pytest.raises(core.ConnectionLostError) as again:
                    proxy.add(1.0, 2.0)
                assert again.value.sent == "no"
                raise
    finally:
        fake.close()


@pytest.mark.parametrize("first", [b"", reply(3.0)], ids=["first call", "after a good call"])
@pytest.mark.parametrize(
    ("data", "close"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"x", False),
        (EOS, False),
        (claim(2**31 - 1), False),
        (claim(-5), False),
        (claim(64) + b"\xff" * 64, False),
        (reply(3.0)[:200] + b"print" * 99, False),
        (b"", True),
        (b"\xff\xff", True),
        (reply(3.0)[:100], True),
        (reply(3.0)[:-8], True),
        (reply(3.0)[:-1], True),
    ],
)
def test_a_client_that_reads_garbage_has_lost_its_connection(data: bytes, close: bool, first: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(core.ConnectionLostError) as caught:
        call_against(data, close=close, first=first)
    assert time.monotonic() - began < PATIENCE
    assert caught.value.error_type == "TransportError"
    assert caught.value.sent == "maybe"


def test_a_reply_whose_column_name_is_not_utf8_is_an_rpc_error() -> None:
    with pytest.raises(core.RpcError):
        call_against(reply(3.0).replace(b"result", b"re\xffult"), close=True)


def test_a_client_never_raises_anything_but_the_family_of_rpc_error() -> None:
    rng = random.Random(11)
    good = reply(3.0)
    lost = 0
    for number in range(200):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + 1] = rng.choice((b"", b"\0", b"\xff", bytes([data[at] ^ 1 << rng.randrange(8)])))
        try:
            call_against(bytes(data), close=True, first=good if number % 2 else b"")
        except core.ConnectionLostError:
            lost += 1
        except core.RpcError as exc:
            assert exc.sent == "answered"
    assert lost > 50


@dataclass
class EchoState(core.ExchangeState):
    def exchange(self, input: core.AnnotatedBatch, out: core.OutputCollector, ctx: core.CallContext) -> None:
        out.emit(input.batch)


class Echoes(Protocol):
    def echo(self) -> core.Stream[EchoState]: ...


class EchoesImpl:
    def echo(self) -> core.Stream[EchoState]:
        schema = pa.schema([("n", pa.int64())])
        return core.Stream(schema, EchoState(), input_schema=schema)


def test_an_input_out_of_step_after_its_output_leaves_nothing_behind() -> None:
    """What follows the end of the output stream is the end of the connection, never a batch without a schema."""
    client, served = core.make_unix_pair()
    server = core.RpcServer(Echoes, EchoesImpl())
    thread = threading.Thread(target=lambda: (server.serve(served), served.close()), daemon=True)
    thread.start()
    request = core.serialize_record_batch_bytes(
        core.empty_batch(core.EMPTY_SCHEMA),
        pa.KeyValueMetadata(
            {b"vgi_rpc.method": b"echo", b"vgi_rpc.request_version": b"1", b"vgi_rpc.protocol": b"Echoes"}
        ),
    )
    batch = pa.RecordBatch.from_pydict({"n": [1]})
    opening, message = core._ipc_split(core.serialize_record_batch_bytes(batch))
    shape = core._ipc_shape(message)
    flawed = bytearray(message)
    struct.pack_into("<4q", flawed, shape.buffers, 0, 0, 0, 99)  # more bytes than the body has
    client.channel.send((request + opening + message + bytes(flawed) + b"no Arrow at all",))
    client.channel.deadline = time.monotonic() + 10
    reader = core._IpcReader(client.channel, core.IpcValidation.FULL)
    answers = list(iter(reader.read, None))
    assert answers[0][0].equals(batch)
    assert b"overlap" in answers[-1][1][b"vgi_rpc.log_message"]
    assert len(answers) == 2
    assert client.channel.at_end()
    client.close()
    thread.join(10)
    assert not thread.is_alive()
