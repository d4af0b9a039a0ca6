"""Room 9: the request pipeline of wire.md section 7 over real pipes, classification, replies and binding."""

from __future__ import annotations

import dataclasses
import enum
import json
import threading
import time
from collections.abc import Iterator
from typing import ClassVar, Protocol

import pyarrow as pa
import pytest
from pyarrow import ipc

from tests.core import core

FULL = core.IpcValidation.FULL
EMPTY = pa.schema([])
EOS = b"\xff\xff\xff\xff\0\0\0\0"


class Color(enum.Enum):
    RED = "r"
    GREEN = "g"


@dataclasses.dataclass(frozen=True)
class Point(core.ArrowSerializableDataclass):
    x: int


@dataclasses.dataclass
class Count(core.ProducerState):
    n: int
    i: int = 0

    def produce(self, out, ctx):
        if self.i >= self.n:
            out.finish()
            return
        out.emit_pydict({"i": [self.i]})
        self.i += 1


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def noop(self) -> None: ...
    def power(self, a: float, b: float = 2.0) -> float: ...
    def maybe(self, a: float | None) -> float: ...
    def color(self, c: Color) -> str: ...
    def point(self, p: Point) -> int: ...
    def count(self, n: int) -> core.Stream[Count]: ...


class CalcImpl:
    def add(self, a, b):
        return a + b

    def noop(self):
        return None

    def power(self, a, b=2.0):
        return a**b

    def maybe(self, a):
        return -1.0 if a is None else a

    def color(self, c):
        return c.name

    def point(self, p):
        return p.x

    def count(self, n):
        return core.Stream(output_schema=pa.schema([("i", pa.int64())]), state=Count(n))


class Versioned(Protocol):
    protocol_version: ClassVar[str] = "2.3.4"

    def twice(self, n: int) -> int: ...
    def count(self, n: int) -> core.Stream[Count]: ...


class VersionedImpl(CalcImpl):
    def twice(self, n):
        return 2 * n


RESULT = pa.schema([pa.field("result", pa.float64(), nullable=False)])
TWICE_RESULT = pa.schema([pa.field("result", pa.int64(), nullable=False)])


def required(name: str, dtype: pa.DataType = pa.float64()) -> pa.Field:  # noqa: B008
    return pa.field(name, dtype, nullable=False)


def row(*fields: pa.Field, **values: object) -> pa.RecordBatch:
    arrays = [pa.array([values[field.name]], type=field.type) for field in fields]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def metadata(method: bytes | None = b"add", **keys: bytes | None) -> dict[bytes, bytes]:
    """Request metadata as of a correct call of Calc, except for what is given; None leaves a key out."""
    found = {"method": method, "request_version": b"1", "protocol": b"Calc", **keys}
    return {b"vgi_rpc." + key.encode(): value for key, value in found.items() if value is not None}


def stream(batch: pa.RecordBatch, *metadatas: dict[bytes, bytes]) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema) as writer:
        for each in metadatas:
            writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(each) if each else None)
    return sink.getvalue().to_pybytes()


ADD = row(required("a"), required("b"), a=1.0, b=2.0)
NOTHING = core.empty_batch(EMPTY)
TICK = stream(NOTHING, {})
EMPTY_STREAM = stream(NOTHING)
GOOD = stream(ADD, metadata())


class Peer:
    """A hand-made client of a server that runs in a thread, over real pipes."""

    def __init__(self, **options: object) -> None:
        self.server = core.RpcServer(
            Calc, CalcImpl(), extra_protocols=[(Versioned, VersionedImpl())], server_id="me", **options
        )
        self.client, served = core.make_pipe_pair()

        def serve() -> None:
            self.server.serve(served)
            served.close()

        self.thread = threading.Thread(target=serve)
        self.thread.start()

    def send(self, data: bytes) -> None:
        self.client.channel.send((data,))

    def read(self) -> tuple[pa.Schema, list[tuple[pa.RecordBatch, dict[bytes, bytes] | None]]]:
        self.client.channel.deadline = time.monotonic() + 10
        reader = core._IpcReader(self.client.channel, FULL)
        items = []
        while (item := reader.read()) is not None:
            items.append(item)
        return reader.schema, items

    def refusal(self) -> tuple[pa.Schema, dict[bytes, bytes]]:
        schema, [(batch, answer)] = self.read()
        assert batch.num_rows == 0
        assert answer[b"vgi_rpc.log_level"] == b"EXCEPTION"
        assert answer[b"vgi_rpc.server_id"] == b"me"
        return schema, answer

    def still_answers(self) -> None:
        """A good call on the same connection gets its own answer, and nothing is left over."""
        self.send(GOOD)
        schema, [(batch, answer)] = self.read()
        assert schema.equals(RESULT)
        assert (batch.to_pylist(), answer) == ([{"result": 3.0}], None)
        channel = self.client.channel
        assert channel.pos == len(channel.buf)
        assert not channel.gone()

    def ended(self) -> bool:
        self.client.channel.deadline = time.monotonic() + 10
        return self.client.channel.at_end()

    def close(self) -> None:
        self.client.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer()
    yield found
    found.close()


# ---- the pipeline table: (request batch, metadata) -> schema, type, text, code, kind

NO_METHOD = (
    "ProtocolError: Missing 'vgi_rpc.method' in the request batch's custom metadata. "
    "Each request names its method there. The input of a stream comes here when the method called is a unary one"
    " in this server's Protocol."
)
NO_VERSION = (
    "Missing 'vgi_rpc.request_version' in the request batch's custom metadata. This server speaks version b'1'."
)
HOSTED = "['Calc', 'Versioned']"
NO_PROTOCOL = (
    "Missing 'vgi_rpc.protocol' in the request batch's custom metadata. "
    f"Each request names the protocol it calls; hosted here: {HOSTED}"
)
ROWS = "ProtocolError: Expected 1 row in request batch, got {}. Each parameter is one column."
CALC = "['add', 'color', 'count', 'maybe', 'noop', 'point', 'power']"
NOT_SPECIFIED = ("INVALID_ARGUMENT", "protocol_not_specified")
NOT_SUPPORTED = ("UNIMPLEMENTED", "protocol_not_supported")
NO_SUCH_METHOD = ("UNIMPLEMENTED", "method_not_implemented")
UNKNOWN = ("UNKNOWN", None)
TWO_ROWS = pa.concat_batches([ADD, ADD])
NO_ROWS = ADD.slice(0, 0)
THREE = row(required("a"), required("b"), required("z"), a=1.0, b=2.0, z=3.0)
A, B = required("a"), required("b")


def wrong_version(version: bytes) -> str:
    return (
        f"Unsupported request version {version!r}, expected b'1'. "
        "Use a client and a server of the same wire generation."
    )


PIPELINE = {
    "4 no version": (ADD, metadata(request_version=None), EMPTY, "VersionError", NO_VERSION, UNKNOWN),
    "5 version 2": (ADD, metadata(request_version=b"2"), EMPTY, "VersionError", wrong_version(b"2"), UNKNOWN),
    "5 bytewise": (ADD, metadata(request_version=b"01"), EMPTY, "VersionError", wrong_version(b"01"), UNKNOWN),
    "5 before 6": (ADD, metadata(b"\xff", request_version=b""), EMPTY, "VersionError", wrong_version(b""), UNKNOWN),
    "6 method not UTF-8": (
        TWO_ROWS,
        metadata(b"\xff"),
        EMPTY,
        "RpcError",
        "ProtocolError: Invalid 'vgi_rpc.method' b'\\xff': not UTF-8",
        UNKNOWN,
    ),
    "7 location": (
        NO_ROWS,
        {**metadata(), b"vgi_rpc.location": b"https://x/y"},
        EMPTY,
        "RpcError",
        ROWS.format(0),
        UNKNOWN,
    ),
    "7 shm": (
        NO_ROWS,
        {**metadata(), b"vgi_rpc.shm_offset": b"65536", b"vgi_rpc.shm_length": b"304"},
        EMPTY,
        "RpcError",
        ROWS.format(0),
        UNKNOWN,
    ),
    "8 no rows": (NO_ROWS, metadata(), EMPTY, "RpcError", ROWS.format(0), UNKNOWN),
    "8 two rows": (TWO_ROWS, metadata(), EMPTY, "RpcError", ROWS.format(2), UNKNOWN),
    "8 before 9": (TWO_ROWS, metadata(b"__transport_options__"), EMPTY, "RpcError", ROWS.format(2), UNKNOWN),
    "8 before 11": (TWO_ROWS, metadata(protocol=None), EMPTY, "RpcError", ROWS.format(2), UNKNOWN),
    "10 unknown built-in": (
        ADD,
        metadata(b"__ping__", protocol=None),
        EMPTY,
        "MethodNotImplementedError",
        "No built-in method '__ping__'.",
        NO_SUCH_METHOD,
    ),
    "10 __describe__": (
        NOTHING,
        metadata(b"__describe__", protocol=None),
        EMPTY,
        "MethodNotImplementedError",
        "No built-in method '__describe__'. Describing is the protocol 'vgi_rpc.Reflection.v1'. "
        "To describe itself the server needs enable_describe=True (--describe).",
        NO_SUCH_METHOD,
    ),
    "11 no protocol": (ADD, metadata(protocol=None), EMPTY, "ProtocolNotSpecifiedError", NO_PROTOCOL, NOT_SPECIFIED),
    "11 empty protocol": (
        ADD,
        metadata(protocol=b""),
        EMPTY,
        "ProtocolNotSpecifiedError",
        "'vgi_rpc.protocol' is empty; each request names the protocol it calls",
        NOT_SPECIFIED,
    ),
    "11 protocol not UTF-8": (
        ADD,
        metadata(protocol=b"\xff"),
        EMPTY,
        "ProtocolNotSpecifiedError",
        "'vgi_rpc.protocol' b'\\xff' is not UTF-8",
        NOT_SPECIFIED,
    ),
    "11 malformed protocol": (ADD, metadata(protocol=b"1x"), EMPTY, "ProtocolNotSupportedError", None, NOT_SUPPORTED),
    "11 trailing newline": (
        ADD,
        metadata(protocol=b"Calc\n"),
        EMPTY,
        "ProtocolNotSupportedError",
        None,
        NOT_SUPPORTED,
    ),
    "11 not hosted": (
        ADD,
        metadata(protocol=b"Other"),
        EMPTY,
        "ProtocolNotSupportedError",
        f"This server does not host protocol 'Other'. Hosted: {HOSTED}",
        NOT_SUPPORTED,
    ),
    "12 unknown method": (
        ADD,
        metadata(b"nope"),
        EMPTY,
        "MethodNotImplementedError",
        f"Protocol 'Calc' has no method 'nope'. Available: {CALC}",
        NO_SUCH_METHOD,
    ),
    "12 no fallback": (
        ADD,
        metadata(protocol=b"Versioned"),
        EMPTY,
        "MethodNotImplementedError",
        "Protocol 'Versioned' has no method 'add'. Available: ['count', 'twice']",
        NO_SUCH_METHOD,
    ),
    "14 undeclared": (
        THREE,
        metadata(),
        RESULT,
        "TypeError",
        "Request carries parameter(s) this protocol does not declare: z. add() declares: a, b",
        UNKNOWN,
    ),
    "14 before 16": (
        row(required("z"), z=3.0),
        metadata(),
        RESULT,
        "TypeError",
        "Request carries parameter(s) this protocol does not declare: z. add() declares: a, b",
        UNKNOWN,
    ),
    "14 none declared": (
        row(A, a=1.0),
        metadata(b"noop"),
        EMPTY,
        "TypeError",
        "Request carries parameter(s) this protocol does not declare: a. noop() declares: (none)",
        UNKNOWN,
    ),
    "16 missing": (
        row(B, b=1.0),
        metadata(),
        RESULT,
        "TypeError",
        "add() missing required argument(s): 'a'",
        UNKNOWN,
    ),
    "16 all missing": (
        NOTHING,
        metadata(),
        RESULT,
        "TypeError",
        "add() missing required argument(s): 'a', 'b'",
        UNKNOWN,
    ),
    "17 twice the same name": (
        row(A, A, B, a=3.0, b=1.0),
        metadata(),
        RESULT,
        "TypeError",
        "add() parameter schema expected 2 fields, got 3",
        UNKNOWN,
    ),
    "17 order": (
        row(B, A, a=1.0, b=2.0),
        metadata(),
        RESULT,
        "TypeError",
        "add() parameter schema field 0 expected name 'a', got 'b'",
        UNKNOWN,
    ),
    "17 type": (
        row(required("a", pa.int64()), B, a=1, b=2.0),
        metadata(),
        RESULT,
        "TypeError",
        "add() parameter 'a' expected Arrow type double but the request batch carried int64",
        UNKNOWN,
    ),
    "17 nullable": (
        row(pa.field("a", pa.float64()), B, a=1.0, b=2.0),
        metadata(),
        RESULT,
        "TypeError",
        "add() parameter 'a' expected nullable=False, but the request batch carried nullable=True",
        UNKNOWN,
    ),
    "17 not nullable": (
        row(A, a=1.0),
        metadata(b"maybe"),
        RESULT,
        "TypeError",
        "maybe() parameter 'a' expected nullable=True, but the request batch carried nullable=False",
        UNKNOWN,
    ),
    "17 before 18": (
        row(pa.field("a", pa.float64()), B, a=None, b=2.0),
        metadata(),
        RESULT,
        "TypeError",
        "add() parameter 'a' expected nullable=False, but the request batch carried nullable=True",
        UNKNOWN,
    ),
    "18 null": (
        row(A, B, a=None, b=2.0),
        metadata(),
        RESULT,
        "TypeError",
        "add() parameter 'a' is not optional but got None",
        UNKNOWN,
    ),
}


@pytest.mark.parametrize("step", PIPELINE)
def test_each_step_of_the_pipeline_answers_and_the_connection_stays_usable(step: str, peer: Peer) -> None:
    batch, request, schema, kind, text, (code, token) = PIPELINE[step]
    for _ in range(2):
        peer.send(stream(batch, request))
        got, answer = peer.refusal()
        assert got.equals(schema)
        extra = json.loads(answer[b"vgi_rpc.log_extra"])
        message = answer[b"vgi_rpc.log_message"].decode()
        assert extra["exception_type"] == kind
        if text is not None:
            assert message == f"{kind}: {text}"
        assert message == f"{kind}: {extra['exception_message']}"
        assert answer[b"vgi_rpc.error_code"].decode() == extra["error_code"] == code
        assert answer.get(b"vgi_rpc.error_kind") == (token and token.encode())
        assert extra.get("error_kind") == token
        assert len(answer[b"vgi_rpc.request_id"]) == 16
        peer.still_answers()


@pytest.mark.parametrize(
    "data",
    [
        stream(ADD, metadata(None)),
        stream(ADD, metadata(None, request_version=None)),
        stream(ADD, {}, {}, {}),
        stream(ADD),
        TICK,
        EMPTY_STREAM,
    ],
)
@pytest.mark.parametrize("before", [b"", GOOD])
def test_what_names_no_method_is_answered_once_and_ends_the_connection(before: bytes, data: bytes, peer: Peer) -> None:
    peer.send(before + data + GOOD)
    if before:
        assert peer.read()[1][0][0].to_pylist() == [{"result": 3.0}]
    schema, answer = peer.refusal()
    assert schema.equals(EMPTY)
    assert answer[b"vgi_rpc.log_message"].decode() == f"RpcError: {NO_METHOD}"
    assert peer.ended()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(
    ("batch", "method"), [(ADD, b"add"), (row(required("n", pa.int64()), n=2), b"count"), (NOTHING, b"nope")]
)
def test_a_request_of_several_batches_is_refused_and_the_next_one_answered(
    count: int, batch: pa.RecordBatch, method: bytes, peer: Peer
) -> None:
    peer.send(stream(batch, *[metadata(method)] * count))
    assert b"Expected one batch in a request, got more" in peer.refusal()[1][b"vgi_rpc.log_message"]
    peer.still_answers()
    peer.send(stream(batch, metadata(method), {}) + TICK)  # whose input is swallowed
    peer.refusal()
    peer.still_answers()


@pytest.mark.parametrize("count", [1, 3])
def test_an_older_caller_need_not_know_what_has_a_default(count: int, peer: Peer) -> None:
    for _ in range(count):  # by pyarrow, then by a layout
        peer.send(stream(row(A, a=3.0), metadata(b"power")))
        assert peer.read()[1][0][0].to_pylist() == [{"result": 9.0}]
    peer.send(stream(row(A, B, a=3.0, b=3.0), metadata(b"power")))
    assert peer.read()[1][0][0].to_pylist() == [{"result": 27.0}]
    for bad, text in ((row(B, b=3.0), b"missing required argument(s): 'a'"), (row(A, A, a=3.0), b"expected 1 fields")):
        peer.send(stream(bad, metadata(b"power")))
        assert text in peer.refusal()[1][b"vgi_rpc.log_message"]
    peer.still_answers()


@pytest.mark.parametrize("asked", [(ADD, b"add"), (NOTHING, b"noop"), (row(required("n", pa.int64()), n=2), b"count")])
@pytest.mark.parametrize("turns", [0, 1])
def test_a_request_is_no_input_of_a_stream(asked: tuple[pa.RecordBatch, bytes], turns: int, peer: Peer) -> None:
    batch, method = asked
    request = stream(batch, metadata(method))
    if turns and batch is NOTHING:
        request = stream(batch, {}, metadata(method))
    peer.send(stream(row(required("n", pa.int64()), n=2), metadata(b"count")) + request + GOOD)
    schema, items = peer.read()
    assert schema.names == ["i"]
    assert b"where the input of count() was due" in items[-1][1][b"vgi_rpc.log_message"]
    assert peer.ended()


def test_who_takes_a_stream_for_a_unary_method_is_shown_its_schema(peer: Peer) -> None:
    peer.send(stream(row(required("n", pa.int64()), n=2), metadata(b"count")))
    peer.client.channel.deadline = time.monotonic() + 10
    assert core._IpcReader(peer.client.channel, FULL).schema.names == ["i"]
    peer.send(EMPTY_STREAM)  # the caller is only slow
    core._ipc_drain(peer.client.channel)
    peer.still_answers()


@pytest.mark.parametrize(
    ("method", "batch", "kinds"),
    [
        (b"color", None, {"KeyError"}),
        (b"point", row(required("p", pa.binary()), p=b"not Arrow"), {"ArrowInvalid", "OSError", "EOFError"}),
    ],
)
def test_step_15_answers_with_what_the_conversion_raises(
    method: bytes, batch: pa.RecordBatch | None, kinds: set[str], peer: Peer
) -> None:
    if batch is None:
        batch = row(*core.rpc_methods(Calc)["color"].params_schema, c="BLUE")
    peer.send(stream(batch, metadata(method)))
    schema, answer = peer.refusal()
    assert schema.equals(core.rpc_methods(Calc)[method.decode()].result_schema)
    assert json.loads(answer[b"vgi_rpc.log_extra"])["exception_type"] in kinds
    assert answer[b"vgi_rpc.error_code"] == b"UNKNOWN"
    peer.still_answers()


OLD = "client is too old; upgrade the VGI extension/client to a version supporting protocol_version 2.3.4."
NEW = "server is too old; upgrade the VGI worker to a version supporting protocol_version {}."


@pytest.mark.parametrize(
    ("version", "shown", "direction", "declared"),
    [
        (None, "<not declared>", OLD, "<none>"),
        (b"\xff", "<undecodable bytes>", OLD, None),
        (b"2.3", "2.3", OLD, None),
        (b"02.3.4", "02.3.4", OLD, None),
        (b"2.2.9", "2.2.9", OLD, "2.2.9"),
        (b"1.3.4", "1.3.4", OLD, "1.3.4"),
        (b"3.0.0", "3.0.0", NEW.format("3.0.0"), "3.0.0"),
        (b"2.4.0", "2.4.0", NEW.format("2.4.0"), "2.4.0"),
    ],
)
def test_step_13_names_both_versions_and_who_must_upgrade(
    version: bytes | None, shown: str, direction: str, declared: str | None, peer: Peer
) -> None:
    request = metadata(b"twice", protocol=b"Versioned", protocol_version=version)
    peer.send(stream(ADD, request))  # step 14 would refuse it as well
    schema, answer = peer.refusal()
    assert schema.equals(TWICE_RESULT)
    assert answer[b"vgi_rpc.log_message"].decode() == (
        "ProtocolVersionError: VGI client/worker protocol_version mismatch for protocol 'Versioned'.\n"
        f"  Client: {shown}\n  Server: 2.3.4\n  Direction: {direction}"
    )
    assert answer[b"vgi_rpc.error_code"] == b"FAILED_PRECONDITION"
    assert answer[b"vgi_rpc.error_kind"] == b"protocol_version_mismatch"
    [detail] = json.loads(answer[b"vgi_rpc.error_details"])
    [violation] = detail["violations"]
    assert detail["@type"] == "vgi_rpc.PreconditionFailure"
    assert (violation["type"], violation["subject"]) == ("protocol_version", "Versioned")
    assert violation["description"].endswith("server requires 2.3.4; major and minor must match")
    if declared is not None:
        assert violation["description"].startswith(f"client declares {declared}, ")
    peer.still_answers()


@pytest.mark.parametrize("version", [b"2.3.4", b"2.3.0", b"2.3.99"])
def test_step_13_ignores_the_patch_version(version: bytes, peer: Peer) -> None:
    request = metadata(b"twice", protocol=b"Versioned", protocol_version=version)
    peer.send(stream(row(required("n", pa.int64()), n=4), request))
    assert peer.read()[1][0][0].to_pylist() == [{"result": 8}]
    peer.still_answers()


def test_step_13_applies_only_to_protocols_that_declare_a_version(peer: Peer) -> None:
    peer.send(stream(ADD, metadata(protocol_version=b"nonsense")))
    assert peer.read()[1][0][0].to_pylist() == [{"result": 3.0}]


def test_step_9_is_answered_without_routing(peer: Peer) -> None:
    peer.send(stream(NOTHING, {**metadata(b"__transport_options__", protocol=None), b"vgi_rpc.transport.shm": b"true"}))
    schema, [(batch, answer)] = peer.read()
    assert schema.equals(EMPTY)
    assert batch.num_rows == 0
    assert answer[b"vgi_rpc.transport.shm"] == (b"true" if core.shm_available() else b"false")
    assert (answer[b"vgi_rpc.request_version"], answer[b"vgi_rpc.server_id"]) == (b"1", b"me")
    peer.still_answers()


# ---- accepted requests


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_request_without_parameters_may_have_any_number_of_rows(rows: int, peer: Peer) -> None:
    batch = pa.RecordBatch.from_struct_array(pa.array([{}] * rows, type=pa.struct([])))
    for _ in range(2):
        peer.send(stream(batch, metadata(b"noop")))
        schema, [(result, answer)] = peer.read()
        assert (len(schema), result.num_rows, answer) == (0, 0, None)
        peer.still_answers()


def test_field_and_schema_metadata_and_unknown_keys_do_not_count(peer: Peer) -> None:
    fields = [field.with_metadata({b"m": b"n"}) for field in (A, B)]
    batch = row(*fields, a=1.0, b=2.0).replace_schema_metadata({b"x": b"y"})
    for _ in range(2):
        peer.send(stream(batch, {**metadata(), b"vgi_rpc.request_id": b"mine", b"other": b"\xff\xfe"}))
        assert peer.read()[1][0][0].to_pylist() == [{"result": 3.0}]


def test_a_null_for_a_parameter_with_a_default_means_the_default(peer: Peer) -> None:
    peer.send(stream(row(A, B, a=3.0, b=None), metadata(b"power")))
    assert peer.read()[1][0][0].to_pylist() == [{"result": 9.0}]
    peer.still_answers()


def test_a_null_for_an_optional_parameter_stays_null(peer: Peer) -> None:
    peer.send(stream(row(pa.field("a", pa.float64()), a=None), metadata(b"maybe")))
    assert peer.read()[1][0][0].to_pylist() == [{"result": -1.0}]


def test_pipelined_requests_are_answered_in_order(peer: Peer) -> None:
    bad = stream(ADD, metadata(b"nope"))
    peer.send(GOOD * 3 + bad + GOOD + bad + GOOD)
    kinds = ["error" if peer.read()[1][0][1] else "value" for _ in range(7)]
    assert kinds == ["value"] * 3 + ["error", "value", "error", "value"]
    peer.still_answers()


def test_a_method_that_raises_is_answered_on_its_result_schema(peer: Peer) -> None:
    peer.send(stream(row(A, B, a=0.0, b=-1.0), metadata(b"power")))
    schema, answer = peer.refusal()
    assert schema.equals(RESULT)
    assert answer[b"vgi_rpc.log_message"].startswith(b"ZeroDivisionError: ")
    peer.still_answers()


def test_unrouted_requests_reach_the_only_protocol_when_accepted() -> None:
    server = core.RpcServer(Calc, CalcImpl(), accept_unrouted=True)
    client, served = core.make_pipe_pair()
    client.channel.send((stream(ADD, metadata(protocol=None)),))
    server.serve_one(served)
    reader = core._IpcReader(client.channel, FULL)
    assert reader.read()[0].to_pylist() == [{"result": 3.0}]
    client.close()
    served.close()


# ---- rejected streams (section 8.6)

N = row(required("n", pa.int64()), n=2)


@pytest.mark.parametrize("follows", [TICK, EMPTY_STREAM, stream(NOTHING, {}, {}, {b"k": b"v"})])
@pytest.mark.parametrize(
    ("batch", "request_metadata"),
    [
        (ADD, metadata(b"count")),
        (N, metadata(b"count", protocol=b"Versioned", protocol_version=b"1.0.0")),
        (N, metadata(b"no_such_stream")),
        (N, metadata(b"count", protocol=b"Other")),
        (N, metadata(b"count", protocol=None)),
    ],
)
def test_the_input_of_a_refused_stream_is_not_answered(
    batch: pa.RecordBatch, request_metadata: dict[bytes, bytes], follows: bytes, peer: Peer
) -> None:
    peer.send(stream(batch, request_metadata) + follows)
    schema, _ = peer.refusal()
    assert schema.equals(EMPTY)
    peer.still_answers()
    peer.still_answers()


def test_only_one_stream_is_swallowed(peer: Peer) -> None:
    peer.send(stream(N, metadata(b"no_such_stream")) + TICK + TICK)
    assert b"no method 'no_such_stream'" in peer.refusal()[1][b"vgi_rpc.log_message"]
    assert b"Missing 'vgi_rpc.method'" in peer.refusal()[1][b"vgi_rpc.log_message"]
    assert peer.ended()


def test_a_request_is_never_mistaken_for_the_input_of_a_refused_stream(peer: Peer) -> None:
    peer.send(stream(N, metadata(b"no_such_stream")) + GOOD)
    peer.refusal()
    assert peer.read()[1][0][0].to_pylist() == [{"result": 3.0}]
    peer.send(TICK)
    assert b"Missing 'vgi_rpc.method'" in peer.refusal()[1][b"vgi_rpc.log_message"]
    assert peer.ended()


def test_a_good_stream_call_by_hand(peer: Peer) -> None:
    peer.send(stream(N, metadata(b"count")) + stream(NOTHING, {}, {}, {}, {}, {}))
    schema, items = peer.read()
    assert schema.names == ["i"]
    assert [batch.to_pylist() for batch, _ in items] == [[{"i": 0}], [{"i": 1}]]
    peer.still_answers()


# ---- step 1: framing


def test_a_clean_disconnect_is_not_answered(peer: Peer) -> None:
    os_writer = peer.client.writer
    os_writer.close()
    assert peer.ended()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"hello", b"\xff\xff\xff\xfe", EOS, GOOD[:3] + b"x"])
def test_bytes_that_are_not_arrow_are_answered_once_and_end_the_connection(garbage: bytes, peer: Peer) -> None:
    peer.send(GOOD + garbage)
    assert peer.read()[1][0][0].to_pylist() == [{"result": 3.0}]
    schema, answer = peer.refusal()
    assert schema.equals(EMPTY)
    assert json.loads(answer[b"vgi_rpc.log_extra"])["exception_type"] == "ArrowInvalid"
    assert peer.ended()


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_message_bytes", 15), ("max_metadata_bytes", 200), ("max_metadata_entry_bytes", 20), ("max_columns", 1)],
)
def test_a_refusal_by_size_names_its_option_on_the_wire(option: str, value: int) -> None:
    core._ipc_read_schema.cache_clear()
    peer = Peer(limits=core.IpcLimits(**{option: value}))
    peer.send(GOOD)
    _, answer = peer.refusal()
    assert f"{option}={value}" in answer[b"vgi_rpc.log_message"].decode()
    if option in ("max_message_bytes", "max_metadata_bytes"):  # what is too large is not read to its end
        assert peer.ended()
    else:
        peer.send(GOOD)
        assert f"{option}={value}" in peer.refusal()[1][b"vgi_rpc.log_message"].decode()
    peer.close()


# ---- classification (section 5)

ZERO, ONE = core.empty_batch(RESULT), pa.RecordBatch.from_pydict({"result": [1.0]}, schema=RESULT)
LEVEL, TEXT = b"vgi_rpc.log_level", b"vgi_rpc.log_message"
LOCATION, OFFSET = b"vgi_rpc.location", b"vgi_rpc.shm_offset"


@pytest.mark.parametrize(
    ("batch", "keys", "kind"),
    [
        (ZERO, None, "data"),
        (ZERO, {}, "data"),
        (ONE, None, "data"),
        (ONE, {LEVEL: b"EXCEPTION", TEXT: b"x"}, "data"),
        (ONE, {LOCATION: b"https://x"}, "data"),
        (ONE, {OFFSET: b"1"}, "data"),
        (ZERO, {LEVEL: b"EXCEPTION", TEXT: b"x"}, "error"),
        (ZERO, {LEVEL: b"INFO", TEXT: b"x"}, "log"),
        (ZERO, {LEVEL: b"exception", TEXT: b"x"}, "log"),
        (ZERO, {LEVEL: b"", TEXT: b""}, "log"),
        (ZERO, {LEVEL: b"EXCEPTION"}, "data"),
        (ZERO, {TEXT: b"x"}, "data"),
        (ZERO, {LOCATION: b"https://x"}, "external"),
        (ZERO, {LOCATION: b"https://x", OFFSET: b"1"}, "external"),
        (ZERO, {LOCATION: b"https://x", TEXT: b"x"}, "external"),
        (ZERO, {LOCATION: b"https://x", LEVEL: b"INFO"}, "data"),
        (ZERO, {LOCATION: b"https://x", LEVEL: b"INFO", TEXT: b"x"}, "log"),
        (ZERO, {OFFSET: b"1"}, "shm"),
        (ZERO, {OFFSET: b"1", LEVEL: b"INFO"}, "data"),
        (ZERO, {b"other": b"1"}, "data"),
    ],
)
def test_classification(batch: pa.RecordBatch, keys: dict[bytes, bytes] | None, kind: str) -> None:
    assert core._elsewhere_kind(batch, keys) == kind


# ---- replies, as a caller reads them (sections 4 to 6)


def reply(*items: tuple[pa.RecordBatch, dict[bytes, bytes] | None], schema: pa.Schema = RESULT) -> bytes:
    writer = core._IpcWriter(schema)
    for batch, keys in items:
        writer.write(batch, keys)
    writer.close()
    return b"".join(map(bytes, writer.take()))


def value_of(data: bytes, method: str = "add", logs: list | None = None) -> object:
    plan = core._WirePlan(core.rpc_methods(Calc)[method], "Calc", None)
    source = core._IpcSource(data + b"next")
    read = core._wire_read_reply(plan, source, FULL, None if logs is None else logs.append)
    assert source.pos == len(data)  # whatever the reply says, it is read to its end
    return core._wire_value(plan, read)


def log(level: bytes, text: bytes, **keys: bytes) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
    return ZERO, {LEVEL: level, TEXT: text, **{b"vgi_rpc." + key.encode(): value for key, value in keys.items()}}


def test_logs_come_before_the_result_and_what_follows_it_is_dropped() -> None:
    logs: list = []
    data = reply(
        log(b"INFO", b"one", log_extra=b'{"k": 1, "n": null}', server_id=b"s", request_id=b"r"),
        log(b"WARN", b"two"),
        (ONE, None),
        log(b"INFO", b"late"),
        (pa.RecordBatch.from_pydict({"result": [9.0]}, schema=RESULT), None),
        log(b"EXCEPTION", b"too late"),
    )
    assert value_of(data, logs=logs) == 1.0
    assert [(m.level, m.message) for m in logs] == [(core.Level.INFO, "one"), (core.Level.WARN, "two")]
    assert logs[0].extra == {"k": "1", "n": "None", "server_id": "s", "request_id": "r"}


@pytest.mark.parametrize(
    ("level", "extra"), [(b"LOUD", b"{}"), (b"\xff", b"{}"), (b"INFO", b"[1]"), (b"INFO", b"nope"), (b"INFO", b"\xff")]
)
def test_odd_logs_do_not_disturb_the_call(level: bytes, extra: bytes) -> None:
    logs: list = []
    assert value_of(reply(log(level, b"\xfftext", log_extra=extra), (ONE, None)), logs=logs) == 1.0
    assert len(logs) == 1
    assert not logs[0].extra


def test_an_exception_in_on_log_comes_after_the_reply_has_been_read() -> None:
    class Logs(list):
        def append(self, message: object) -> None:
            raise ZeroDivisionError(message.message)

    for data in (reply(log(b"INFO", b"one"), log(b"INFO", b"two"), (ONE, None)), reply(log(b"INFO", b"one"))):
        with pytest.raises(ZeroDivisionError, match="one"):
            value_of(data, logs=Logs())


@pytest.mark.parametrize("schema", [RESULT, EMPTY])
def test_an_error_may_come_on_any_schema(schema: pa.Schema) -> None:
    keys = {
        LEVEL: b"EXCEPTION",
        TEXT: b"ValueError: boom",
        b"vgi_rpc.log_extra": b'{"exception_type": "ValueError"}',
        b"vgi_rpc.error_code": b"NOT_FOUND",
        b"vgi_rpc.error_kind": b"mine",
        b"vgi_rpc.request_id": b"0123",
    }
    with pytest.raises(core.RpcError) as caught:
        value_of(reply((core.empty_batch(schema), keys), schema=schema))
    error = caught.value
    assert (error.error_type, error.error_message) == ("ValueError", "ValueError: boom")
    assert (error.error_code, error.error_kind, error.request_id) == ("NOT_FOUND", "mine", "0123")
    assert error.sent == "answered"


@pytest.mark.parametrize("data", [reply(), reply(log(b"INFO", b"only a log"))])
def test_a_reply_without_a_result_is_an_error(data: bytes) -> None:
    with pytest.raises(core.RpcError, match=r"add\(\) response stream ended without a result batch\.") as caught:
        value_of(data)
    assert caught.value.error_type == "ProtocolError"


@pytest.mark.parametrize(
    ("keys", "text"), [({LOCATION: b"https://x"}, "external storage"), ({OFFSET: b"1"}, "shared memory segment")]
)
def test_a_pointer_is_never_taken_for_an_empty_result(keys: dict[bytes, bytes], text: str) -> None:
    with pytest.raises(core.RpcError, match=text):
        value_of(reply((ZERO, keys)))


OTHER_NAMES = (["other"], ["result", "result"], ["result", "more"])


def test_a_result_that_is_no_result_is_an_error() -> None:
    others = [pa.RecordBatch.from_arrays([pa.array([1.0])] * len(names), names=names) for names in OTHER_NAMES]
    more = pa.RecordBatch.from_pydict({"result": [1.0, 2.0]}, schema=RESULT)
    for data in (reply((ZERO, None)), reply((more, None)), *[reply((one, None), schema=one.schema) for one in others]):
        with pytest.raises(core.RpcError, match=r"add\(\) .*answered with"):
            value_of(data)
    null = pa.RecordBatch.from_pydict({"result": pa.array([None], pa.float64())})
    with pytest.raises(core.RpcError, match="expected a non-None return value but got None"):
        value_of(reply((null, None), schema=null.schema))


def test_the_reply_of_a_void_method_holds_nothing() -> None:
    assert value_of(reply((NOTHING, None), schema=EMPTY), "noop") is None
    with pytest.raises(core.RpcError, match=r"noop\(\) is declared as a unary method that returns \(empty\)"):
        value_of(reply((ONE, None)), "noop")


def test_a_result_of_another_type_is_cast_by_the_table_or_refused() -> None:
    whole = pa.RecordBatch.from_pydict({"result": [1]})
    assert repr(value_of(reply((whole, None), schema=whole.schema))) == "1.0"
    text = pa.RecordBatch.from_pydict({"result": ["1.0"]})
    with pytest.raises(core.RpcError, match=r"add\(\) result: column 'result' is string, which is not cast to double"):
        value_of(reply((text, None), schema=text.schema))


def test_replies_that_look_like_earlier_ones_are_read_as_they_are() -> None:
    plan = core._WirePlan(core.rpc_methods(Calc)["add"], "Calc", None)
    for value in (1.0, 2.5, float("inf"), -0.0):
        source = core._IpcSource(reply((pa.RecordBatch.from_pydict({"result": [value]}, schema=RESULT), None)))
        assert core._wire_value(plan, core._wire_read_reply(plan, source, FULL, None)) == value
        assert source.pos == len(source.buf)
    source = core._IpcSource(reply(log(b"EXCEPTION", b"boom")))
    with pytest.raises(core.RpcError, match="boom"):
        core._wire_value(plan, core._wire_read_reply(plan, source, FULL, None))
    assert len(plan.replies) <= 1


# ---- binding: refused here, nothing is sent

BINDING = [
    ("add", (1.0, 2.0, 3.0), {}, "add() takes 2 argument(s) but 3 were given"),
    ("noop", (1,), {}, "noop() takes 0 argument(s) but 1 were given"),
    ("add", (1.0,), {}, "add() missing required argument: 'b'"),
    ("add", (), {"b": 1.0}, "add() missing required argument: 'a'"),
    ("add", (1.0, 2.0), {"a": 3.0}, "add() got multiple values for argument 'a'"),
    ("add", (1.0, 2.0), {"z": 3.0}, "add() got an unexpected argument 'z'. Parameters: a, b"),
    ("noop", (), {"z": 3.0}, "noop() got an unexpected argument 'z'. Parameters: (none)"),
    ("add", (None, 2.0), {}, "add() parameter 'a' is not optional but got None"),
    ("power", (2.0,), {"b": None}, "power() parameter 'b' is not optional but got None"),
]


@pytest.mark.parametrize(("method", "args", "kwargs", "text"), BINDING, ids=[row[3] for row in BINDING])
def test_binding_errors_are_raised_before_anything_is_sent(method: str, args: tuple, kwargs: dict, text: str) -> None:
    with core.serve_pipe(Calc, CalcImpl()) as proxy:
        with pytest.raises(core.RpcArgumentError) as caught:
            getattr(proxy, method)(*args, **kwargs)
        assert isinstance(caught.value, TypeError)
        assert text in str(caught.value)
        assert caught.value.sent == "no"
        assert proxy.add(1.0, b=2.0) == 3.0


@pytest.mark.parametrize(
    ("method", "args", "name"),
    [("add", ("x", 1.0), "a"), ("add", (1.0, [2.0]), "b"), ("color", (5,), "c"), ("count", ("many",), "n")],
)
def test_ill_typed_arguments_name_their_parameter(method: str, args: tuple, name: str) -> None:
    with core.serve_pipe(Calc, CalcImpl()) as proxy:
        with pytest.raises(core.RpcArgumentError, match=rf"{method}\(\) parameter '{name}': ") as caught:
            getattr(proxy, method)(*args)
        assert caught.value.sent == "no"
        assert proxy.add(1.0, 2.0) == 3.0


def test_arguments_by_position_by_name_and_by_default() -> None:
    with core.serve_pipe(Calc, CalcImpl()) as proxy:
        assert proxy.add(1.0, 2.0) == proxy.add(1.0, b=2.0) == proxy.add(b=2.0, a=1.0) == 3.0
        assert (proxy.power(3.0), proxy.power(3.0, 3.0), proxy.power(b=1.0, a=3.0)) == (9.0, 27.0, 3.0)
        assert (proxy.maybe(None), proxy.maybe(2.0), proxy.noop()) == (-1.0, 2.0, None)
        assert (proxy.color(Color.GREEN), proxy.point(Point(7))) == ("GREEN", 7)
