"""Room 5: annotations <-> Arrow types, values <-> cells, dataclasses and their evolution (types.md)."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import io
import math
import subprocess
import sys
import types
import typing
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Dict, FrozenSet, List, Literal, NewType, Optional, Set, Tuple, Union  # noqa: UP035

import numpy
import pyarrow as pa
import pytest
from pyarrow import ipc

from tests.core import core

Arrow = core.ArrowType
Base = core.ArrowSerializableDataclass


class Color(enum.Enum):
    RED = "r"
    GREEN = "RED"  # its value is the name of another member: the name wins
    BLUE = 3
    AZURE = 3  # an alias of BLUE


class Number(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    HELLO = "hi"


class Perm(enum.Flag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True)
class Point(Base):
    x: int
    y: float = 0.5


@dataclass(frozen=True)
class Empty(Base):
    pass


@dataclass(frozen=True)
class V1(Base):
    a: int
    b: str


UserId = NewType("UserId", int)
SuperId = NewType("SuperId", UserId)
POINT = pa.struct([pa.field("x", pa.int64(), nullable=False), pa.field("y", pa.float64(), nullable=False)])
ENUM = pa.dictionary(pa.int16(), pa.utf8())

SAME: list[tuple[Any, pa.DataType, bool]] = [
    (str, pa.utf8(), False),
    (bytes, pa.binary(), False),
    (int, pa.int64(), False),
    (float, pa.float64(), False),
    (bool, pa.bool_(), False),
    (list[int], pa.list_(pa.int64()), False),
    (List[str], pa.list_(pa.utf8()), False),  # noqa: UP006
    (list[list[bytes]], pa.list_(pa.list_(pa.binary())), False),
    (dict[str, int], pa.map_(pa.utf8(), pa.int64()), False),
    (Dict[str, list[int]], pa.map_(pa.utf8(), pa.list_(pa.int64())), False),  # noqa: UP006
    (frozenset[int], pa.list_(pa.int64()), False),
    (FrozenSet[str], pa.list_(pa.utf8()), False),  # noqa: UP006
    (set[int], pa.list_(pa.int64()), False),
    (Set[int], pa.list_(pa.int64()), False),  # noqa: UP006
    (Color, ENUM, False),
    (Number, ENUM, False),
    (Word, ENUM, False),
    (Perm, ENUM, False),
    (list[Color], pa.list_(ENUM), False),
    (list[Point], pa.list_(POINT), False),
    (dict[str, Point], pa.map_(pa.utf8(), POINT), False),
    (frozenset[Point], pa.list_(POINT), False),
    (list[Annotated[Point, Arrow(pa.binary())]], pa.list_(pa.binary()), False),
    (Annotated[Point, Arrow(pa.binary())], pa.binary(), False),
    (pa.RecordBatch, pa.binary(), False),
    (pa.Schema, pa.binary(), False),
    (UserId, pa.int64(), False),
    (SuperId, pa.int64(), False),
    (Annotated[int, Arrow(pa.int8())], pa.int8(), False),
    (Annotated[int, "doc", Arrow(pa.int8()), Arrow(pa.int16())], pa.int8(), False),
    (Annotated[Annotated[int, Arrow(pa.int8())], "doc"], pa.int8(), False),
    (Annotated[UserId, Arrow(pa.uint16())], pa.uint16(), False),
    (Annotated[int, "doc"], pa.int64(), False),
    (Annotated[object, Arrow(pa.utf8())], pa.utf8(), False),
    (Annotated[tuple, Arrow(pa.list_(pa.int64()))], pa.list_(pa.int64()), False),
    (list[Annotated[int, Arrow(pa.int32())]], pa.list_(pa.int32()), False),
    (int | None, pa.int64(), True),
    (Optional[int], pa.int64(), True),  # noqa: UP045
    (Union[None, int], pa.int64(), True),  # noqa: UP007
    (list[int] | None, pa.list_(pa.int64()), True),
    (Color | None, ENUM, True),
    (Annotated[int | None, Arrow(pa.int8())], pa.int8(), True),
    (Annotated[int, Arrow(pa.int8())] | None, pa.int8(), True),
    (Annotated[int, Arrow(pa.int8(), nullable=True)], pa.int8(), True),
    (Annotated[int | None, Arrow(pa.int8(), nullable=False)], pa.int8(), False),
    (Annotated[int | None, Arrow(pa.int8()), Arrow(pa.int16(), nullable=False)], pa.int8(), False),
    (Annotated[int, Arrow(pa.int8(), nullable=True), Arrow(pa.int8(), nullable=False)], pa.int8(), True),
    (list[int | None], pa.list_(pa.int64()), False),
    (dict[str, int | None], pa.map_(pa.utf8(), pa.int64()), False),
    (dt.datetime, pa.timestamp("us"), False),
    (dt.date, pa.date32(), False),
    (dt.time, pa.time64("us"), False),
    (dt.timedelta, pa.duration("us"), False),
    (dt.datetime | None, pa.timestamp("us"), True),
    (Annotated[dt.datetime, Arrow(pa.timestamp("us", tz="UTC"))], pa.timestamp("us", tz="UTC"), False),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(20, 4))], pa.decimal128(20, 4), False),
]
DIFFERENT: list[tuple[Any, pa.DataType, pa.DataType, bool]] = [
    (Point, pa.binary(), POINT, False),
    (Point | None, pa.binary(), POINT, True),
    (Annotated[Point, "doc"], pa.binary(), POINT, False),
    (Annotated[Point, Arrow(pa.large_binary())], pa.binary(), pa.large_binary(), False),
    (Empty, pa.binary(), pa.struct([]), False),
]
ROWS = [(annotation, dtype, dtype, nullable) for annotation, dtype, nullable in SAME] + DIFFERENT


@pytest.mark.parametrize(("annotation", "top", "inner", "nullable"), ROWS, ids=str)
def test_annotation_table(annotation: Any, top: pa.DataType, inner: pa.DataType, nullable: bool) -> None:
    assert core._types_field("f", annotation, top=True).equals(pa.field("f", top, nullable=nullable))
    assert core._types_field("f", annotation, top=False).equals(pa.field("f", inner, nullable=nullable))


@pytest.mark.parametrize(("annotation", "top", "inner", "nullable"), ROWS, ids=str)
def test_annotation_table_as_a_dataclass_field(
    annotation: Any, top: pa.DataType, inner: pa.DataType, nullable: bool
) -> None:
    cls = dataclasses.make_dataclass("Made", [("f", annotation)], bases=(Base,))
    assert cls.ARROW_SCHEMA.equals(pa.schema([pa.field("f", inner, nullable=nullable)]))


def test_nullability_of_elements() -> None:
    assert core._types_field("f", list[int], top=True).type.value_field.equals(pa.field("item", pa.int64()))
    mapped = core._types_field("f", dict[str, int], top=True).type
    assert not mapped.key_field.nullable
    assert mapped.item_field.nullable
    assert not mapped.keys_sorted
    assert not ENUM.ordered
    assert core._types_field("f", Color, top=True).type.ordered is False


# ---- refused annotations


class Plain(typing.NamedTuple):
    a: int


class Typed(typing.TypedDict):
    a: int


@dataclass
class NotArrow:
    a: int


@dataclass
class Generic_(Base, typing.Generic[typing.TypeVar("_G")]):  # type: ignore[misc]
    a: int


REFUSED: list[Any] = [
    list,
    dict,
    frozenset,
    set,
    Sequence[int],
    Mapping[str, int],
    Iterable[int],
    typing.Sequence[int],
    object,
    Any,
    Literal["a"],
    int | str,
    int | str | None,
    decimal.Decimal,
    uuid.UUID,
    Path,
    complex,
    bytearray,
    memoryview,
    pa.Table,
    pa.Array,
    pa.DataType,
    pa.int64(),
    NotArrow,
    Plain,
    Typed,
    typing.TypeVar("T"),
    Callable[[], int],
    type[int],
    type(None),
    None,
    List,  # noqa: UP006
    Dict,  # noqa: UP006
    Generic_[int],
    core.Stream,
    core.Stream[Any],
]
TUPLES: list[Any] = [tuple, tuple[int], tuple[int, ...], Tuple[int, str]]  # noqa: UP006


@pytest.mark.parametrize("annotation", REFUSED, ids=str)
@pytest.mark.parametrize("top", [True, False])
def test_refused_annotations(annotation: Any, top: bool) -> None:
    with pytest.raises(TypeError) as caught:
        core._types_field("f", annotation, top=top)
    assert str(caught.value) == (
        f"Cannot infer Arrow type for: {annotation}."
        " Use Annotated[T, ArrowType(...)] to specify the Arrow type explicitly."
    )


@pytest.mark.parametrize("annotation", TUPLES, ids=str)
def test_refused_tuples(annotation: Any) -> None:
    with pytest.raises(TypeError) as caught:
        core._types_field("f", annotation, top=True)
    text = str(caught.value)
    assert text.startswith(f"Cannot infer Arrow type for: {annotation}.")
    assert text.endswith(
        "Arrow has no native heterogeneous-tuple type. Use a nested ArrowSerializableDataclass for fixed named fields,"
        " or list[T] for homogeneous sequences."
    )


@pytest.mark.parametrize(
    "annotation",
    [list[Any], list[list[object]], dict[str, Any], dict[Any, str], set[object], frozenset[complex]],
    ids=str,
)
def test_refused_inside_a_container(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"^Cannot infer Arrow type for: "):
        core._types_field("f", annotation, top=True)


@pytest.mark.parametrize("annotation", [object, list[Any], tuple[int, str], int | str], ids=str)
def test_refused_dataclass_field_names_class_and_field(annotation: Any) -> None:
    cls = dataclasses.make_dataclass("Made", [("ok", int), ("f", annotation)], bases=(Base,))
    with pytest.raises(TypeError, match=r"^Cannot generate Arrow schema for Made\.f: Cannot infer Arrow type for: "):
        _ = cls.ARROW_SCHEMA


def test_the_mixin_itself_is_no_column() -> None:
    with pytest.raises(TypeError, match="must be called with a dataclass type or instance"):
        core._types_field("f", Base, top=False)


def test_a_type_variable_field_is_refused() -> None:
    var = typing.TypeVar("var")
    cls = dataclasses.make_dataclass("Made", [("f", var)], bases=(Base, typing.Generic[var]))
    with pytest.raises(
        TypeError, match=r"^Cannot generate Arrow schema for Made\.f: Cannot infer Arrow type for: ~var"
    ):
        _ = cls.ARROW_SCHEMA


def test_not_a_dataclass() -> None:
    class Bare(Base):
        a: int

    with pytest.raises(TypeError, match="must be called with a dataclass type or instance"):
        _ = Bare.ARROW_SCHEMA


# ---- values through a cell and back


def through(annotation: Any, value: Any, *, top: bool = True) -> Any:
    """Encode, make the array, take it apart, decode: what a call does with a value."""
    column = core._types_field("f", annotation, top=top)
    array = core._types_cell(value, core._types_codec(annotation, top=top))
    assert array.type.equals(column.type)
    assert len(array) == 1
    array.validate(full=True)
    raw = array[0].as_py()
    decode = core._types_codec(annotation, top=top).decode
    return raw if raw is None or decode is None else decode(raw)


BATCH = pa.record_batch({"a": [1, 2], "b": ["x", None]})
SCHEMA = pa.schema([("a", pa.int64())], metadata={"k": "v"})
UTC = Annotated[dt.datetime, Arrow(pa.timestamp("us", tz="UTC"))]
NOON = dt.datetime(2020, 1, 2, 12, 0, 0, 5)
ROUND: list[tuple[Any, Any]] = [
    (str, ""),
    (str, "\u00e9\U0001f600"),
    (bytes, b""),
    (bytes, b"\x00\xff"),
    (int, -(2**63)),
    (int, 2**63 - 1),
    (float, math.inf),
    (float, 1e-320),
    (bool, True),
    (bool, False),
    (list[int], []),
    (list[int], [1, 2]),
    (list[int | None], [1, None]),
    (list[list[str]], [[], ["a"]]),
    (dict[str, int], {}),
    (dict[str, int], {"a": 1, "b": 2}),
    (dict[str, int | None], {"a": None}),
    (dict[int, dict[str, bool]], {1: {"a": True}}),
    (frozenset[int], frozenset({1, 2})),
    (frozenset[int], frozenset()),
    (set[str], {"a", "b"}),
    (list[set[int]], [{1}, set()]),
    (Color, Color.RED),
    (Color, Color.GREEN),
    (Color, Color.AZURE),
    (Number, Number.ONE),
    (Word, Word.HELLO),
    (Perm, Perm.WRITE),
    (list[Color], [Color.RED, Color.BLUE]),
    (list[Word], [Word.HELLO]),
    (list[Number], [Number.ONE]),
    (dict[Word, Color], {Word.HELLO: Color.RED}),
    (frozenset[Color], frozenset({Color.RED, Color.GREEN})),
    (Point, Point(1, 2.0)),
    (Empty, Empty()),
    (list[Point], [Point(1), Point(2, 3.0)]),
    (list[Point | None], [None, Point(2, 3.0)]),
    (dict[str, Point], {"a": Point(1)}),
    (frozenset[Point], frozenset({Point(1), Point(2)})),
    (list[Annotated[Point, Arrow(pa.binary())]], [Point(1), Point(2)]),
    (Annotated[Point, Arrow(pa.binary())], Point(7)),
    (pa.Schema, SCHEMA),
    (pa.RecordBatch, BATCH),
    (list[pa.Schema], [SCHEMA]),
    (dict[str, pa.RecordBatch], {"a": BATCH}),
    (UserId, 5),
    (SuperId, 5),
    (list[UserId], [1]),
    (dt.datetime, NOON),
    (dt.date, dt.date(1, 1, 1)),
    (dt.time, dt.time(23, 59, 59, 999999)),
    (dt.timedelta, dt.timedelta(days=-1, microseconds=3)),
    (list[dt.date], [dt.date(2020, 1, 1)]),
    (UTC, NOON.replace(tzinfo=dt.UTC)),
    (Annotated[dt.date, Arrow(pa.date32())], dt.date(2020, 1, 1)),
    (Annotated[dt.time, Arrow(pa.time64("us"))], dt.time(1)),
    (Annotated[dt.timedelta, Arrow(pa.duration("us"))], dt.timedelta(1)),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(20, 4))], decimal.Decimal("1.5000")),
    (Annotated[str, Arrow(pa.large_string())], "x"),
    (Annotated[bytes, Arrow(pa.large_binary())], b"x"),
    (Annotated[bytes, Arrow(pa.binary(8))], b"12345678"),
    *((Annotated[int, Arrow(t)], 7) for t in (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32())),
    (Annotated[int, Arrow(pa.uint64())], 2**64 - 1),
    (Annotated[float, Arrow(pa.float32())], 0.5),
    (Annotated[dict[str, Any], Arrow(pa.struct([("a", pa.int64())]))], {"a": 1}),
    (Annotated[str, Arrow(pa.dictionary(pa.int32(), pa.utf8()))], "x"),
]


@pytest.mark.parametrize(("annotation", "value"), ROUND)
@pytest.mark.parametrize("top", [True, False])
def test_values_round_trip(annotation: Any, value: Any, top: bool) -> None:
    found = through(annotation, value, top=top)
    assert found == value
    assert type(found) is type(value)
    assert through(annotation | None if annotation is not UserId else annotation, None, top=top) is None


def test_uuid_round_trips() -> None:
    value = uuid.UUID(int=5)
    try:
        pa.array([value], pa.uuid())
    except pa.ArrowTypeError:
        pytest.skip("this pyarrow does not take UUID objects yet (19 does not)")
    assert through(Annotated[uuid.UUID, Arrow(pa.uuid())], value) == value


def test_nan_and_negative_zero() -> None:
    assert math.isnan(through(float, math.nan))
    assert math.copysign(1, through(float, -0.0)) == -1


BLOB = pa.struct([("x", pa.int8()), ("y", pa.float32()), ("blob", pa.binary())])


@pytest.mark.parametrize(
    "dtype", [BLOB, pa.large_binary(), pa.struct([("x", pa.int64()), ("y", pa.float64())])], ids=str
)
def test_a_record_in_another_type(dtype: Any) -> None:
    assert through(Annotated[Point, Arrow(dtype)], Point(1, 2.0), top=False) == Point(1, 2.0)


def test_names_in_types_mean_nothing() -> None:
    for dtype in (pa.timestamp("us", "list"), pa.struct([("binary", pa.int8())]), pa.list_(pa.field("map", pa.int8()))):
        with pytest.raises(TypeError, match="expected"):
            core._types_cell(object(), core._types_raw(dtype))
        assert core._types_cell(None, core._types_raw(dtype)).null_count == 1


def test_schema_keeps_its_metadata() -> None:
    assert through(pa.Schema, SCHEMA).metadata == {b"k": b"v"}


def test_utc_values_come_back_with_the_zone() -> None:
    assert str(through(UTC, NOON.replace(tzinfo=dt.UTC)).tzinfo) == "UTC"


# ---- leniency (types.md section 3)

NAIVE = Annotated[dt.datetime, Arrow(pa.timestamp("us"))]
EAST = dt.timezone(dt.timedelta(hours=2))


@dataclass(frozen=True)
class Wide(Point):
    z: str = "z"


LENIENT: list[tuple[Any, Any, Any]] = [
    (int, 1.0, 1),
    (int, decimal.Decimal(2), 2),
    (int, Number.ONE, 1),
    (list[int], [Number.ONE], [1]),
    (float, Number.ONE, 1.0),
    (list[float], [1, 2.5, True], [1.0, 2.5, 1.0]),
    (float, 2**53, float(2**53)),
    (float, -(2**53), -float(2**53)),
    (float, numpy.float32(0.5), 0.5),
    (int, numpy.uint8(7), 7),
    (bool, numpy.bool_(True), True),
    (str, numpy.str_("x"), "x"),
    (str, Word.HELLO, "hi"),
    (list[str], [Word.HELLO, "x"], ["hi", "x"]),
    (dict[str, str], {Word.HELLO: Word.HELLO}, {"hi": "hi"}),
    (list[str | None], [None, "x"], [None, "x"]),
    (dict[str, int | None], {"a": None}, {"a": None}),
    (int, pa.scalar(5), 5),
    (list[int], pa.array([5]), [5]),
    (Annotated[str, Arrow(pa.dictionary(pa.int8(), pa.utf8()))], pa.scalar("x"), "x"),
    (dt.datetime, numpy.datetime64("2020-01-02T12:00:00.000005"), NOON),
    (Annotated[Color, Arrow(pa.utf8())], Color.RED, Color.RED),
    (Annotated[list[float], Arrow(pa.large_list(pa.float32()))], [1, 0.5], [1.0, 0.5]),
    (Annotated[list[float], Arrow(pa.list_(pa.float64(), 2))], (1, 2), [1.0, 2.0]),
    (Annotated[dict[str, int], Arrow(pa.map_(pa.large_utf8(), pa.int8()))], {"a": 1}, {"a": 1}),
    (Annotated[int, Arrow(pa.run_end_encoded(pa.int32(), pa.int64()))], 5, 5),
    (list[int], [1.0, 2], [1, 2]),
    (float, 3, 3.0),
    (float, True, 1.0),
    (bytes, bytearray(b"x"), b"x"),
    (bytes, memoryview(b"x"), b"x"),
    (Color, "RED", Color.RED),
    (Color, "r", Color.RED),
    (Word, "hi", Word.HELLO),
    (list[int], (1, 2), [1, 2]),
    (list[int], range(3), [0, 1, 2]),
    (list[int], {1}, [1]),
    (list[str], ("a",), ["a"]),
    (frozenset[int], [1, 1], frozenset({1})),
    (set[int], (1, 2), {1, 2}),
    (dict[str, int], [("a", 1)], {"a": 1}),
    (dict[str, int], [("a", 1), ("a", 2)], {"a": 2}),
    (Point, Wide(1, 2.0, "w"), Point(1, 2.0)),
    (list[Point], [Wide(1, 2.0, "w")], [Point(1, 2.0)]),
    (list[Point], [{"x": 1, "y": 2.0}], [Point(1, 2.0)]),
    (Annotated[float, Arrow(pa.float32())], 1.1, 1.100000023841858),
    (Annotated[float, Arrow(pa.float32())], 1e39, math.inf),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], decimal.Decimal("1.5"), decimal.Decimal("1.50")),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], 3, decimal.Decimal("3.00")),
    (Annotated[dict, Arrow(pa.struct([("a", pa.int64()), ("b", pa.utf8())]))], {"a": 1, "c": 2}, {"a": 1, "b": None}),
    (UTC, NOON.replace(tzinfo=EAST), NOON.replace(tzinfo=EAST)),
]


@pytest.mark.parametrize(("annotation", "value", "arrives"), LENIENT)
def test_leniency(annotation: Any, value: Any, arrives: Any) -> None:
    found = through(annotation, value)
    assert found == arrives
    assert type(found) is type(arrives)


REFUSED_VALUES: list[tuple[Any, Any]] = [
    (int, 1.5),
    (int, True),
    (int, "3"),
    (int, 2**63),
    (int, -(2**63) - 1),
    (int, math.nan),
    (int, math.inf),
    (int, decimal.Decimal("1.5")),
    (int, decimal.Decimal("1e999999999")),
    (int, decimal.Decimal("1e-999999999")),
    (int, decimal.Decimal("NaN")),
    (int, 2.0**70),
    (float, -(2**53) - 1),
    (Annotated[float, Arrow(pa.float32())], 2**24 + 1),
    (str, b"utf8"),
    (str, Color.RED),
    (int, pa.scalar(None)),
    (int, pa.scalar("x")),
    (Annotated[str, Arrow(pa.dictionary(pa.int8(), pa.utf8()))], pa.scalar(1)),
    (bytes, "text"),
    (list[str], "abc"),
    (set[str], "abc"),
    (frozenset[str], "abc"),
    (list[int], b"abc"),
    (list[int], bytearray(b"abc")),
    (list[str], {"a": 1}),
    (list[list[str]], ["abc"]),
    (dict[str, str], "abc"),
    (dict[str, str], ["ab"]),
    (dict[str, str], [("a", "b", "c")]),
    (dict[str, int], [None]),
    (dict[str, int], [("a", 1), None]),
    (dict[str, int], [(None, 1)]),
    (list[dict[str, int]], [[("a", 1), None]]),
    (list[int], [None]),
    (set[int], {None}),
    (dict[str, int], {"a": None}),
    (list[list[int] | None], [[None]]),
    (list[Point], [None]),
    (list[Color], [None]),
    (Point, Point(None)),
    (list[Point], [{"y": 1.0}]),
    (dt.datetime, 5),
    (dt.date, 5),
    (dt.time, 5),
    (dt.timedelta, 5),
    (dt.datetime, dt.date(2020, 1, 1)),
    (dt.date, NOON),
    (dt.datetime, numpy.datetime64("NaT", "us")),
    (UTC, NOON),
    (NAIVE, NOON.replace(tzinfo=EAST)),
    (dt.time, dt.time(12, tzinfo=EAST)),
    (list[int], [1, 1.5]),
    (Annotated[int, Arrow(pa.int8())], 128),
    (Annotated[int, Arrow(pa.int8())], 1.5),
    (float, "1"),
    (float, decimal.Decimal(1)),
    (float, 2**53 + 1),
    (bool, 1),
    (bool, 0),
    (bool, "true"),
    (str, 1),
    (str, b"\xff"),
    (bytes, 1),
    (Color, 3),
    (Color, b"RED"),
    (Color, Word.HELLO),
    (Color, ["RED"]),
    (Perm, Perm.READ | Perm.WRITE),
    (Perm, Perm(0)),
    (list[int], ["x"]),
    (list[int], 5),
    (list[str], [1]),
    (dict[str, int], {1: 1}),
    (dict[str, int], {None: 1}),
    (dict[str, int], {"a": 1.5}),
    (list[int], [True]),
    (dict[str, int], {"a": "x"}),
    (dict[str, int], 5),
    (Point, {"x": 1}),
    (Point, 5),
    (Point, V1(1, "x")),
    (Point, Point("x")),
    (list[Point], [V1(1, "x")]),
    (pa.Schema, b"x"),
    (pa.RecordBatch, SCHEMA),
    (Annotated[bytes, Arrow(pa.binary(4))], b"12345"),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], decimal.Decimal("1.555")),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], decimal.Decimal("1000000")),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], 1.5),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], True),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], decimal.Decimal("Infinity")),
    (Annotated[decimal.Decimal, Arrow(pa.decimal128(5, 2))], decimal.Decimal("sNaN")),
    (Annotated[dict[str, Any], Arrow(pa.struct([pa.field("a", pa.int64(), nullable=False)]))], {}),
    (Annotated[dict[str, Any], Arrow(pa.struct([("a", pa.int64())]))], [("a", 1)]),
]


@pytest.mark.parametrize(("annotation", "value"), REFUSED_VALUES)
def test_values_that_do_not_fit(annotation: Any, value: Any) -> None:
    """Already on the sending side: nothing of it reaches the wire."""
    codec = core._types_codec(annotation, top=True)
    with pytest.raises((TypeError, ValueError, KeyError, OverflowError, pa.ArrowException)):
        core._types_cell(value, codec)


@pytest.mark.parametrize(
    ("annotation", "value", "says"),
    [
        (list[int], [1, "x"], "expected int, got 'x', in element 1"),
        (dict[str, list[int]], {"a": [1], "b": [1.5]}, "expected int, got 1.5, in element 0, in entry 1"),
        (list[str], "abc", "expected a list, got 'abc'"),
        (list[Point], [Point(None)], "got None; annotate T | None to allow it, in field Point.x, in element 0"),
        (float, 2**60, "expected float, got an int beyond 9007199254740992, which it may not hold exactly"),
        (UTC, NOON, "the type of this datetime has a zone; give it a tzinfo"),
        (dt.date, NOON, "expected date, got datetime"),
        (Color, 3, "expected Color, got int"),
        (pa.Schema, b"", "expected Schema, got bytes"),
    ],
)
def test_what_a_refusal_says(annotation: Any, value: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        core._types_codec(annotation, top=True).encode(value)
    assert ", ".join([str(caught.value), *getattr(caught.value, "__notes__", ())]) == says


def test_huge_numbers_do_not_cost_their_digits() -> None:
    """Some would take minutes or gigabytes to become an int."""
    for text in ("1e999999999", "-1e999999999", "1e-999999999"):
        for dtype in (
            pa.int64(),
            pa.float64(),
            pa.decimal128(38, 2),
            pa.timestamp("us"),
            pa.date32(),
            pa.duration("s"),
        ):
            with pytest.raises((TypeError, ValueError)):
                core._types_cell(decimal.Decimal(text), core._types_raw(dtype))


DECIMALS = [pa.decimal128(5, 2), pa.decimal128(38, -10), pa.decimal256(76, 10), pa.decimal256(76, -70)]


@pytest.mark.parametrize("dtype", DECIMALS, ids=str)
@pytest.mark.parametrize("text", ["0", "-0e-999999", "0e999999", "7e70", "123.45", "-1.50000", "99999", "1e-400"])
def test_decimals_are_exact_or_refused(dtype: Any, text: str) -> None:
    value = decimal.Decimal(text)
    try:
        found = core._types_cell(value, core._types_raw(dtype))[0].as_py()
    except ValueError:
        with decimal.localcontext(prec=1000):
            scaled = value.scaleb(dtype.scale)
            assert scaled != scaled.to_integral_value() or abs(scaled) >= decimal.Decimal(10) ** dtype.precision
    else:
        assert found == value


# ---- pyarrow ends the process for some values; the codec of a type alone lets none of them pass

FATAL = """
import decimal, sys
import pyarrow as pa
core = __import__(sys.argv[1], fromlist=["_"])
text, pairs = pa.utf8(), pa.map_(pa.utf8(), pa.int64())
small = decimal.Decimal("1e-999999999")
money = pa.decimal128(38, 2)
class Shrinks:
    def __init__(self, values): self.values = values
    def __index__(self): self.values.clear(); return 1
class Long(list):
    def __len__(self): return 10**9
shrinking = [1, 2, 3]
shrinking.insert(0, Shrinks(shrinking))
def nested(dtype, value):
    yield dtype, value
    yield pa.list_(dtype), [value]
    yield pa.large_list(dtype), [value]
    yield pa.list_view(dtype), [value]
    yield pa.struct([("a", dtype)]), {"a": value}
    yield pa.map_(text, dtype), {"a": value}
    yield pa.list_(pa.struct([("a", pa.map_(text, pa.list_(dtype)))])), [{"a": {"b": [value]}}]
cases = [(pairs, [None]), (pairs, [("a", 1), None]), (pairs, [pa.scalar(None)]), (pairs, [("a",)]), (pairs, ["ab"])]
cases += [(money, small), (pa.decimal256(76, 3), small), (money, pa.scalar(None)), (pa.list_(pa.int64()), shrinking)]
cases += [(pa.dictionary(pa.int8(), text), pa.scalar(1)), (pa.list_(pa.int64()), Long([None, "x"]))]
for dtype, value in cases:
    for of, given in nested(dtype, value):
        schema = pa.schema([("c", of)])
        sends = [lambda: core._types_cell(given, core._types_raw(of))]
        if core._ipc_holds(of, core._types_is_risky):
            sends.append(lambda: core.AnnotatedBatch.from_pydict({"c": [given]}, schema))
        for send in sends:
            print(of, file=sys.stderr)
            try:
                send()
            except (TypeError, ValueError):
                continue
            sys.exit(f"{of} took {given!r}")
print("alive")
"""


def test_values_that_end_the_process_are_refused() -> None:
    ran = subprocess.run([sys.executable, "-c", FATAL, core.__name__], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "alive\n"), ran.stderr[-2000:]


def test_columns_without_risk_are_not_looked_at() -> None:
    """`emit_pydict` hands them to pyarrow as they are."""
    data = {"a": range(3), "b": pa.array([[("k", 1)]] * 3, pa.map_(pa.utf8(), pa.int64()))}
    schema = pa.schema([("a", pa.int64()), ("b", pa.map_(pa.utf8(), pa.int64()))])
    assert core._types_checked(data, schema) == data
    assert core._types_checked({"a": range(3), "b": [{"k": 1}]}, schema) == {"a": range(3), "b": [[("k", 1)]]}
    with pytest.raises(TypeError, match="pair of key and value"):
        core.AnnotatedBatch.from_pydict({"a": [1], "b": [[None]]}, schema)


def test_outcomes_do_not_depend_on_history() -> None:
    """Equal types that are not the same object: nothing is cast for them, the second time neither."""
    for _ in range(3):
        dtype = pa.list_(pa.struct([("a", pa.map_(pa.utf8(), pa.list_view(pa.int64())))]))
        assert core._types_cell([{"a": {"k": [1]}}], core._types_raw(dtype))[0].as_py() == [{"a": [("k", [1])]}]


@pytest.mark.parametrize("dtype", [pa.list_(pa.uuid()), pa.map_(pa.utf8(), pa.uuid()), pa.struct([("a", pa.uuid())])])
def test_nested_extension_types(dtype: Any) -> None:
    one = uuid.UUID(int=5)
    value: Any = [one] if pa.types.is_list(dtype) else {"a": one}
    array = core._types_cell(value, core._types_raw(dtype))
    assert array.type == dtype
    assert str(one) in str(array[0].as_py()).replace("UUID", "")


def test_unknown_enum_text_is_sent_and_refused_by_the_reader() -> None:
    assert core._types_codec(Color, top=True).encode("purple") == "purple"
    with pytest.raises(KeyError, match="'purple' is not a valid Color name or value"):
        through(Color, "purple")


def test_flag_combination_text() -> None:
    with pytest.raises(KeyError, match=r"is not a valid Perm name or value"):
        core._types_codec(Perm, top=True).encode(Perm.READ | Perm.WRITE)


# ---- receiving (types.md section 4)


@pytest.mark.parametrize(
    ("raw", "member"), [("RED", Color.RED), ("r", Color.RED), ("GREEN", Color.GREEN), ("AZURE", Color.BLUE)]
)
def test_enum_by_name_then_value(raw: str, member: Color) -> None:
    assert core._types_codec(Color, top=True).decode(raw) is member


@pytest.mark.parametrize("raw", [3, b"RED", 1.0, ["RED"]])
def test_enum_wants_text(raw: Any) -> None:
    with pytest.raises(TypeError):
        core._types_codec(Color, top=True).decode(raw)


@pytest.mark.parametrize("raw", ["x", 1, [1]])
def test_dataclass_wants_bytes(raw: Any) -> None:
    with pytest.raises(TypeError, match=f"^Expected bytes for Point deserialization, got {type(raw).__name__}$"):
        core._types_codec(Point, top=True).decode(raw)


def test_dataclass_parameter_refuses_no_bytes() -> None:
    with pytest.raises(pa.ArrowInvalid):
        core._types_codec(Point, top=True).decode(b"")


@pytest.mark.parametrize("annotation", [pa.Schema, pa.RecordBatch])
def test_no_bytes_means_absent(annotation: Any) -> None:
    assert core._types_codec(annotation, top=True).decode(b"") is None


def test_foreign_types_that_can_read_themselves() -> None:
    seen: list[Any] = []

    class Foreign:
        def serialize_to_bytes(self) -> bytes:
            return b"me"

        @classmethod
        def deserialize_from_bytes(cls, data: bytes, validation: Any) -> Foreign:
            seen.append((data, validation))
            return cls()

    annotation = Annotated[Foreign, Arrow(pa.binary())]
    assert isinstance(through(annotation, Foreign()), Foreign)
    assert seen == [(b"me", core.IpcValidation.FULL)]
    with pytest.raises(TypeError, match="Expected bytes for Foreign deserialization, got str"):
        core._types_codec(annotation, top=True).decode("me")


@pytest.mark.parametrize(
    ("annotation", "value", "found"),
    [
        (Annotated[tuple, Arrow(pa.list_(pa.int64()))], (1, 2), [1, 2]),
        (Annotated[set, Arrow(pa.list_(pa.int64()))], {1}, [1]),
    ],
)
def test_marked_collections_come_back_as_lists(annotation: Any, value: Any, found: Any) -> None:
    assert through(annotation, value) == found


# ---- markers


def test_markers_are_frozen_and_hashable() -> None:
    assert Arrow(pa.int8()) == Arrow(pa.int8(), None)
    assert hash(Arrow(pa.int8())) == hash(Arrow(pa.int8()))
    assert Arrow(pa.int8()) != Arrow(pa.int8(), True)
    assert Arrow(pa.int8()) != Arrow(pa.int16())
    assert Arrow(pa.int8()) != pa.int8()
    assert (Arrow(pa.int8(), nullable=True).arrow_type, Arrow(pa.int8(), nullable=True).nullable) == (pa.int8(), True)
    with pytest.raises(AttributeError):
        Arrow(pa.int8()).nullable = True
    assert core.Transient() == core.Transient()
    assert hash(core.Transient()) == hash(core.Transient())
    assert core.Transient() != Arrow(pa.int8())
    with pytest.raises(AttributeError):
        core.Transient().x = 1


# ---- dataclasses


@dataclass(frozen=True)
class Full(Base):
    CONSTANT: ClassVar[int] = 5
    a: int
    s: str | None = None
    tags: list[str] = field(default_factory=list)
    color: Color = Color.RED
    point: Point = Point(9)
    points: list[Point] = field(default_factory=list)
    packed: Annotated[Point | None, Arrow(pa.binary())] = None
    small: Annotated[int, Arrow(pa.int8())] = 1
    schema: pa.Schema | None = None
    batch: pa.RecordBatch | None = None
    cache: Annotated[dict[str, Any], core.Transient()] = field(default_factory=dict)


def test_schema_of_a_dataclass() -> None:
    assert Full.ARROW_SCHEMA.equals(
        pa.schema(
            [
                pa.field("a", pa.int64(), nullable=False),
                pa.field("s", pa.utf8()),
                pa.field("tags", pa.list_(pa.utf8()), nullable=False),
                pa.field("color", ENUM, nullable=False),
                pa.field("point", POINT, nullable=False),
                pa.field("points", pa.list_(POINT), nullable=False),
                pa.field("packed", pa.binary()),
                pa.field("small", pa.int8(), nullable=False),
                pa.field("schema", pa.binary()),
                pa.field("batch", pa.binary()),
            ]
        )
    )
    assert Full.ARROW_SCHEMA is Full.ARROW_SCHEMA
    assert Full(1).ARROW_SCHEMA is Full.ARROW_SCHEMA


FULLS = [
    Full(1),
    Full(2, "s", ["a"], Color.BLUE, Point(3), [Point(4), Point(5)], Point(6), -128, SCHEMA, BATCH),
]


@pytest.mark.parametrize("value", FULLS)
def test_dataclass_round_trips(value: Full) -> None:
    assert Full.deserialize_from_bytes(value.serialize_to_bytes()) == value
    sink = io.BytesIO()
    value.serialize(sink)
    assert sink.getvalue() == value.serialize_to_bytes()
    batch, metadata = core.deserialize_record_batch(sink.getvalue())
    assert metadata is None
    assert Full.deserialize_from_batch(batch) == value
    assert Full.deserialize_from_batch(batch, pa.KeyValueMetadata({"a": "b"})) == value


def test_sizes_on_the_wire() -> None:
    assert len(V1(a=1, b="x").serialize_to_bytes()) == 416
    assert len(Empty().serialize_to_bytes()) == 136


def test_form_on_the_wire() -> None:
    reader = ipc.open_stream(V1(1, "x").serialize_to_bytes())
    batch, metadata = reader.read_next_batch_with_custom_metadata()
    assert metadata is None
    assert batch.to_pylist() == [{"a": 1, "b": "x"}]
    with pytest.raises(StopIteration):
        reader.read_next_batch()


def test_none_in_a_required_column_is_not_written() -> None:
    with pytest.raises(TypeError, match="got None; annotate") as caught:
        V1(1, None).serialize_to_bytes()  # type: ignore[arg-type]
    assert caught.value.__notes__ == ["in field V1.b"]


@pytest.mark.parametrize("annotation", [bytes, Annotated[object, Arrow(pa.binary())]], ids=str)
def test_objects_that_serialise_themselves_are_written_as_bytes(annotation: Any) -> None:
    cls = dataclasses.make_dataclass("Made", [("f", annotation)], bases=(Base,))
    assert cls.deserialize_from_bytes(cls(Point(1)).serialize_to_bytes()).f == Point(1).serialize_to_bytes()


def test_values_that_do_not_fit_name_the_field() -> None:
    with pytest.raises((TypeError, pa.ArrowException)) as caught:
        V1("x", "y").serialize_to_bytes()
    assert caught.value.__notes__ == ["in field V1.a"]


def test_schema_is_never_inherited() -> None:
    assert Point.ARROW_SCHEMA.names == ["x", "y"]
    assert Wide.ARROW_SCHEMA.names == ["x", "y", "z"]
    assert Wide.deserialize_from_bytes(Wide(1, 2.0, "w").serialize_to_bytes()) == Wide(1, 2.0, "w")


@dataclass
class Mutable(Base):
    x: int
    y: int = field(kw_only=True)


def test_mutable_and_keyword_only() -> None:
    assert Mutable.deserialize_from_bytes(Mutable(1, y=2).serialize_to_bytes()) == Mutable(1, y=2)


@dataclass(frozen=True, slots=True)
class Slotted(Base):
    x: int
    y: str = "d"


def test_slotted_dataclass() -> None:
    assert Slotted.deserialize_from_bytes(Slotted(1, "a").serialize_to_bytes()) == Slotted(1, "a")


@dataclass(frozen=True)
class Forced(Base):
    a: int
    b: int | None = None
    _ARROW_FIELD_OVERRIDES: ClassVar[dict[str, pa.DataType]] = {"a": pa.int8(), "b": pa.uint32()}


def test_overrides_keep_the_nullability_of_the_annotation() -> None:
    assert Forced.ARROW_SCHEMA.equals(pa.schema([pa.field("a", pa.int8(), nullable=False), ("b", pa.uint32())]))
    assert Forced.deserialize_from_bytes(Forced(1, 2).serialize_to_bytes()) == Forced(1, 2)


@dataclass(frozen=True)
class ForcedObject(Base):
    a: object
    _ARROW_FIELD_OVERRIDES: ClassVar[dict[str, pa.DataType]] = {"a": pa.utf8()}


def test_override_makes_any_annotation_possible() -> None:
    assert ForcedObject.deserialize_from_bytes(ForcedObject("x").serialize_to_bytes()) == ForcedObject("x")


@dataclass
class WithTransient(Base):
    a: int
    t: Annotated[int, core.Transient()] = 7
    u: Annotated[list[object], core.Transient()] = field(default_factory=list)


def test_transient_fields_are_not_sent_and_take_their_default() -> None:
    assert WithTransient.ARROW_SCHEMA.names == ["a"]
    assert WithTransient.deserialize_from_bytes(WithTransient(1, 2, [object()]).serialize_to_bytes()) == WithTransient(
        1
    )


@dataclass
class TransientOptional(Base):
    t: Annotated[object, core.Transient()] | None = None


def test_transient_marker_may_stand_inside_an_optional() -> None:
    assert TransientOptional.ARROW_SCHEMA.names == []
    assert TransientOptional.deserialize_from_bytes(TransientOptional(3).serialize_to_bytes()) == TransientOptional()


def test_transient_ignores_what_arrives() -> None:
    batch = pa.record_batch({"a": [1], "t": [99]})
    assert WithTransient.deserialize_from_batch(batch) == WithTransient(1)


def test_transient_without_a_default() -> None:
    cls = dataclasses.make_dataclass("X", [("t", Annotated[int, core.Transient()])], bases=(Base,))
    with pytest.raises(TypeError, match=r"^Transient field X\.t must have a default value or default_factory$"):
        _ = cls.ARROW_SCHEMA


@dataclass
class Recursive(Base):
    child: Recursive | None = None


@dataclass
class Left(Base):
    right: list[Right]


@dataclass
class Right(Base):
    left: Left | None = None


@pytest.mark.parametrize(("cls", "field_name"), [(Recursive, "Recursive.child"), (Left, "Left.right")])
@pytest.mark.parametrize("attempt", [1, 2])
def test_recursive_classes_are_refused_clearly(cls: Any, field_name: str, attempt: int) -> None:
    with pytest.raises(TypeError, match="cannot be recursive") as caught:
        _ = cls.ARROW_SCHEMA
    assert str(caught.value).startswith(f"Cannot generate Arrow schema for {field_name}: ")
    assert len(str(caught.value)) < 300


@dataclass
class Computed(Base):
    a: int
    double: int = field(init=False)
    label: str = field(init=False, default="l")

    def __post_init__(self) -> None:
        self.double = self.a * 2


@dataclass(frozen=True)
class FrozenComputed(Base):
    a: int
    double: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "double", self.a * 2)


@pytest.mark.parametrize("cls", [Computed, FrozenComputed])
def test_fields_without_init_are_handled(cls: Any) -> None:
    assert cls.deserialize_from_bytes(cls(3).serialize_to_bytes()) == cls(3)


@dataclass
class Kelvin(Base):
    degrees: float
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.degrees += 273.15
        self.seen.append("post_init")


@dataclass(frozen=True, slots=True)
class FrozenKelvin(Base):
    degrees: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "degrees", self.degrees + 273.15)


@dataclass(kw_only=True)
class KelvinAt(Kelvin):
    place: str = "here"
    scale: dataclasses.InitVar[int] = 1
    cache: Annotated[dict[str, int], core.Transient()] = field(default_factory=dict)

    def __post_init__(self, scale: int) -> None:
        self.degrees = self.degrees * scale + 273.15


@pytest.mark.parametrize("value", [Kelvin(1.0), FrozenKelvin(1.0), KelvinAt(degrees=1.0, scale=2, cache={"a": 1})])
def test_reading_puts_fields_back_and_runs_no_code_of_the_class(value: Any) -> None:
    found = type(value).deserialize_from_bytes(value.serialize_to_bytes())
    assert [getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "cache"] == [
        getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "cache"
    ]
    assert getattr(found, "cache", {}) == {}
    assert type(value).deserialize_from_batch(core._types_row_batch(value)).degrees == value.degrees


@dataclass
class Guarded(Base):
    a: int

    def __init__(self) -> None:
        raise LookupError("only for callers")


def test_a_constructor_of_its_own_is_not_asked() -> None:
    assert Guarded.deserialize_from_batch(pa.record_batch({"a": [-1]})).a == -1


def test_transient_without_init_needs_a_default_too() -> None:
    made = [("t", Annotated[int, core.Transient()], field(init=False))]
    with pytest.raises(TypeError, match=r"^Transient field X\.t must have a default value or default_factory$"):
        _ = dataclasses.make_dataclass("X", made, bases=(Base,)).ARROW_SCHEMA


class Undecorated(V1):
    z: int = 3


class Below(Undecorated):
    pass


class Harmless(V1):
    LIMIT: ClassVar[int] = 3
    other = 4


@pytest.mark.parametrize("cls", [Undecorated, Below])
def test_a_subclass_without_decorator_is_refused_by_name(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"^Undecorated\.z would not be sent: Undecorated is no @dataclass; add it$"):
        cls(1, "x").serialize_to_bytes()


def test_a_subclass_that_adds_no_fields_needs_no_decorator() -> None:
    value = Harmless(1, "x")
    assert type(Harmless.deserialize_from_bytes(value.serialize_to_bytes())) is Harmless


def test_local_classes_of_a_module_with_future_annotations() -> None:
    @dataclass
    class Inner(Base):
        x: int

    @dataclass
    class Outer(Base):
        inner: Inner

    class Service(typing.Protocol):
        def take(self, inner: Inner) -> int: ...

    for make, name in (
        (lambda: Outer.ARROW_SCHEMA, "Outer"),
        (lambda: core.rpc_methods(Service), r"Service\.take\(\)"),
    ):
        with pytest.raises(TypeError, match=rf"^Failed to resolve type hints for {name}: .*'Inner'.*module level"):
            make()


class Alias:
    """What `type X = ...` makes, from 3.12 on."""

    def __init__(self, name: str, value: Any = None, *parameters: Any) -> None:
        self.__name__ = name
        self.__value__ = self if value is None else value
        self.__type_params__ = parameters

    def __getitem__(self, args: Any) -> Any:
        return types.GenericAlias(self, args)  # type: ignore[arg-type]


K, V = typing.TypeVar("K"), typing.TypeVar("V")
JSON = Alias("JSON")
JSON.__value__ = list[JSON]  # type: ignore[valid-type]


@pytest.mark.parametrize(
    ("alias", "same"),
    [
        (Alias("A", int), int),
        (Alias("A", int | None), int | None),
        (Alias("A", Alias("B", dict[str, int])), dict[str, int]),
        (Annotated[Alias("A", int), Arrow(pa.int8())], Annotated[int, Arrow(pa.int8())]),
        (list[Alias("A", str)], list[str]),  # type: ignore[misc]
        (Alias("A", dict[V, K], K, V)[int, str], dict[str, int]),
        (Alias("A", int, K)[str], int),
    ],
)
def test_type_aliases(alias: Any, same: Any) -> None:
    assert core._types_field("f", alias, top=True).equals(core._types_field("f", same, top=True))


@pytest.mark.parametrize("alias", [Alias("Self"), JSON])
def test_aliases_of_themselves_are_refused(alias: Any) -> None:
    with pytest.raises(TypeError, match=r"Cannot infer|cannot be recursive"):
        core._types_field("f", alias, top=True)


# ---- reading and evolution


@dataclass(frozen=True)
class V2(Base):
    a: int
    b: str = "b0"
    c: list[int] = field(default_factory=lambda: [7])
    d: int | None = 4


@dataclass(frozen=True)
class Outer(Base):
    inner: V2
    inners: list[V2] = field(default_factory=list)


EVOLUTION: list[tuple[str, dict[str, Any], Any]] = [
    ("all", {"a": [1], "b": ["x"], "c": [[1]], "d": [2]}, V2(1, "x", [1], 2)),
    ("missing take defaults", {"a": [1]}, V2(1)),
    ("unknown ignored", {"a": [1], "zzz": ["?"]}, V2(1)),
    ("another order", {"d": [2], "c": [[1]], "b": ["x"], "a": [1]}, V2(1, "x", [1], 2)),
    ("narrower type", {"a": pa.array([1], pa.int32())}, V2(1)),
    ("wider type", {"a": [1], "b": pa.array(["x"], pa.large_utf8())}, V2(1, "x")),
    ("null where not allowed", {"a": pa.array([None], pa.int64()), "b": pa.array([None], pa.utf8())}, V2(None, None)),
    ("null of an optional", {"a": [1], "d": pa.array([None], pa.int64())}, V2(1, d=None)),
]


@pytest.mark.parametrize(("name", "columns", "expected"), EVOLUTION, ids=[row[0] for row in EVOLUTION])
def test_evolution(name: str, columns: dict[str, Any], expected: V2) -> None:
    batch = pa.record_batch(columns)
    assert V2.deserialize_from_batch(batch) == expected
    assert V2.deserialize_from_bytes(core.serialize_record_batch_bytes(batch)) == expected


def test_default_factories_are_not_shared() -> None:
    batch = pa.record_batch({"a": [1]})
    assert V2.deserialize_from_batch(batch).c is not V2.deserialize_from_batch(batch).c


@dataclass
class Three(Base):
    a: int
    b: int
    z: int


def test_missing_columns_without_default() -> None:
    with pytest.raises(ValueError) as caught:
        Three.deserialize_from_batch(pa.record_batch({"a": [1], "b": [2]}))
    assert str(caught.value) == "Missing fields in Three RecordBatch: ['z']. Found: ['a', 'b']"


def test_row_counts() -> None:
    with pytest.raises(ValueError, match=r"^Cannot deserialize V2 from empty RecordBatch$"):
        V2.deserialize_from_batch(pa.record_batch({"a": pa.array([], pa.int64())}))
    with pytest.raises(ValueError, match=r"^Expected single-row RecordBatch for V2 deserialization, got 2 rows$"):
        V2.deserialize_from_batch(pa.record_batch({"a": [1, 2]}))


def stream(schema: pa.Schema, *batches: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_a_stream_holds_one_batch_and_nothing_follows_it() -> None:
    batch = pa.record_batch({"a": [1]})
    good = stream(batch.schema, batch)
    assert V2.deserialize_from_bytes(good) == V2.deserialize_from_bytes(good[:-8]) == V2(1)  # an end may be left out
    with pytest.raises(ValueError, match="holds more"):
        V2.deserialize_from_bytes(stream(batch.schema, batch, batch))
    for tail in (b"x", good, b"\0" * 8):
        with pytest.raises(pa.ArrowInvalid):
            V2.deserialize_from_bytes(good + tail)
    with pytest.raises(ValueError, match="holds more"):
        core._types_codec(pa.RecordBatch, top=True).decode(stream(batch.schema, batch, batch))


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array(["1"]), "column 'a' is string"),
        (pa.array([1.0]), "column 'a' is double"),
        (pa.array([[None]]), "column 'a' is list<item: null>"),
        (pa.array([2**63], pa.uint64()), "does not fit"),
    ],
)
def test_columns_of_another_type_are_refused_before_they_are_read(column: Any, says: str) -> None:
    batch = pa.RecordBatch.from_arrays([column], names=["a"])
    for read in (
        lambda: V2.deserialize_from_batch(batch),
        lambda: V2.deserialize_from_bytes(stream(batch.schema, batch)),
    ):
        with pytest.raises(TypeError, match=r"^V2\.a: ") as caught:
            read()
        assert says in str(caught.value)


def test_what_a_column_unfolds_into_is_counted() -> None:
    nothing = pa.array([None], pa.list_(pa.null(), 2**31 - 1))
    bomb = pa.RecordBatch.from_arrays([nothing], names=["c"])
    with pytest.raises(core.IPCError, match="unfold"):
        V2.deserialize_from_batch(pa.record_batch({"a": [1], "c": nothing}))
    cls = dataclasses.make_dataclass("Made", [("c", Annotated[Any, Arrow(nothing.type)])], bases=(Base,))
    with pytest.raises(core.IPCError, match="unfold"):
        cls.deserialize_from_batch(bomb)


def test_repeated_columns_are_refused() -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ValueError, match="Repeated columns in V2"):
        V2.deserialize_from_batch(batch)


def test_a_schema_is_one_message() -> None:
    decode, data = core._types_codec(pa.Schema, top=True).decode, SCHEMA.serialize().to_pybytes()
    assert decode(data) == decode(stream(SCHEMA)) == SCHEMA
    wide = pa.schema([(f"c{i}", pa.int8()) for i in range(20_000)]).serialize().to_pybytes()
    for bad in (data[:-8], data + data, wide, b"x", data[8:]):
        with pytest.raises((pa.ArrowInvalid, core.IPCError)):
            decode(bad)


def test_stream_without_a_batch() -> None:
    with pytest.raises(ValueError, match="empty RecordBatch"):
        V2.deserialize_from_bytes(stream(V2.ARROW_SCHEMA))
    assert Empty.deserialize_from_bytes(stream(Empty.ARROW_SCHEMA)) == Empty()


def test_no_bytes_take_the_defaults() -> None:
    cls = dataclasses.make_dataclass("Made", [("a", int, 5)], bases=(Base,))
    assert cls.deserialize_from_bytes(b"") == cls(5)
    assert Empty.deserialize_from_bytes(b"") == Empty()
    with pytest.raises(ValueError, match=r"^Missing fields in V2 RecordBatch: \['a'\]\. Found: \[\]$"):
        V2.deserialize_from_bytes(b"")


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_batch_without_columns_takes_the_defaults(rows: int) -> None:
    cls = dataclasses.make_dataclass("Made", [("a", int, 5)], bases=(Base,))
    batch = pa.record_batch({"a": [0] * rows}).select([])
    assert cls.deserialize_from_batch(batch) == cls(5)


@pytest.mark.parametrize(
    ("data", "cls"),
    [
        (b"x", pa.ArrowInvalid),
        (b"garbage, garbage", pa.ArrowInvalid),
        (b"\xff\xff\xff\xff\x10\x00\x00\x00", pa.ArrowInvalid),
        (b"\xff" * 64, pa.ArrowInvalid),  # negative metadata length
    ],
)
def test_garbage(data: bytes, cls: type[Exception]) -> None:
    with pytest.raises(cls):
        V2.deserialize_from_bytes(data)


def test_truncated_stream() -> None:
    data = V1(1, "x").serialize_to_bytes()
    for cut in range(1, len(data) - 8):
        with pytest.raises((pa.ArrowException, OSError, ValueError)):
            V1.deserialize_from_bytes(data[:cut])


def test_nested_struct_members_take_their_defaults() -> None:
    inner = pa.struct([("a", pa.int64()), ("unknown", pa.utf8())])
    batch = pa.record_batch(
        [
            pa.array([{"a": 1, "unknown": "?"}], inner),
            pa.array([[{"a": 2, "unknown": "?"}]], pa.list_(inner)),
        ],
        names=["inner", "inners"],
    )
    assert Outer.deserialize_from_batch(batch) == Outer(V2(1), [V2(2)])


def test_nested_struct_member_without_default_is_named() -> None:
    batch = pa.record_batch([pa.array([{"b": "x"}])], names=["inner"])
    with pytest.raises(ValueError, match=r"Missing fields in V2 RecordBatch: \['a'\]\. Found: \['b'\]"):
        Outer.deserialize_from_batch(batch)


@dataclass(frozen=True)
class Colored(Base):
    color: Color
    by_color: dict[Color, int] = field(default_factory=dict)


def test_unknown_enum_name_in_a_dataclass() -> None:
    with pytest.raises(KeyError, match="'purple' is not a valid Color name or value"):
        Colored.deserialize_from_batch(pa.record_batch({"color": ["purple"]}))
    assert Colored.deserialize_from_batch(pa.record_batch({"color": ["r"]})) == Colored(Color.RED)
    value = Colored(Color.BLUE, {Color.RED: 1, Color.GREEN: 2})
    assert Colored.deserialize_from_bytes(value.serialize_to_bytes()) == value


@dataclass(frozen=True)
class Painted(Base):
    maybe: Colored | None = None
    many: list[Colored | None] = field(default_factory=list)
    named: dict[str, Colored | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Framed(Base):
    painted: Painted = Painted()


RED = Colored(Color.RED, {})
PAINTED = {
    "none": Painted(None),
    "some": Painted(RED, [RED], {"a": RED}),
    "none in a list": Painted(RED, [None]),
    "none and some in a list": Painted(RED, [None, RED]),
    "none in a dict": Painted(RED, [], {"a": None}),
}


@pytest.mark.parametrize("name", PAINTED)
def test_absent_dataclass_with_an_enum(name: str) -> None:
    value = PAINTED[name]
    assert Painted.deserialize_from_bytes(value.serialize_to_bytes()) == value
    assert Framed.deserialize_from_bytes(Framed(value).serialize_to_bytes()) == Framed(value)


def test_absent_dataclass_with_an_enum_as_parameter() -> None:
    assert through(list[Colored | None], [None]) == [None]


@dataclass(frozen=True)
class Plate(Base):
    numbers: list[int]
    by_name: dict[str, Point]


def test_nulls_of_a_peer_are_read_as_they_are() -> None:
    batch = pa.record_batch(
        [pa.array([[1, None]]), pa.array([[("a", None)]], Plate.ARROW_SCHEMA.field("by_name").type)],
        names=["numbers", "by_name"],
    )
    assert Plate.deserialize_from_batch(batch) == Plate([1, None], {"a": None})  # type: ignore[list-item,dict-item]


UNREADABLE = {
    "far timestamp": pa.array([2**62], pa.timestamp("us")),
    "nanoseconds": pa.array([1], pa.timestamp("ns")),
    "far date": pa.array([2**31 - 1], pa.int32()).view(pa.date32()),
    "repeated members": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unknown_columns_are_not_even_converted(name: str) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([1]), UNREADABLE[name]], names=["a", "unknown"])
    assert V2.deserialize_from_batch(batch) == V2(1)


@dataclass(frozen=True)
class Dated(Base):
    day: dt.date = dt.date(2000, 1, 1)
    at: dt.datetime = NOON


@pytest.mark.parametrize(("name", "column"), [("at", "far timestamp"), ("day", "far date")])
def test_dates_beyond_python_are_a_value_error(name: str, column: str) -> None:
    with pytest.raises((ValueError, pa.ArrowException)):
        Dated.deserialize_from_batch(pa.record_batch({name: UNREADABLE[column]}))


@dataclass(frozen=True)
class Blobs(Base):
    blobs: list[Annotated[Point, Arrow(pa.binary())]]
    named: dict[str, Annotated[Point, Arrow(pa.binary())]] = field(default_factory=dict)


def test_packed_elements_of_a_field() -> None:
    value = Blobs([Point(1), Point(2)], {"a": Point(3)})
    assert Blobs.deserialize_from_bytes(value.serialize_to_bytes()) == value
