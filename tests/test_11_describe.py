"""Room 11: a service tells what it offers."""

from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pytest
from pyarrow import ipc

from tests.core import core

REFLECTION = "vgi_rpc.Reflection.v1"
REFLECTION_HASH = "3c7db4cae8cdfc93dc4a76e73b8b759e18e45e6a5811adba4e520366344b919a"
EMPTY_SCHEMA_MESSAGE = bytes.fromhex(
    "ffffffff300000001000000000000a000c000600050008000a000000000104000c0000000800080000000400080000000400000000000000"
)
ADD_SCHEMA_MESSAGE = bytes.fromhex(
    "ffffffffa00000001000000000000a000c000600050008000a000000000104000c0000000800080000000400080000000400000002"
    "0000004000000004000000d8ffffff00000003100000001400000004000000000000000100000062000000caffffff000002001000"
    "14000800000007000c0000001000100000000000000310000000180000000400000000000000010000006100060008000600060000"
    "000000020000000000"
)


@dataclass(frozen=True)
class Head(core.ArrowSerializableDataclass):
    total: int
    title: str | None = None


@dataclass
class Count(core.ProducerState):
    left: int

    def produce(self, out: Any, ctx: Any) -> None:
        out.finish()


@dataclass
class Scale(core.ExchangeState):
    factor: float

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit(input.batch)


@dataclass
class Either(core.StreamState):
    def process(self, input: Any, out: Any, ctx: Any) -> None:
        out.finish()


class Calc(Protocol):
    protocol_version: ClassVar[str] = "1.2.3"

    def ping(self) -> None: ...

    def add(self, a: float, b: float) -> float: ...

    def scale(self, factor: float) -> core.Stream[Scale, Head]: ...

    def count(self, n: int) -> core.Stream[Count]: ...

    def either(self) -> core.Stream[Either]: ...


class CalcImpl:
    def ping(self) -> None: ...

    def add(self, a: float, b: float) -> float:
        return a + b

    def scale(self, factor: float) -> Any: ...

    def count(self, n: int) -> Any: ...

    def either(self) -> Any: ...


class Other(Protocol):
    protocol_name: ClassVar[str] = "demo.Other.v2"

    def noop(self) -> None: ...


class OtherImpl:
    def noop(self) -> None: ...


SERVER = core.RpcServer(
    Calc,
    CalcImpl(),
    extra_protocols=[(Other, OtherImpl())],
    server_id="srv000000001",
    server_version="9.9",
    enable_describe=True,
)
IMPL = core.ReflectionImpl(SERVER)
WIRE = core._describe_wire()


def test_constants() -> None:
    assert core.DESCRIBE_VERSION == "5"
    assert core.IDEMPOTENCY_LEVELS == ("unknown", "no_side_effects", "idempotent")
    assert core.STREAM_KINDS == ("unknown", "producer", "exchange")


# ---- the wire


def fields(**columns: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, dtype, nullable=False) for name, dtype in columns.items()]


SUMMARY = fields(
    protocol=pa.utf8(),
    protocol_version=pa.utf8(),
    protocol_hash=pa.utf8(),
    deprecated=pa.bool_(),
    deprecation_message=pa.utf8(),
    features=pa.list_(pa.utf8()),
)
METHOD = fields(
    name=pa.utf8(),
    method_type=pa.utf8(),
    has_return=pa.bool_(),
    has_header=pa.bool_(),
    stream_kind=pa.utf8(),
    params_schema_ipc=pa.binary(),
    result_schema_ipc=pa.binary(),
    header_schema_ipc=pa.binary(),
    idempotency=pa.utf8(),
    deprecated=pa.bool_(),
    deprecation_message=pa.utf8(),
)
HOSTED = fields(
    server_id=pa.utf8(),
    server_version=pa.utf8(),
    request_version=pa.utf8(),
    protocols=pa.list_(pa.struct(SUMMARY)),
)
SERVICE = [*SUMMARY, *fields(methods=pa.list_(pa.struct(METHOD)))]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("ProtocolSummary", SUMMARY),
        ("MethodInfo", METHOD),
        ("ProtocolList", HOSTED),
        ("WireServiceDescription", SERVICE),
    ],
)
def test_payload_schemas(name: str, columns: list[pa.Field]) -> None:
    cls = getattr(WIRE, name)
    assert pa.schema(columns) == cls.ARROW_SCHEMA
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (name, name, core.__name__)


def test_wire_classes_are_made_once_and_are_names_of_the_module() -> None:
    assert core._describe_wire() is WIRE
    for name in ("ProtocolSummary", "MethodInfo", "ProtocolList", "WireServiceDescription", "Reflection"):
        assert getattr(core, name) is getattr(WIRE, name)


def test_payloads_round_trip_and_pickle() -> None:
    hosted = IMPL.list_protocols()
    assert WIRE.ProtocolList.deserialize_from_bytes(hosted.serialize_to_bytes()) == hosted
    assert pickle.loads(pickle.dumps(hosted)) == hosted
    described = IMPL.describe("Calc")
    assert WIRE.WireServiceDescription.deserialize_from_bytes(described.serialize_to_bytes()) == described


def test_method_info_has_defaults_for_what_older_servers_do_not_send() -> None:
    info = WIRE.MethodInfo("m", "unary", False, False, "", b"", b"", b"")
    assert (info.idempotency, info.deprecated, info.deprecation_message) == ("unknown", False, "")
    old = {field.name: getattr(info, field.name) for field in METHOD[:8]}
    batch = pa.RecordBatch.from_pylist([{**old, "of_the_future": 1}])
    assert WIRE.MethodInfo.deserialize_from_batch(batch) == info


def test_the_protocol_of_the_wire() -> None:
    methods = core.rpc_methods(WIRE.Reflection)
    assert core._methods_protocol_name(WIRE.Reflection) == REFLECTION
    assert core._methods_protocol_version(WIRE.Reflection) is None
    assert sorted(methods) == ["describe", "list_protocols"]
    assert methods["list_protocols"].result_type is WIRE.ProtocolList
    assert methods["describe"].result_type is WIRE.WireServiceDescription
    assert methods["describe"].params_schema == pa.schema(fields(protocol=pa.utf8()))
    assert core.compute_protocol_hash(REFLECTION, methods) == REFLECTION_HASH


# ---- the server's answers


def test_list_protocols() -> None:
    hosted = IMPL.list_protocols()
    assert (hosted.server_id, hosted.server_version, hosted.request_version) == ("srv000000001", "9.9", "1")
    assert [(p.protocol, p.protocol_version) for p in hosted.protocols] == [
        ("Calc", "1.2.3"),
        ("demo.Other.v2", ""),
        (REFLECTION, ""),
    ]
    assert [p.protocol_hash for p in hosted.protocols] == [
        SERVER.protocol_hash,
        SERVER.bindings["demo.Other.v2"].protocol_hash,
        REFLECTION_HASH,
    ]
    assert {(p.deprecated, p.deprecation_message, tuple(p.features)) for p in hosted.protocols} == {(False, "", ())}


def test_describe() -> None:
    service = IMPL.describe("Calc")
    assert (service.protocol, service.protocol_version, service.protocol_hash) == (
        "Calc",
        "1.2.3",
        SERVER.protocol_hash,
    )
    assert (service.deprecated, service.deprecation_message, service.features) == (False, "", [])
    kinds = [(m.name, m.method_type, m.stream_kind, m.has_return, m.has_header) for m in service.methods]
    assert kinds == [
        ("add", "unary", "", True, False),
        ("count", "stream", "producer", False, False),
        ("either", "stream", "unknown", False, False),
        ("ping", "unary", "", False, False),
        ("scale", "stream", "exchange", False, True),
    ]
    assert {(m.idempotency, m.deprecated, m.deprecation_message) for m in service.methods} == {("unknown", False, "")}


def test_schemas_are_messages_without_an_end() -> None:
    methods = {method.name: method for method in IMPL.describe("Calc").methods}
    assert len(EMPTY_SCHEMA_MESSAGE) == 56
    assert methods["add"].params_schema_ipc == ADD_SCHEMA_MESSAGE
    assert methods["ping"].params_schema_ipc == EMPTY_SCHEMA_MESSAGE
    assert ipc.read_schema(pa.py_buffer(methods["add"].result_schema_ipc)) == pa.schema(fields(result=pa.float64()))
    assert ipc.read_schema(pa.py_buffer(methods["scale"].header_schema_ipc)) == Head.ARROW_SCHEMA
    for name in ("ping", "count", "scale"):
        assert methods[name].result_schema_ipc == b""
    for name in ("add", "ping", "count"):
        assert methods[name].header_schema_ipc == b""


def test_reflection_describes_itself() -> None:
    service = IMPL.describe(REFLECTION)
    assert (service.protocol_hash, [m.name for m in service.methods]) == (
        REFLECTION_HASH,
        ["describe", "list_protocols"],
    )


def test_describe_of_an_unknown_name() -> None:
    with pytest.raises(core.ProtocolNotSupportedError) as caught:
        IMPL.describe("Nope")
    assert str(caught.value) == (
        "This server does not host protocol 'Nope'. Hosted: ['Calc', 'demo.Other.v2', 'vgi_rpc.Reflection.v1']."
    )
    assert (caught.value.error_code, caught.value.error_kind) == ("UNIMPLEMENTED", "protocol_not_supported")


def test_legacy_table() -> None:
    batch, metadata = core._describe_legacy_batch(SERVER)
    assert batch.schema == pa.schema(
        [
            ("name", pa.utf8()),
            ("method_type", pa.utf8()),
            ("has_return", pa.bool_()),
            ("params_schema_ipc", pa.binary()),
            ("result_schema_ipc", pa.binary()),
            ("has_header", pa.bool_()),
            ("header_schema_ipc", pa.binary()),
            ("is_exchange", pa.bool_()),
        ]
    )
    assert batch.select(["name", "method_type", "has_return", "has_header", "is_exchange"]).to_pydict() == {
        "name": ["add", "count", "either", "ping", "scale"],
        "method_type": ["unary", "stream", "stream", "unary", "stream"],
        "has_return": [True, False, False, False, False],
        "has_header": [False, False, False, False, True],
        "is_exchange": [None, False, None, None, True],
    }
    rows = {row["name"]: row for row in batch.to_pylist()}
    assert rows["add"]["params_schema_ipc"] == ADD_SCHEMA_MESSAGE
    assert rows["ping"]["params_schema_ipc"] == rows["ping"]["result_schema_ipc"] == EMPTY_SCHEMA_MESSAGE
    assert rows["count"]["result_schema_ipc"] == EMPTY_SCHEMA_MESSAGE
    assert rows["add"]["header_schema_ipc"] is None
    assert ipc.read_schema(pa.py_buffer(rows["scale"]["header_schema_ipc"])) == Head.ARROW_SCHEMA
    assert metadata == {
        b"vgi_rpc.protocol_name": b"Calc",
        b"vgi_rpc.request_version": b"1",
        b"vgi_rpc.describe_version": b"4",
        b"vgi_rpc.protocol_hash": SERVER.protocol_hash.encode(),
        b"vgi_rpc.server_id": b"srv000000001",
        b"vgi_rpc.protocol_version": b"1.2.3",
    }


def test_legacy_table_of_a_protocol_without_version_and_with_no_methods() -> None:
    class Empty(Protocol):
        pass

    batch, metadata = core._describe_legacy_batch(core.RpcServer(Empty, object()))
    assert batch.num_rows == 0 and batch.num_columns == 8
    assert core.PROTOCOL_VERSION_KEY not in metadata


# ---- what a client sees


VIEW = core._describe_view(IMPL.describe("Calc"), IMPL.list_protocols())


def test_service_description() -> None:
    assert VIEW.protocol_name == "Calc"
    assert (VIEW.protocol_version, VIEW.protocol_hash) == ("1.2.3", SERVER.protocol_hash)
    assert (VIEW.request_version, VIEW.describe_version, VIEW.server_id) == ("1", "5", "srv000000001")
    assert list(VIEW.methods) == ["add", "count", "either", "ping", "scale"]
    with pytest.raises(TypeError):
        VIEW.methods["add"] = None
    with pytest.raises(AttributeError):
        VIEW.protocol_name = "Other"


def test_method_descriptions() -> None:
    methods, known = VIEW.methods, core.rpc_methods(Calc)
    for name, method in methods.items():
        assert (method.name, method.method_type, method.has_return) == (
            name,
            known[name].method_type,
            known[name].has_return,
        )
        assert (method.params_schema, method.result_schema) == (known[name].params_schema, known[name].result_schema)
        assert (method.header_schema, method.is_exchange) == (known[name].header_schema, known[name].is_exchange)
        assert method.has_header is (name == "scale")


def test_descriptions_can_be_made_by_hand() -> None:
    method = core.MethodDescription("m", core.MethodType.UNARY, False, core.EMPTY_SCHEMA, core.EMPTY_SCHEMA)
    assert (method.has_header, method.header_schema, method.is_exchange) == (False, None, None)
    service = core.ServiceDescription("P", "1", "5", "00", "srv", {"m": method})
    assert service.protocol_version == "" and str(service) == "RPC Service: P\n  server: srv\n  m() -> None"
    hosted = core.HostedProtocol("P", "", "0123456789abcdef")
    assert (hosted.deprecated, hosted.deprecation_message, hosted.features) == (False, "", ())
    with pytest.raises(AttributeError):
        hosted.name = "Q"


def test_hosted_protocols() -> None:
    hosted = core._describe_hosted(IMPL.list_protocols())
    assert hosted[0] == core.HostedProtocol("Calc", "1.2.3", SERVER.protocol_hash)
    assert [p.name for p in hosted] == ["Calc", "demo.Other.v2", REFLECTION]
    old = WIRE.ProtocolSummary("Old", "1.0.0", "ab" * 32, True, "use New", ["x", "y"])
    found = core._describe_hosted(WIRE.ProtocolList("s", "", "1", [old]))
    assert found == [core.HostedProtocol("Old", "1.0.0", "ab" * 32, True, "use New", ("x", "y"))]


def test_descriptions_are_readable() -> None:
    assert str(VIEW) == (
        "RPC Service: Calc 1.2.3\n"
        "  server: srv000000001\n"
        "  add(a: double, b: double) -> double\n"
        "  count(n: int64) -> producer\n"
        "  either() -> stream\n"
        "  ping() -> None\n"
        "  scale(factor: double) -> exchange, header (total: int64, title: string)"
    )
    assert str(VIEW.methods["add"]) == "add(a: double, b: double) -> double"
    assert str(core.HostedProtocol("Calc", "1.2.3", "0123456789abcdef")) == "Calc 1.2.3 0123456789ab"
    assert str(core.HostedProtocol("P", "", "0123456789abcdef", True, "use Q")) == "P 0123456789ab (deprecated: use Q)"


GOOD = {"name": "m", "method_type": "unary", "has_return": False, "has_header": False, "stream_kind": ""}
SCHEMAS = {"params_schema_ipc": EMPTY_SCHEMA_MESSAGE, "result_schema_ipc": b"", "header_schema_ipc": b""}


def described(**changes: Any) -> Any:
    method = WIRE.MethodInfo(**{**GOOD, **SCHEMAS, **changes})
    return core._describe_view(
        WIRE.WireServiceDescription("P", "", "00", False, "", [], [method]), WIRE.ProtocolList("s", "", "1", [])
    )


def test_missing_schemas_are_empty_ones() -> None:
    method = described(params_schema_ipc=b"", has_header=True).methods["m"]
    assert (method.params_schema, method.result_schema, method.header_schema) == (core.EMPTY_SCHEMA,) * 3


@pytest.mark.parametrize("kind", ["unknown", "", "of the future"])
def test_unknown_stream_kinds(kind: str) -> None:
    assert described(method_type="stream", stream_kind=kind).methods["m"].is_exchange is None


@pytest.mark.parametrize(
    "changes",
    [
        {"params_schema_ipc": b"garbage"},
        {"params_schema_ipc": ADD_SCHEMA_MESSAGE[:40]},
        {"result_schema_ipc": b"\xff" * 64},
        {"has_header": True, "header_schema_ipc": b"\x00"},
        {"method_type": "of the future"},
    ],
    ids=str,
)
def test_a_description_that_makes_no_sense_is_an_rpc_error(changes: dict[str, Any]) -> None:
    with pytest.raises(core.RpcError, match="description of 'P'") as caught:
        described(**changes)
    assert caught.value.error_type == "ProtocolError"
    assert caught.value.__cause__ is not None


def test_views_take_what_newer_servers_send() -> None:
    newer = make_dataclass(
        "Newer",
        [("protocol", str), ("methods", list[str]), ("invented", int)],
        bases=(core.ArrowSerializableDataclass,),
    )
    batch = ipc.open_stream(newer("P", ["m"], 7).serialize_to_bytes()).read_next_batch()
    with pytest.raises(ValueError, match="Missing fields"):  # these columns have no defaults
        WIRE.WireServiceDescription.deserialize_from_batch(batch)
    row = {
        **{field.name: getattr(IMPL.describe("Calc"), field.name) for field in SUMMARY},
        "methods": [],
        "invented": 7,
    }
    schema = pa.schema([*SERVICE, pa.field("invented", pa.int64())])
    found = WIRE.WireServiceDescription.deserialize_from_batch(pa.RecordBatch.from_pylist([row], schema=schema))
    assert (found.protocol, found.methods) == ("Calc", [])


def test_reflection_not_supported() -> None:
    details = [{"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": 1}]
    error = core.RpcError(
        "ProtocolNotSupportedError",
        "This server does not host protocol 'vgi_rpc.Reflection.v1'.",
        "Traceback: ...",
        request_id="00112233aabbccdd",
        error_code="UNIMPLEMENTED",
        error_kind="protocol_not_supported",
        error_details=details,
    )
    found = core.ReflectionNotSupportedError.from_rpc_error(error)
    assert isinstance(found, core.RpcError)
    for name in ("error_type", "remote_traceback", "request_id", "error_code", "error_kind", "error_details", "sent"):
        assert getattr(found, name) == getattr(error, name)
    assert found.error_message.startswith(error.error_message)
    assert "--describe" in found.error_message and "enable_describe=True" in found.error_message
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is core.ReflectionNotSupportedError and str(again) == str(found)


def test_over_a_connection() -> None:
    client, server = core.make_pipe_pair()
    thread = threading.Thread(target=SERVER.serve, args=(server,))
    thread.start()
    try:
        assert core.list_protocols(client) == core._describe_hosted(IMPL.list_protocols())
        assert core.describe_protocol(client, "Calc") == VIEW
        with pytest.raises(core.RpcError, match="does not host protocol") as caught:
            core.describe_protocol(client, "Nope")
        assert caught.value.error_kind == "protocol_not_supported"
    finally:
        client.close()
        thread.join(10)
        server.close()
    assert not thread.is_alive()


def test_a_type_without_a_token_hides_no_other_method(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(core._METHODS_PLAIN_TOKENS, "double", None)

    class Odd(Protocol):
        def odd(self, d: float) -> None: ...
        def good(self, n: int) -> int: ...

    class Impl:
        def odd(self, d):
            return None

        def good(self, n):
            return n

    server = core.RpcServer(Odd, Impl(), enable_describe=True)
    client, far = core.make_unix_pair()
    thread = threading.Thread(target=server.serve, args=(far,), daemon=True)
    thread.start()
    found = core.introspect(client)
    assert (list(found.methods), found.protocol_hash) == (["good", "odd"], "")
    assert [hosted.hash for hosted in core.list_protocols(client)] == ["", REFLECTION_HASH]
    client.close()
    thread.join(5)
    far.close()
    assert "Protocol Odd has no hash: odd(): Arrow type double has no portable token" in caplog.text


# ---- a caller's Protocol and the contract of a server


@dataclass
class Seal(core.ArrowSerializableDataclass):
    number: int


class Here(Protocol):
    protocol_name: ClassVar[str] = "Drift"
    protocol_version: ClassVar[str] = "1.0.0"

    def same(self, a: int, b: str | None = None) -> float: ...
    def gone(self) -> None: ...
    def kind(self) -> int: ...
    def way(self) -> core.Stream[core.ProducerState]: ...
    def header(self) -> core.Stream[core.ProducerState]: ...
    def headless(self) -> core.Stream[core.ProducerState, Seal]: ...
    def order(self, a: int, b: int) -> None: ...
    def types(self, a: int, b: str | None) -> int: ...
    def fewer(self, a: int, b: int) -> str | None: ...
    def more(self, a: int) -> None: ...


class There(Protocol):
    protocol_name: ClassVar[str] = "Drift"
    protocol_version: ClassVar[str] = "2.0.0"

    def same(self, a: int, b: str | None = None) -> float: ...
    def new(self) -> None: ...
    def kind(self) -> core.Stream[core.ProducerState]: ...
    def way(self) -> core.Stream[core.ExchangeState]: ...
    def header(self) -> core.Stream[core.ProducerState, Seal]: ...
    def headless(self) -> core.Stream[core.ProducerState]: ...
    def order(self, b: int, a: int) -> None: ...
    def types(self, a: float, b: str) -> str: ...
    def fewer(self, a: int) -> str: ...
    def more(self, a: int, c: int = 1) -> int: ...


class Anything:
    def __getattr__(self, name):
        return lambda a=None, b=None, c=None: None


def test_what_a_caller_and_a_service_do_not_agree_on_is_said_in_words() -> None:
    server = core.RpcServer(There, Anything(), enable_describe=True)
    client, served = core.make_pipe_pair()
    thread = threading.Thread(target=lambda: (server.serve(served), served.close()))
    thread.start()
    with core.RpcConnection(There, client, timeout=10.0) as proxy:
        found = core.describe_protocol(proxy, "Drift")
    thread.join(10)
    assert core.compare_protocols(There, found) == []
    assert core.compare_protocols(Here, found) == [
        "the protocol_version is 1.0.0 here and 2.0.0 at the service",
        "fewer(): parameter 'b' (int64) is unknown to the service",
        "fewer(): the result may be None here and not at the service",
        "gone(): the service has no such method",
        "header(): the service sends a header",
        "headless(): it has a header here and none at the service",
        "kind(): a unary method here and a producer at the service",
        "more(): parameter 'c' (int64) is unknown here; old callers can leave it out if it has a default",
        "more(): the result (int64) is unknown here",
        "new(): only the service has it",
        "order(): the parameters are in another order: a, b here, b, a at the service",
        "types(): parameter 'a' is int64 here and double at the service",
        "types(): parameter 'b' may be None here and not at the service",
        "types(): the result is int64 here and string at the service",
        "way(): a producer here and an exchange at the service",
    ]


@pytest.mark.parametrize("said", [{"protocols": None}, {"protocols": [None]}, {"protocols": [{"protocol": "Calc"}]}])
def test_a_service_that_leaves_out_what_it_declares_is_an_error(said: dict[str, object]) -> None:
    class Hosted:
        request_version = server_id = ""
        protocols = said["protocols"]

    with pytest.raises(core.RpcError, match="ProtocolError: the description of the service cannot be read"):
        core._describe_hosted(Hosted())
    service = type("Service", (), {"protocol": "Calc", "methods": said["protocols"]})
    with pytest.raises(core.RpcError, match="ProtocolError: the description of 'Calc' cannot be read"):
        core._describe_view(service, Hosted())
