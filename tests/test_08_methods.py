"""Room 8: a Protocol class becomes a table of methods; streams and their state; the contract hash."""

from __future__ import annotations

import copy
import enum
import functools
import gc
import inspect
import pickle
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import pyarrow as pa
import pytest

from tests.core import core

ASD = core.ArrowSerializableDataclass
NUMBERS = pa.schema([pa.field("a", pa.int64()), pa.field("b", pa.float64(), nullable=False)])


class Color(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclass(frozen=True)
class Point(ASD):
    x: float
    y: float = 0.0


@dataclass(frozen=True)
class Head(ASD):
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
class Plain(core.StreamState):
    def process(self, input: Any, out: Any, ctx: Any) -> None:
        out.finish()


class Base(Protocol):
    protocol_name: ClassVar[str] = "demo.Base.v1"
    protocol_version: ClassVar[str] = "1.2.3"

    def inherited(self, flag: bool) -> bool: ...


class Service(Base, Protocol):
    """A service with every kind of member."""

    LIMIT: ClassVar[int] = 3

    class Nested:
        """Not a method."""

    def add(self, a: float, b: float = 1.0) -> float:
        """Add two numbers.

        Args:
            a: the first number,
                continued here
            b (float): the second
            c: nobody

        Returns:
            a: not a parameter's text
        """
        ...

    def ping(self) -> None: ...

    def bare(self): ...

    def color(
        self, point: Point | None, colors: list[Color], name: Annotated[int, core.ArrowType(pa.int32())]
    ) -> Point:
        """Say a color."""
        ...

    def maybe(self) -> str | None: ...

    def count(self, n: int) -> core.Stream[Count]: ...

    def scale(self, factor: float) -> core.Stream[Scale, Head]: ...

    def plain(self) -> core.Stream[Plain, None]: ...

    def untyped(self) -> core.Stream: ...

    @staticmethod
    def static(a: int) -> int: ...

    @classmethod
    def cls_method(cls, a: int) -> int: ...

    @property
    def prop(self) -> int: ...

    def _private(self, a: int) -> int: ...


METHODS = core.rpc_methods(Service)


# ---- names and versions


@pytest.mark.parametrize("name", ["A", "_", "demo.Calc.v1", "a.b..c.", "A1_", "x" * 255])
def test_good_protocol_names(name: str) -> None:
    assert core.validate_protocol_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "1a", ".a", "a-b", "a b", "a\n", "Größe", "a/b", "x" * 256, "\ud800", "ä" * 200, "vgi_rpc.X"]
)
def test_bad_protocol_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"^Protocol name ") as caught:
        core.validate_protocol_name(name)
    assert len(str(caught.value)) < 200


def test_reserved_prefix() -> None:
    assert core.RESERVED_PROTOCOL_PREFIX == "vgi_rpc."
    assert core.validate_protocol_name("vgi_rpc.Reflection.v1", allow_reserved=True) == "vgi_rpc.Reflection.v1"
    assert core.validate_protocol_name("vgi_rpcX") == "vgi_rpcX"
    with pytest.raises(ValueError, match="reserved"):
        core.validate_protocol_name("vgi_rpc.Mine")


def test_patterns_match_whole_strings() -> None:
    assert core.MAX_PROTOCOL_NAME_BYTES == 255
    for text, good in [("a.b", True), ("a.b\n", False), ("a b", False)]:
        assert bool(core.PROTOCOL_NAME_RE.match(text)) is good
    for text, good in [("1.2.3", True), ("1.2.3\n", False)]:
        assert bool(core.SEMVER_REGEX.match(text)) is good


@pytest.mark.parametrize(("text", "version"), [("0.0.0", (0, 0, 0)), ("1.2.3", (1, 2, 3)), ("10.20.30", (10, 20, 30))])
def test_good_versions(text: str, version: tuple[int, int, int]) -> None:
    assert core.parse_version(text) == version


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1.2",
        "1.2.3.4",
        "01.2.3",
        "1.02.3",
        "1.2.03",
        "v1.2.3",
        "1.2.3-rc1",
        "1.2.3+b",
        "1.2.x",
        "1.2.٣",
        " 1.2.3",
        "1.2.3\n",
    ],
)
def test_bad_versions(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        core.parse_version(text)
    assert str(caught.value).startswith(f"Invalid protocol version {text!r}: expected canonical semver ")


def test_name_and_version_are_the_classes_own() -> None:
    assert core._methods_protocol_name(Base) == "demo.Base.v1"
    assert core._methods_protocol_version(Base) == "1.2.3"
    assert core._methods_protocol_name(Service) == "Service"
    assert core._methods_protocol_version(Service) is None


def protocol_of(**members: Any) -> type:
    return types.new_class("P", (Protocol,), {}, lambda namespace: namespace.update(members))


@pytest.mark.parametrize("name", ["", None, 5, lambda self: None])
def test_a_name_that_is_no_text_does_not_count(name: Any) -> None:
    assert core._methods_protocol_name(protocol_of(protocol_name=name)) == "P"


def test_a_version_must_be_canonical_text() -> None:
    with pytest.raises(TypeError, match=r"^P\.protocol_version must be a str, got int$"):
        core._methods_protocol_version(protocol_of(protocol_version=2))
    with pytest.raises(ValueError, match=r"^Invalid protocol version '1\.2': expected canonical semver"):
        core._methods_protocol_version(protocol_of(protocol_version="1.2"))


# ---- rpc_methods


def test_public_callables_inherited_ones_included() -> None:
    assert set(METHODS) == {
        "add",
        "bare",
        "cls_method",
        "color",
        "count",
        "inherited",
        "maybe",
        "ping",
        "plain",
        "scale",
        "static",
        "untyped",
    }
    assert all(METHODS[name].name == name for name in METHODS)
    assert {info.protocol_name for info in METHODS.values()} == {"Service"}


def test_table_is_read_only_and_cached() -> None:
    assert core.rpc_methods(Service) is METHODS
    with pytest.raises(TypeError):
        METHODS["add"] = None


def test_cache_does_not_keep_a_protocol_alive() -> None:
    def f(self, a: int) -> int: ...

    protocol = protocol_of(f=f)
    core.rpc_methods(protocol)
    gone = weakref.ref(protocol)
    del protocol
    gc.collect()
    assert gone() is None


def test_first_use_from_many_threads() -> None:
    def f(self, a: int) -> int: ...

    protocol = protocol_of(f=f)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(core.rpc_methods(protocol))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(dict(table) == dict(found[0]) for table in found)


def test_unary_method() -> None:
    info = METHODS["add"]
    assert info.params_schema == pa.schema(
        [pa.field("a", pa.float64(), nullable=False), pa.field("b", pa.float64(), nullable=False)]
    )
    assert info.result_schema == pa.schema([pa.field("result", pa.float64(), nullable=False)])
    assert (info.method_type, info.has_return, info.result_type) == (core.MethodType.UNARY, True, float)
    assert info.param_names == ("a", "b")
    assert (info.param_defaults, info.param_types) == ({"b": 1.0}, {"a": float, "b": float})
    assert (info.header_type, info.header_schema, info.is_exchange) == (None, None, None)


def test_documentation_is_kept() -> None:
    info = METHODS["add"]
    assert info.doc is not None and info.doc.startswith("Add two numbers.\n\nArgs:\n")
    assert info.param_docs == {"a": "the first number, continued here", "b": "the second"}
    assert METHODS["ping"].doc is None and METHODS["ping"].param_docs == {}


@pytest.mark.parametrize("name", ["ping", "bare"])
def test_void_methods(name: str) -> None:
    info = METHODS[name]
    assert (info.has_return, info.result_schema, info.params_schema) == (False, core.EMPTY_SCHEMA, core.EMPTY_SCHEMA)
    assert info.param_names == ()


def test_types_of_parameters_and_results() -> None:
    info = METHODS["color"]
    assert info.params_schema == pa.schema(
        [
            pa.field("point", pa.binary(), nullable=True),
            pa.field("colors", pa.list_(pa.dictionary(pa.int16(), pa.utf8())), nullable=False),
            pa.field("name", pa.int32(), nullable=False),
        ]
    )
    assert info.param_types["name"] == Annotated[int, core.ArrowType(pa.int32())]
    assert info.result_schema == pa.schema([pa.field("result", pa.binary(), nullable=False)])
    assert METHODS["maybe"].result_schema.field("result").nullable


@pytest.mark.parametrize("name", ["static", "cls_method"])
def test_static_and_class_methods_work_like_methods(name: str) -> None:
    assert METHODS[name].param_names == ("a",)


@pytest.mark.parametrize(
    ("name", "is_exchange", "header"),
    [("count", False, None), ("scale", True, Head), ("plain", None, None), ("untyped", None, None)],
)
def test_stream_methods(name: str, is_exchange: bool | None, header: type | None) -> None:
    info = METHODS[name]
    assert (info.method_type, info.has_return, info.result_schema) == (
        core.MethodType.STREAM,
        False,
        core.EMPTY_SCHEMA,
    )
    assert (info.is_exchange, info.header_type) == (is_exchange, header)
    assert info.header_schema == (None if header is None else Head.ARROW_SCHEMA)


def test_streams_behind_markers_are_streams() -> None:
    def a(self) -> core.Stream[Count] | None: ...
    def b(self) -> Annotated[core.Stream[Count, Head], "note"]: ...

    methods = core.rpc_methods(protocol_of(a=a, b=b))
    assert [methods[name].method_type for name in "ab"] == [core.MethodType.STREAM] * 2
    assert methods["b"].header_type is Head


def test_a_header_class_need_not_be_a_dataclass_yet() -> None:
    class Later(ASD):
        total: int

    def f(self): ...

    f.__annotations__["return"] = core.Stream[Count, Later]
    assert core.rpc_methods(protocol_of(f=f))["f"].header_type is Later


def refusal(function: Callable[..., Any]) -> BaseException:
    with pytest.raises(TypeError) as caught:
        core.rpc_methods(protocol_of(m=function))
    return caught.value


def test_unresolvable_hints() -> None:
    def m(self, a: NoSuchType) -> int: ...  # noqa: F821

    assert str(refusal(m)).startswith("Failed to resolve type hints for P.m(): ")
    assert "NoSuchType" in str(refusal(m))


def test_all_incompatible_parameters_are_listed() -> None:
    def m(self, a: int, /, b: int, *rest: int, **more: int) -> int: ...

    assert str(refusal(m)) == (
        "P.m() has parameters incompatible with the RPC wire protocol (all parameters must be keyword-passable):\n"
        "  - 'a' is positional-only (before '/')\n"
        "  - 'rest' is *args\n"
        "  - 'more' is **kwargs"
    )


def test_star_args_in_place_of_self() -> None:
    def m(*args: int) -> int: ...

    assert "'args' is *args" in str(refusal(m))


def test_any_name_for_self_and_keyword_only_parameters() -> None:
    def m(this, *, self_: int) -> int: ...

    assert core.rpc_methods(protocol_of(m=m))["m"].param_names == ("self_",)


def test_a_parameter_without_annotation() -> None:
    def m(self, a: int, b) -> int: ...

    assert str(refusal(m)).startswith("P.m() parameter 'b' has no annotation")


def test_a_parameter_named_ctx() -> None:
    def m(self, a: int, ctx: int) -> int: ...

    assert "'ctx'" in str(refusal(m)) and "P.m()" in str(refusal(m))


@pytest.mark.parametrize(
    "annotation", [object, Any, int | str, tuple[int, str], list, typing.Literal[1], core.Stream[Count], pa.Table]
)
def test_types_that_cannot_be_inferred(annotation: Any) -> None:
    def m(self, a): ...
    def n(self): ...

    m.__annotations__["a"] = annotation
    error = refusal(m)
    assert str(error).startswith("Cannot infer Arrow type for: ")
    assert error.__notes__[-1] == "P.m() parameter 'a'"
    if annotation != core.Stream[Count]:
        n.__annotations__["return"] = annotation
        assert refusal(n).__notes__[-1] == "P.m() result"


def test_none_as_a_parameter_is_refused() -> None:
    def m(self, a: None) -> int: ...

    assert str(refusal(m)).startswith("Cannot infer Arrow type for: ")


def test_a_default_of_none_does_not_make_a_parameter_optional() -> None:
    def m(self, a: int = None) -> int: ...  # noqa: RUF013

    info = core.rpc_methods(protocol_of(m=m))["m"]
    assert not info.params_schema.field("a").nullable and info.param_defaults == {"a": None}


def test_decorated_methods_keep_their_signature() -> None:
    def m(self, a: int) -> int: ...

    @functools.wraps(m)
    def wrapper(*args: Any, **kwargs: Any) -> Any: ...

    assert core.rpc_methods(protocol_of(m=wrapper))["m"].param_names == ("a",)


def test_method_info_defaults_equality_and_repr() -> None:
    arguments = ("m", NUMBERS, core.EMPTY_SCHEMA, None, core.MethodType.UNARY, False, None)
    info = core.RpcMethodInfo(*arguments)
    assert (info.param_defaults, info.param_types, info.param_docs) == ({}, {}, {})
    assert (info.header_type, info.is_exchange, info.protocol_name) == (None, None, "")
    assert info.param_names == ("a", "b")
    assert info == core.RpcMethodInfo(*arguments)
    assert info != core.RpcMethodInfo(*arguments, protocol_name="P")
    assert info != "m"
    assert repr(info) == "RpcMethodInfo(unary m(a: int64, b: double) -> None)"
    names = list(inspect.signature(core.RpcMethodInfo).parameters)
    assert names == [
        "name",
        "params_schema",
        "result_schema",
        "result_type",
        "method_type",
        "has_return",
        "doc",
        "param_defaults",
        "param_types",
        "param_docs",
        "header_type",
        "is_exchange",
        "protocol_name",
        "returns_ref",
        "returns_undeclared",
    ]


def test_method_types() -> None:
    assert {kind.name: kind.value for kind in core.MethodType} == {"UNARY": "unary", "STREAM": "stream"}


# ---- describe_rpc


def test_describe_rpc() -> None:
    text = core.describe_rpc(Service)
    lines = text.splitlines()
    assert lines[0] == "RPC Service: Service"
    signatures = [line.strip() for line in lines if " -> " in line]
    assert signatures == [
        "unary add(a: double, b: double) -> double",
        "unary bare() -> None",
        "unary cls_method(a: int64) -> int64",
        "unary color(point: binary, colors: list<item: dictionary<values=string, indices=int16, ordered=0>>,"
        " name: int32) -> binary",
        "stream count(n: int64) -> producer",
        "unary inherited(flag: bool) -> bool",
        "unary maybe() -> string",
        "unary ping() -> None",
        "stream plain() -> stream",
        "stream scale(factor: double) -> exchange, header (total: int64, title: string)",
        "unary static(a: int64) -> int64",
        "stream untyped() -> stream",
    ]
    assert lines[lines.index("  unary add(a: double, b: double) -> double") + 1] == "    Add two numbers."


def test_describe_rpc_of_chosen_methods() -> None:
    assert core.describe_rpc(Service, methods={}) == "RPC Service: Service"
    assert "ping" in core.describe_rpc(Base, methods={"ping": METHODS["ping"]})


# ---- AnnotatedBatch


BATCH = pa.RecordBatch.from_pydict({"a": [1], "b": [2.0]}, schema=NUMBERS)


def test_annotated_batch() -> None:
    plain = core.AnnotatedBatch(BATCH)
    assert (plain.batch, plain.custom_metadata) == (BATCH, None)
    noted = core.AnnotatedBatch(BATCH, pa.KeyValueMetadata({"k": "v"}))
    assert noted.custom_metadata[b"k"] == b"v"
    assert plain == core.AnnotatedBatch(pa.RecordBatch.from_pydict(BATCH.to_pydict(), schema=NUMBERS))
    assert plain != noted and noted != plain and plain != BATCH
    assert noted == core.AnnotatedBatch(BATCH, pa.KeyValueMetadata({"k": "v"}))
    assert noted != core.AnnotatedBatch(BATCH.slice(0, 0), noted.custom_metadata)
    assert plain == core.AnnotatedBatch(BATCH, pa.KeyValueMetadata({}))  # both say nothing
    with pytest.raises(AttributeError, match="frozen"):
        plain.batch = BATCH


def test_annotated_batch_from_pydict() -> None:
    assert core.AnnotatedBatch.from_pydict({"a": [1]}).batch == pa.RecordBatch.from_pydict({"a": [1]})
    assert core.AnnotatedBatch.from_pydict({"a": [1], "b": [2.0]}, NUMBERS).batch.schema == NUMBERS
    assert core.AnnotatedBatch.from_pydict({"a": [1], "b": [2.0]}, schema=NUMBERS).custom_metadata is None


@pytest.mark.parametrize("clone", [copy.copy, lambda item: pickle.loads(pickle.dumps(item))])
def test_annotated_batch_can_be_copied(clone: Any) -> None:
    item = core.AnnotatedBatch(BATCH, pa.KeyValueMetadata({"k": "v"}))
    assert clone(item) == item


def test_release_is_idempotent_and_ends_access() -> None:
    item = core.AnnotatedBatch(BATCH, _shared=True)
    assert item.batch is BATCH
    item.release()
    item.release()
    with pytest.raises(ValueError, match="has been released"):
        _ = item.batch
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = item.other


def test_release_leaves_other_batches_alone() -> None:
    item = core.AnnotatedBatch(BATCH)
    item.release()
    assert item.batch is BATCH


def test_annotated_batch_speaks_the_capsule_interface() -> None:
    item = core.AnnotatedBatch(BATCH)
    assert pa.record_batch(item) == BATCH
    assert pa.schema(item) == NUMBERS


def test_repr_shows_no_secrets_and_no_values() -> None:
    metadata = pa.KeyValueMetadata({core.LOCATION_KEY: b"https://host/object?token=hunter2", b"k": b"v"})
    text = repr(core.AnnotatedBatch(pa.RecordBatch.from_pydict({"a": ["hunter2"]}), metadata))
    assert "hunter2" not in text
    assert "rows=1" in text and "k='v'" in text


# ---- Stream


def test_stream_arguments() -> None:
    state, head = Count(3), Head(1)
    stream = core.Stream(NUMBERS, state)
    assert (stream.output_schema, stream.state, stream.input_schema) == (NUMBERS, state, core.EMPTY_SCHEMA)
    assert (stream.header, stream.call_state) == (None, None)
    assert stream.input_schema is core.EMPTY_SCHEMA
    full = core.Stream(NUMBERS, state, NUMBERS, head, Point(1.0))
    assert (full.input_schema, full.header, full.call_state) == (NUMBERS, head, Point(1.0))
    assert full == core.Stream(
        output_schema=NUMBERS, state=state, input_schema=NUMBERS, header=head, call_state=Point(1.0)
    )
    assert full != stream
    with pytest.raises(AttributeError, match="frozen"):
        stream.header = head
    assert "Count" in repr(stream) and "a: int64" in repr(stream)


def test_stream_parameters_on_every_python() -> None:
    assert typing.get_origin(core.Stream[Count]) is core.Stream
    assert typing.get_args(core.Stream[Count]) == (Count, None)
    assert typing.get_args(core.Stream[Count])[1] is None
    assert typing.get_args(core.Stream[Count, Head]) == (Count, Head)
    assert core.Stream[Count] == core.Stream[Count, None] and hash(core.Stream[Count]) == hash(core.Stream[Count, None])
    assert isinstance(core.Stream[Count](NUMBERS, Count(1)), core.Stream)
    assert typing.get_args(core.Stream[Count] | None)[0] == core.Stream[Count]


def test_stream_hints_given_as_text() -> None:
    def f(self) -> core.Stream[Count]: ...

    f.__annotations__["return"] = core.Stream["Count"]
    assert core.rpc_methods(protocol_of(f=f))["f"].is_exchange is False


@pytest.mark.parametrize(
    "use",
    [
        iter,
        lambda stream: stream.__enter__(),
        lambda stream: stream.__exit__(None, None, None),
        lambda stream: stream.exchange(core.AnnotatedBatch(BATCH)),
        lambda stream: stream.tick(),
        lambda stream: stream.close(),
        lambda stream: stream.cancel(),
    ],
    ids=["iter", "enter", "exit", "exchange", "tick", "close", "cancel"],
)
def test_what_callers_do_is_not_implemented_on_the_server(use: Any) -> None:
    with pytest.raises(NotImplementedError):
        use(core.Stream(NUMBERS, Count(1)))


def drain(stream: Any, *, limit: int = 100) -> list[pa.RecordBatch]:
    """Run a producer to its end."""
    found = []
    for _ in range(limit):
        out = core.OutputCollector(stream.output_schema)
        stream.state.process(core.AnnotatedBatch(core.empty_batch(core.EMPTY_SCHEMA)), out, None)
        found += [item.batch for item in out.batches]
        if out.finished:
            return found
        out.validate()
    raise AssertionError("the producer did not finish")


TABLE = pa.Table.from_batches([BATCH, BATCH.slice(0, 0), BATCH])


class Capsule:
    """Only the Arrow interface of a table."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "source", [lambda: TABLE, TABLE.to_reader, lambda: Capsule(TABLE)], ids=["table", "reader", "capsule"]
)
def test_stream_from_arrow(source: Any) -> None:
    head = Head(2)
    stream = core.Stream.from_arrow(source(), header=head)
    assert (stream.output_schema, stream.input_schema, stream.header) == (NUMBERS, core.EMPTY_SCHEMA, head)
    assert isinstance(stream.state, core.ProducerState)
    batches = drain(stream)
    assert pa.Table.from_batches(batches, NUMBERS) == TABLE
    assert all(batch.schema == NUMBERS for batch in batches)


def test_stream_from_arrow_reads_one_batch_per_turn() -> None:
    pulled = []

    def batches() -> Any:
        for i in range(3):
            pulled.append(i)
            yield BATCH

    stream = core.Stream.from_arrow(pa.RecordBatchReader.from_batches(NUMBERS, batches()))
    assert pulled == []
    out = core.OutputCollector(NUMBERS)
    stream.state.produce(out, None)
    assert (pulled, len(out.batches), out.finished) == ([0], 1, False)
    assert len(drain(stream)) == 2


def test_an_empty_source_has_its_schema() -> None:
    stream = core.Stream.from_arrow(NUMBERS.empty_table())
    assert stream.output_schema == NUMBERS
    assert sum(batch.num_rows for batch in drain(stream)) == 0


def test_stream_from_arrow_keeps_schema_metadata() -> None:
    field = pa.field("b", pa.float64(), nullable=False, metadata={"unit": "m"})
    noted = TABLE.cast(pa.schema([NUMBERS.field("a"), field], metadata={"pandas": "{}"}))
    first = noted.to_batches()[0]
    for source, rows in (
        (noted, len(noted)),
        (Capsule(noted), len(noted)),
        (noted.to_reader(), len(noted)),
        (first, first.num_rows),
    ):
        stream = core.Stream.from_arrow(source)
        assert stream.output_schema.equals(noted.schema, check_metadata=True)
        assert sum(batch.num_rows for batch in drain(stream)) == rows


def imported(array: pa.Array) -> pa.Array:
    """The array as another library hands it over: an empty slice has an offset, and buffers of no size."""
    return pa.Array._import_from_c_capsule(*array.__arrow_c_array__())


COLUMNS = [
    pa.array(["a", "b", "c"]),
    pa.array([1, None, 3]),
    pa.array([True, False, None]),
    pa.array([b"abc"] * 3, pa.binary(3)),
    pa.array([[1], [2], []]),
    pa.array([{"x": "a"}, None, {"x": "b"}]),
    pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([[("k", 1)], [], []], pa.map_(pa.utf8(), pa.int64())),
]


@pytest.mark.parametrize("column", COLUMNS, ids=[str(column.type) for column in COLUMNS])
def test_an_empty_slice_of_another_library_is_written_as_it_should(column: pa.Array) -> None:
    struct = pa.StructArray.from_arrays([imported(column.slice(2, 0))], ["x"])
    for array in (imported(column.slice(2, 0)), struct):
        batch = pa.RecordBatch.from_arrays([array], ["c"])
        out = core.OutputCollector(batch.schema)
        out.emit(batch)
        (item,) = out.batches
        assert item.batch.num_rows == 0 and item.batch.schema == batch.schema
        for written in (item.batch, batch):
            found, _ = core.deserialize_record_batch(core.serialize_record_batch_bytes(written))
            assert found.num_rows == 0 and found.schema == batch.schema


def test_stream_from_arrow_refuses_other_objects() -> None:
    with pytest.raises(TypeError, match="__arrow_c_stream__"):
        core.Stream.from_arrow({"a": [1]})


def test_a_reader_cannot_travel() -> None:
    with pytest.raises(TypeError, match="from_arrow"):
        core.Stream.from_arrow(TABLE).state.serialize_to_bytes()


def test_cancel_closes_the_source() -> None:
    stream = core.Stream.from_arrow(Capsule(TABLE))
    stream.state.on_cancel(None)
    with pytest.raises(pa.ArrowInvalid, match="closed"):
        stream.state.produce(core.OutputCollector(NUMBERS), None)


# ---- states


@pytest.mark.parametrize(
    ("cls", "missing"),
    [(core.StreamState, "process"), (core.ProducerState, "produce"), (core.ExchangeState, "exchange")],
)
def test_states_are_abstract(cls: type, missing: str) -> None:
    assert issubclass(cls, ASD)
    with pytest.raises(TypeError, match=missing):
        cls()


def test_states_are_dataclasses_that_can_travel() -> None:
    assert Count.deserialize_from_bytes(Count(3).serialize_to_bytes()) == Count(3)
    assert Count.ARROW_SCHEMA.names == ["left"]
    assert core.StreamState.CALL_STATE_TYPE is None


def test_optional_parts_of_a_state_do_nothing() -> None:
    state = Count(3)
    assert (state.bind_call_state(None), state.rehydrate(object()), state.on_cancel(None)) == (None, None, None)
    assert state == Count(3)


def test_process_calls_produce_or_exchange() -> None:
    out = core.OutputCollector(NUMBERS)
    Count(1).process(core.AnnotatedBatch(BATCH), out, None)
    assert out.finished
    out = core.OutputCollector(NUMBERS, producer_mode=False)
    Scale(1.0).process(core.AnnotatedBatch(BATCH), out, None)
    assert out.data_batch.batch == BATCH


# ---- OutputCollector


def test_collector_defaults() -> None:
    out = core.OutputCollector(NUMBERS)
    assert (out.output_schema, out.batches, out.finished, out.total_data_bytes) == (NUMBERS, [], False, 0)
    for name in ("remaining_response_bytes", "response_limit_bytes", "preferred_response_bytes"):
        assert getattr(out, name) is None
    assert out.remaining_externalized_response_bytes is None and out.externalization_enabled is False


def test_collector_keeps_the_budgets() -> None:
    out = core.OutputCollector(
        NUMBERS,
        prior_data_bytes=100,
        remaining_response_bytes=1,
        response_limit_bytes=2,
        preferred_response_bytes=3,
        remaining_externalized_response_bytes=4,
        externalization_enabled=True,
    )
    assert (out.remaining_response_bytes, out.response_limit_bytes, out.preferred_response_bytes) == (1, 2, 3)
    assert (out.remaining_externalized_response_bytes, out.externalization_enabled) == (4, True)
    assert out.total_data_bytes == 100
    out.emit(BATCH)
    assert out.total_data_bytes == 100 + BATCH.get_total_buffer_size()


def test_emit() -> None:
    out = core.OutputCollector(NUMBERS)
    out.emit(BATCH, {"k": "v", "schlüssel": "wért"})
    assert out.data_batch.batch is BATCH
    assert dict(out.data_batch.custom_metadata) == {b"k": b"v", "schlüssel".encode(): "wért".encode()}
    assert out.batches == [out.data_batch]
    assert out.validate() is None


def test_emit_without_metadata() -> None:
    for metadata in (None, {}):
        out = core.OutputCollector(NUMBERS)
        out.emit(BATCH, metadata)
        assert out.data_batch.custom_metadata is None


@pytest.mark.parametrize("emit", ["emit", "emit_arrays", "emit_pydict"])
def test_only_one_data_batch(emit: str) -> None:
    out = core.OutputCollector(NUMBERS)
    out.emit(BATCH)
    argument = {"emit": BATCH, "emit_arrays": BATCH.columns, "emit_pydict": BATCH.to_pydict()}[emit]
    with pytest.raises(RuntimeError, match=r"^Only one data batch may be emitted per call$"):
        getattr(out, emit)(argument)
    assert len(out.batches) == 1


def test_emit_arrays_and_pydict_use_the_output_schema() -> None:
    for emit, argument in [
        ("emit_arrays", (pa.array([1]), pa.array([2.0]))),
        ("emit_arrays", [pa.array([1], pa.int32()), pa.array([2.0])]),
        ("emit_pydict", {"b": [2.0], "a": [1]}),
    ]:
        out = core.OutputCollector(NUMBERS)
        getattr(out, emit)(argument, metadata={"k": "v"})
        assert out.data_batch.batch == BATCH and out.data_batch.batch.schema == NUMBERS
        assert out.data_batch.custom_metadata[b"k"] == b"v"


@pytest.mark.parametrize(
    "data",
    [
        {"b": [2.0], "a": [1]},
        {"a": [1], "b": [2.0], "extra": ["x"]},
        {"a": pa.array([1], pa.int32()), "b": pa.array([2], pa.int64())},
    ],
    ids=["reordered", "extra column", "cast"],
)
def test_emit_fits_a_batch_to_the_schema(data: dict[str, Any]) -> None:
    out = core.OutputCollector(NUMBERS)
    out.emit(pa.RecordBatch.from_pydict(data))
    assert out.data_batch.batch == BATCH and out.data_batch.batch.schema == NUMBERS


def test_emit_names_missing_columns() -> None:
    out = core.OutputCollector(NUMBERS)
    with pytest.raises(ValueError) as caught:
        out.emit(pa.RecordBatch.from_pydict({"b": [1.0], "c": [2]}))
    assert str(caught.value) == (
        "emitted batch is missing column(s) required by output_schema: batch has ['b', 'c'],"
        " output_schema needs ['a', 'b']"
    )
    assert out.batches == []


@pytest.mark.parametrize(
    "data", [{"a": ["x"], "b": [2.0]}, {"a": [1], "b": pa.array([None], pa.float64())}], ids=["text", "null"]
)
def test_emit_refuses_what_cannot_be_cast(data: dict[str, Any]) -> None:
    out = core.OutputCollector(NUMBERS)
    with pytest.raises(TypeError, match=r"not cast|has nulls"):
        out.emit(pa.RecordBatch.from_pydict(data))
    assert out.batches == []


def test_emit_does_not_make_numbers_of_text_that_a_caller_has_sent() -> None:
    out = core.OutputCollector(pa.schema([("amount", pa.decimal128(38, 2))]))
    with pytest.raises(TypeError, match="'amount' is string, which is not cast to decimal128"):
        out.emit(pa.RecordBatch.from_pydict({"amount": ["1e-999999999"]}))  # pyarrow's cast would end the process


def test_schema_metadata_does_not_matter() -> None:
    noted = BATCH.replace_schema_metadata({"k": "v"})
    out = core.OutputCollector(NUMBERS)
    out.emit(noted)
    assert out.data_batch.batch is noted


def test_zero_rows_are_data() -> None:
    out = core.OutputCollector(NUMBERS)
    out.emit(BATCH.slice(0, 0))
    assert out.validate() is None and out.data_batch.batch.num_rows == 0


def test_finish() -> None:
    out = core.OutputCollector(NUMBERS)
    out.finish()
    out.emit(BATCH)
    assert out.finished and len(out.batches) == 1
    exchange = core.OutputCollector(NUMBERS, producer_mode=False)
    with pytest.raises(RuntimeError) as caught:
        exchange.finish()
    assert str(caught.value) == (
        "finish() is not allowed on exchange streams; exchange streams must emit exactly one data batch per call"
    )
    assert not exchange.finished


@pytest.mark.parametrize(
    "use", [lambda out: out.validate(), lambda out: out.data_batch], ids=["validate", "data_batch"]
)
def test_no_data_batch(use: Any) -> None:
    out = core.OutputCollector(NUMBERS)
    out.client_log(core.Level.INFO, "not data")
    with pytest.raises(RuntimeError, match=r"^No data batch was emitted"):
        use(out)


def test_messages_keep_their_order() -> None:
    out = core.OutputCollector(NUMBERS, server_id="srv1")
    out.client_log(core.Level.INFO, "before", n="1")
    out.emit(BATCH)
    out.emit_client_log_message(core.Message.warn("after"))
    assert [item.batch.num_rows for item in out.batches] == [0, 1, 0]
    assert all(item.batch.schema == NUMBERS for item in out.batches)
    before, data, after = (item.custom_metadata for item in out.batches)
    assert dict(before) == {
        core.LOG_LEVEL_KEY: b"INFO",
        core.LOG_MESSAGE_KEY: b"before",
        core.LOG_EXTRA_KEY: b'{"n": "1"}',
        core.SERVER_ID_KEY: b"srv1",
    }
    assert data is None
    assert dict(after) == {
        core.LOG_LEVEL_KEY: b"WARN",
        core.LOG_MESSAGE_KEY: b"after",
        core.SERVER_ID_KEY: b"srv1",
    }


def test_messages_are_encoded_at_once() -> None:
    out = core.OutputCollector(NUMBERS)
    with pytest.raises(TypeError):
        out.client_log(core.Level.INFO, "x", value=object())
    assert out.batches == []


def test_messages_without_a_server_id() -> None:
    out = core.OutputCollector(core.EMPTY_SCHEMA)
    out.client_log(core.Level.DEBUG, "x")
    assert set(out.batches[0].custom_metadata) == {core.LOG_LEVEL_KEY, core.LOG_MESSAGE_KEY}


def test_merge_data_metadata() -> None:
    out = core.OutputCollector(NUMBERS)
    with pytest.raises(RuntimeError, match="No data batch was emitted"):
        out.merge_data_metadata(pa.KeyValueMetadata({"k": "v"}))
    out.client_log(core.Level.INFO, "first")
    out.emit(BATCH, {"a": "1", "b": "1"})
    out.merge_data_metadata(pa.KeyValueMetadata({"b": "2", "c": "3"}))
    assert dict(out.data_batch.custom_metadata) == {b"a": b"1", b"b": b"2", b"c": b"3"}
    assert out.batches[1] is out.data_batch and out.data_batch.batch is BATCH
    with pytest.raises(RuntimeError, match="Only one data batch"):
        out.emit(BATCH)


def test_collector_signature() -> None:
    parameters = inspect.signature(core.OutputCollector).parameters
    assert list(parameters) == [
        "output_schema",
        "prior_data_bytes",
        "server_id",
        "producer_mode",
        "remaining_response_bytes",
        "response_limit_bytes",
        "preferred_response_bytes",
        "remaining_externalized_response_bytes",
        "externalization_enabled",
    ]
    assert parameters["producer_mode"].default is True


# ---- metadata helpers


def test_encode_metadata() -> None:
    assert dict(core.encode_metadata({"a": "1", "ü": "ö"})) == {b"a": b"1", "ü".encode(): "ö".encode()}
    assert dict(core.encode_metadata({b"a": b"\xff"})) == {b"a": b"\xff"}
    assert dict(core.encode_metadata(pa.KeyValueMetadata({"a": "1"}))) == {b"a": b"1"}


def test_what_the_framework_has_noted_does_not_travel_on() -> None:
    noted = {"vgi_rpc.shm_source": "s", "vgi_rpc.location.fetch_ms": "1.0", "vgi_rpc.location.source": "u", "mine": "1"}
    assert dict(core.encode_metadata(noted)) == {b"mine": b"1"}


REFUSED_METADATA = [
    ({"vgi_rpc.log_level": "ERROR"}, ValueError, "'vgi_rpc.log_level'.*reserved"),
    ({b"vgi_rpc.location": b"u"}, ValueError, "vgi_rpc.location.*reserved"),
    ({"vgi_rpc.anything": ""}, ValueError, "vgi_rpc.anything"),
    ({"k": 1}, TypeError, "'k'.*got int"),
    ({"k": None}, TypeError, "'k'.*got NoneType"),
    ({3: "v"}, TypeError, "3.*got int"),
    ({"k": "\ud800"}, ValueError, "surrogates"),
    ({"big": "x" * (1 << 20) + "y"}, ValueError, "'big'.*max_metadata_entry_bytes=1048576"),
    ({"x" * (1 << 20) + "y": ""}, ValueError, "max_metadata_entry_bytes=1048576"),
    ({str(i): "x" * (1 << 20) for i in range(9)}, ValueError, "more than 8388608 bytes"),
    (pa.KeyValueMetadata([("k", "1"), ("k", "2")]), ValueError, "'k' is there twice"),
]


@pytest.mark.parametrize(("metadata", "kind", "text"), REFUSED_METADATA, ids=[text for _, _, text in REFUSED_METADATA])
def test_metadata_that_cannot_travel(metadata: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        core.encode_metadata(metadata)
    out = core.OutputCollector(NUMBERS)
    with pytest.raises(kind, match=text):
        out.emit_pydict({"a": [], "b": []}, metadata=metadata)
    assert out.batches == []
    out.emit_pydict({"a": [], "b": []}, metadata={"mine": "1"})
    with pytest.raises(kind, match=text):
        out.merge_data_metadata(metadata)
    out.merge_data_metadata(pa.KeyValueMetadata({"more": "2"}))
    assert dict(out.data_batch.custom_metadata) == {b"mine": b"1", b"more": b"2"}


def test_merge_metadata() -> None:
    merged = core.merge_metadata(pa.KeyValueMetadata({"a": "1", "b": "1"}), None, {b"b": b"2"}, {"c": "3"})
    assert dict(merged) == {b"a": b"1", b"b": b"2", b"c": b"3"}
    assert core.merge_metadata() is None
    assert core.merge_metadata(None, {}, pa.KeyValueMetadata({})) is None


def test_strip_keys() -> None:
    metadata = pa.KeyValueMetadata({"a": "1", "b": "2"})
    assert dict(core.strip_keys(metadata, b"a", b"nothing")) == {b"b": b"2"}
    assert dict(core.strip_keys(metadata)) == {b"a": b"1", b"b": b"2"}
    assert core.strip_keys(metadata, b"a", b"b") is None
    assert core.strip_keys(None, b"a") is None


# ---- type tokens


def not_null(name: str, dtype: pa.DataType) -> pa.Field:
    return pa.field(name, dtype, nullable=False)


def imported_type(text: bytes) -> pa.DataType:
    """A type that pyarrow has no constructor for, through the C data interface."""
    import ctypes

    class CSchema(ctypes.Structure):
        pass

    release_type = ctypes.CFUNCTYPE(None, ctypes.POINTER(CSchema))
    CSchema._fields_ = [
        ("format", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("metadata", ctypes.c_char_p),
        ("flags", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("children", ctypes.c_void_p),
        ("dictionary", ctypes.c_void_p),
        ("release", release_type),
        ("private_data", ctypes.c_void_p),
    ]

    @release_type
    def release(schema: Any) -> None:
        ctypes.cast(ctypes.addressof(schema.contents) + CSchema.release.offset, ctypes.POINTER(ctypes.c_void_p))[0] = (
            None
        )

    schema = CSchema(text, b"", None, 0, 0, None, None, release, None)
    return pa.DataType._import_from_c(ctypes.addressof(schema))


class Extension(pa.ExtensionType):
    """An extension whose text is that of a plain type."""

    def __init__(self, name: str, storage: pa.DataType) -> None:
        super().__init__(storage, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: Any) -> Extension:
        return cls("", storage_type)

    def __str__(self) -> str:
        return "int64"


UUID = pa.uuid() if hasattr(pa, "uuid") else Extension("arrow.uuid", pa.binary(16))  # pyarrow 18 has it


TOKENS = [
    (pa.null(), "null"),
    (pa.bool_(), "bool"),
    (pa.int8(), "int8"),
    (pa.int16(), "int16"),
    (pa.int32(), "int32"),
    (pa.int64(), "int64"),
    (pa.uint8(), "uint8"),
    (pa.uint16(), "uint16"),
    (pa.uint32(), "uint32"),
    (pa.uint64(), "uint64"),
    (pa.float16(), "float16"),
    (pa.float32(), "float32"),
    (pa.float64(), "float64"),
    (pa.utf8(), "utf8"),
    (pa.large_utf8(), "large_utf8"),
    (pa.string_view(), "utf8_view"),
    (pa.binary(), "binary"),
    (pa.large_binary(), "large_binary"),
    (pa.binary_view(), "binary_view"),
    (pa.binary(8), "fixed_size_binary(8)"),
    (pa.date32(), "date32"),
    (pa.date64(), "date64"),
    (pa.month_day_nano_interval(), "interval_month_day_nano"),
    (imported_type(b"tiM"), "interval_months"),
    (imported_type(b"tiD"), "interval_day_time"),
    (pa.decimal128(38, 9), "decimal128(38,9)"),
    (pa.decimal128(5, -2), "decimal128(5,-2)"),
    (pa.decimal256(50, 3), "decimal256(50,3)"),
    (pa.time32("s"), "time32(s)"),
    (pa.time32("ms"), "time32(ms)"),
    (pa.time64("us"), "time64(us)"),
    (pa.time64("ns"), "time64(ns)"),
    (pa.timestamp("us"), "timestamp(us)"),
    (pa.timestamp("us", tz="UTC"), "timestamp(us,tz=UTC)"),
    (pa.timestamp("ns", tz="Europe/Berlin"), "timestamp(ns,tz=Europe/Berlin)"),
    (pa.timestamp("s", tz="+01:00"), "timestamp(s,tz=+01:00)"),
    (pa.duration("ms"), "duration(ms)"),
    (pa.list_(pa.int8()), "list<item?:int8>"),
    (pa.list_(not_null("element", pa.int8())), "list<item:int8>"),
    (pa.large_list(pa.int8()), "large_list<item?:int8>"),
    (pa.list_(pa.int8(), 3), "fixed_size_list(3)<item?:int8>"),
    (pa.list_view(pa.int8()), "list_view<item?:int8>"),
    (pa.large_list_view(pa.int8()), "large_list_view<item?:int8>"),
    (pa.map_(pa.utf8(), pa.int64()), "map<key:utf8,value?:int64>"),
    (pa.map_(not_null("k", pa.utf8()), not_null("v", pa.int64())), "map<key:utf8,value:int64>"),
    (pa.map_(pa.utf8(), pa.int64(), keys_sorted=True), "map<key:utf8,value?:int64>,keys_sorted"),
    (pa.struct([pa.field("a", pa.int8()), not_null("b", pa.utf8())]), "struct<a?:int8,b:utf8>"),
    (pa.struct([]), "struct<>"),
    (
        pa.sparse_union([pa.field("a", pa.int8()), pa.field("b", pa.utf8())], type_codes=[5, 7]),
        "sparse_union<5=a?:int8,7=b?:utf8>",
    ),
    (pa.dense_union([not_null("a", pa.int8())]), "dense_union<0=a:int8>"),
    (pa.dictionary(pa.int16(), pa.utf8()), "dictionary<index:int16,value:utf8>"),
    (pa.dictionary(pa.int8(), pa.int64(), ordered=True), "dictionary<index:int8,value:int64>,ordered"),
    (pa.run_end_encoded(pa.int32(), pa.utf8()), "run_end_encoded<run_ends:int32,values:utf8>"),
    (UUID, "extension(arrow.uuid)<fixed_size_binary(16)>"),
    (
        pa.list_(pa.struct([pa.field("p", pa.map_(pa.utf8(), pa.list_(UUID)))])),
        "list<item?:struct<p?:map<key:utf8,value?:list<item?:extension(arrow.uuid)<fixed_size_binary(16)>>>>>",
    ),
]


@pytest.mark.parametrize(("dtype", "token"), TOKENS, ids=[token for _, token in TOKENS])
def test_type_tokens(dtype: pa.DataType, token: str) -> None:
    assert core.type_token(dtype) == token


def test_extensions_of_others() -> None:
    assert core.type_token(Extension("demo.disguised", pa.int32())) == "extension(demo.disguised)<int32>"


def test_small_decimals_have_tokens_like_large_ones() -> None:
    assert core.type_token(pa.list_(pa.decimal32(5, 2))) == "list<item?:decimal32(5,2)>"
    assert core.type_token(pa.decimal64(15, -3)) == "decimal64(15,-3)"


class Untold(pa.DataType):
    """A type of a later pyarrow."""

    id = 99
    num_fields = 0

    def __str__(self) -> str:
        return "untold"


def test_a_type_without_a_token_is_named_with_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(core.UnsupportedArrowTypeError, match="untold has no portable token"):
        core.type_token(Untold.__new__(Untold))
    monkeypatch.setitem(core._METHODS_PLAIN_TOKENS, "double", None)
    methods = core.rpc_methods(Service)
    with pytest.raises(core.UnsupportedArrowTypeError, match=r"add\(\): Arrow type double has no portable token"):
        core.compute_protocol_hash("Service", methods)
    assert issubclass(core.UnsupportedArrowTypeError, TypeError)


def test_field_and_schema_tokens() -> None:
    assert core.TYPE_TOKEN_VERSION == 1
    assert core.field_token(NUMBERS.field("b")) == {"name": "b", "nullable": False, "type": "float64"}
    assert core.schema_tokens(NUMBERS) == [
        {"name": "a", "nullable": True, "type": "int64"},
        {"name": "b", "nullable": False, "type": "float64"},
    ]
    assert core.schema_tokens(core.EMPTY_SCHEMA) == []


# ---- canonical JSON and the hash


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": True, "a": [None, False, {}]}, '{"a":[null,false,{}],"b":true}'),
        ({"ü": "ö", "z": "\u2028"}, '{"z":"\u2028","ü":"ö"}'),
        ('"\\/\b\f\n\r\t\x00\x1f\x7f', '"\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\x7f"'),
        # UTF-16 code units decide: a surrogate pair sorts before U+FB33
        (
            {"\ufb33": 1, "\U0001f600": 2, "\u20ac": 3, "1": 4, "\r": 5},
            '{"\\r":5,"1":4,"\u20ac":3,"\U0001f600":2,"\ufb33":1}',
        ),
        ((1, 2), "[1,2]"),
        (types.MappingProxyType({"a": 2**53 - 1}), '{"a":9007199254740991}'),
    ],
)
def test_canonical_json(value: Any, text: str) -> None:
    assert core.canonical_json(value) == text.encode()


@pytest.mark.parametrize("value", [1.5, float("nan"), 2**53, {"a": object()}, [b"x"], {"a": {1, 2}}])
def test_canonical_json_refuses_what_has_no_one_form(value: Any) -> None:
    with pytest.raises(TypeError):
        core.canonical_json(value)


def test_canonical_json_refuses_lone_surrogates() -> None:
    with pytest.raises(UnicodeEncodeError):
        core.canonical_json("\ud800")


def test_protocol_description() -> None:
    methods = {name: METHODS[name] for name in ("scale", "ping", "add")}
    number = {"nullable": False, "type": "float64"}
    assert core.protocol_description("demo.P", methods) == {
        "protocol": "demo.P",
        "methods": [
            {
                "name": "add",
                "type": "unary",
                "has_return": True,
                "has_header": False,
                "params": [{"name": "a", **number}, {"name": "b", **number}],
                "result": [{"name": "result", **number}],
            },
            {"name": "ping", "type": "unary", "has_return": False, "has_header": False, "params": []},
            {
                "name": "scale",
                "type": "stream",
                "has_return": False,
                "has_header": True,
                "params": [{"name": "factor", **number}],
                "header": [
                    {"name": "total", "nullable": False, "type": "int64"},
                    {"name": "title", "nullable": True, "type": "utf8"},
                ],
            },
        ],
    }


PRE_IMAGE = (
    '{"methods":[{"has_header":false,"has_return":true,"name":"describe","params":[{"name":"protocol",'
    '"nullable":false,"type":"utf8"}],"result":[{"name":"result","nullable":false,"type":"binary"}],"type":"unary"},'
    '{"has_header":false,"has_return":true,"name":"list_protocols","params":[],"result":[{"name":"result",'
    '"nullable":false,"type":"binary"}],"type":"unary"}],"protocol":"vgi_rpc.Reflection.v1"}'
)


class Reflection(Protocol):
    """The shape of vgi_rpc.Reflection.v1."""

    protocol_name: ClassVar[str] = "vgi_rpc.Reflection.v1"

    def list_protocols(self) -> Head: ...

    def describe(self, protocol: str) -> Head: ...


def test_hash_vector_of_the_reference() -> None:
    methods = core.rpc_methods(Reflection)
    assert core.canonical_json(core.protocol_description("vgi_rpc.Reflection.v1", methods)) == PRE_IMAGE.encode()
    assert core.compute_protocol_hash("vgi_rpc.Reflection.v1", methods) == (
        "3c7db4cae8cdfc93dc4a76e73b8b759e18e45e6a5811adba4e520366344b919a"
    )


def test_hash_depends_on_the_contract_only() -> None:
    def f(self, a: int) -> int: ...
    def documented(self, a: int = 1) -> int:
        """Text."""
        ...

    def other(self, b: int) -> int: ...
    def nullable(self, a: int | None) -> int: ...

    def digest(function: Any, name: str = "P") -> str:
        return core.compute_protocol_hash(name, core.rpc_methods(protocol_of(f=function)))

    assert core.HASH_DOMAIN == b"vgi_rpc.protocol_hash.v1|"
    assert digest(f) == digest(documented)
    assert len({digest(f), digest(f, "Q"), digest(other), digest(nullable)}) == 4


def test_import_makes_no_dataclasses() -> None:
    assert "dataclasses" in sys.modules  # this file uses them; tests/test_house.py checks the import itself
    own = [value for value in vars(core).values() if isinstance(value, type) and value.__module__ == core.__name__]
    assert not any(hasattr(value, "__dataclass_fields__") for value in own)  # lazily found extras may be dataclasses
