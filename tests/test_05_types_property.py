"""Room 4, by hypothesis: random annotations and values, random dataclasses, random bytes."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import string
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.core import core

Base = core.ArrowSerializableDataclass
READ_ERRORS = (ValueError, TypeError, KeyError, core.IPCError, pa.ArrowException, OSError)


class Color(enum.Enum):
    RED = "r"
    GREEN = "RED"
    BLUE = 3


class Word(enum.StrEnum):
    HELLO = "hi"
    BYE = "HELLO"


@dataclasses.dataclass(frozen=True)
class Leaf(Base):
    n: int
    s: str | None = None
    c: Color = Color.RED
    many: frozenset[int] = frozenset()


class Kind(NamedTuple):
    """An annotation and the values it may have."""

    annotation: Any
    values: st.SearchStrategy[Any]
    hashable: bool


def marked(base: Any, dtype: pa.DataType) -> Any:
    return Annotated[base, core.ArrowType(dtype)]


INT64 = st.integers(-(2**63), 2**63 - 1)
LEAF = st.builds(Leaf, INT64, st.none() | st.text(), st.sampled_from(Color), st.frozensets(INT64, max_size=3))
SCALARS = [
    Kind(str, st.text(), True),
    Kind(bytes, st.binary(), True),
    Kind(int, INT64, True),
    Kind(float, st.floats(), False),
    Kind(bool, st.booleans(), True),
    Kind(Color, st.sampled_from(Color), True),
    Kind(Word, st.sampled_from(Word), True),
    Kind(Leaf, LEAF, True),
    Kind(marked(Leaf, pa.binary()), LEAF, True),
    Kind(dt.date, st.dates(), True),
    Kind(dt.datetime, st.datetimes(), True),
    Kind(dt.time, st.times(), True),
    Kind(dt.timedelta, st.timedeltas(dt.timedelta(days=-100_000), dt.timedelta(days=100_000)), True),
    Kind(pa.Schema, st.builds(lambda name: pa.schema([(name, pa.int64())]), st.text()), False),
    Kind(marked(int, pa.int8()), st.integers(-128, 127), True),
    Kind(marked(int, pa.uint64()), st.integers(0, 2**64 - 1), True),
    Kind(marked(float, pa.float32()), st.floats(width=32), False),
    Kind(marked(str, pa.large_utf8()), st.text(), True),
    Kind(marked(bytes, pa.binary(3)), st.binary(min_size=3, max_size=3), True),
]


def optional(kind: Kind) -> Kind:
    return Kind(kind.annotation | None, st.none() | kind.values, kind.hashable)


def list_of(kind: Kind) -> Kind:
    return Kind(list[kind.annotation], st.lists(kind.values, max_size=4), False)  # type: ignore[name-defined]


def frozenset_of(kind: Kind) -> Kind:
    return Kind(frozenset[kind.annotation], st.frozensets(kind.values, max_size=4), True)  # type: ignore[name-defined]


def set_of(kind: Kind) -> Kind:
    return Kind(set[kind.annotation], st.sets(kind.values, max_size=4), False)  # type: ignore[name-defined]


def dict_of(key: Kind, value: Kind) -> Kind:
    return Kind(
        dict[key.annotation, value.annotation],  # type: ignore[name-defined]
        st.dictionaries(key.values, value.values, max_size=4),
        False,
    )


HASHABLE = st.recursive(
    st.sampled_from([kind for kind in SCALARS if kind.hashable]),
    lambda inner: inner.map(optional) | inner.map(frozenset_of),
    max_leaves=3,
)
KINDS = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: (
        inner.map(optional)
        | inner.map(list_of)
        | HASHABLE.map(frozenset_of)
        | HASHABLE.map(set_of)
        | st.builds(dict_of, st.sampled_from([kind for kind in SCALARS if kind.hashable]), inner)
    ),
    max_leaves=4,
)


def same(one: Any, other: Any) -> bool:
    """Equality of values and of their types, where nan equals nan."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(key in other and same(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return bool(one == other)


def through(annotation: Any, value: Any, *, top: bool) -> Any:
    column = core._types_field("f", annotation, top=top)
    array = core._types_cell(value, core._types_codec(annotation, top=top))
    assert array.type.equals(column.type)
    array.validate(full=True)
    raw = array[0].as_py()
    decode = core._types_codec(annotation, top=top).decode
    return raw if raw is None or decode is None else decode(raw)


@settings(database=None, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(KINDS, st.booleans(), st.data())
def test_random_values_round_trip(kind: Kind, top: bool, data: st.DataObject) -> None:
    value = data.draw(kind.values)
    assert same(through(kind.annotation, value, top=top), value)


NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=6).map("f_".__add__)
SHAPES = st.dictionaries(NAMES, KINDS, max_size=5)


def made(shape: dict[str, Kind], name: str = "Made") -> Any:
    return dataclasses.make_dataclass(name, [(key, kind.annotation) for key, kind in shape.items()], bases=(Base,))


def drawn(cls: Any, shape: dict[str, Kind], data: st.DataObject) -> Any:
    return cls(**{name: data.draw(kind.values, label=name) for name, kind in shape.items()})


@settings(database=None, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, st.data())
def test_random_dataclasses_round_trip(shape: dict[str, Kind], data: st.DataObject) -> None:
    cls = made(shape)
    value = drawn(cls, shape, data)
    found = cls.deserialize_from_bytes(value.serialize_to_bytes())
    assert same(found, value)
    assert cls.ARROW_SCHEMA.names == list(shape)
    ordered = not any(word in str(kind.annotation) for kind in shape.values() for word in ("set", "Leaf"))  # has a set
    assert not ordered or found.serialize_to_bytes() == value.serialize_to_bytes()


@settings(database=None, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, st.data())
def test_random_dataclasses_nest(shape: dict[str, Kind], data: st.DataObject) -> None:
    inner = made(shape, "Inner")
    fields = [("one", inner), ("maybe", inner | None), ("many", list[inner]), ("named", dict[str, inner])]
    outer = dataclasses.make_dataclass("Outer", fields, bases=(Base,))
    one, two = drawn(inner, shape, data), drawn(inner, shape, data)
    for value in (outer(one, None, [one, two], {"a": two}), outer(one, two, [], {})):
        assert same(outer.deserialize_from_bytes(value.serialize_to_bytes()), value)


@settings(database=None, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, SHAPES, st.randoms(use_true_random=False), st.data())
def test_readers_ignore_unknown_columns_and_order(
    shape: dict[str, Kind], more: dict[str, Kind], random: Any, data: st.DataObject
) -> None:
    both = list({**more, **shape}.items())
    random.shuffle(both)
    value = drawn(made(dict(both)), dict(both), data)
    cls = made(shape)
    found = cls.deserialize_from_bytes(value.serialize_to_bytes())
    assert all(same(getattr(found, name), getattr(value, name)) for name in shape)


@dataclasses.dataclass(frozen=True)
class Rich(Base):
    leaf: Leaf
    leaves: list[Leaf]
    named: dict[str, Leaf | None]
    days: list[dt.date]
    at: dt.datetime
    schema: pa.Schema | None = None
    packed: Annotated[Leaf | None, core.ArrowType(pa.binary())] = None


LEAF_ONE = Leaf(1, "text", Color.BLUE, frozenset({1, 2}))
GOOD = LEAF_ONE.serialize_to_bytes()
RICH = Rich(
    LEAF_ONE,
    [LEAF_ONE, Leaf(2)],
    {"a": LEAF_ONE, "b": None},
    [dt.date(2020, 1, 1)],
    dt.datetime(2020, 1, 1),
    pa.schema([("a", pa.int64())]),
    LEAF_ONE,
).serialize_to_bytes()


@settings(database=None, deadline=None, max_examples=300)
@given(st.binary(max_size=400))
@example(b"")
@example(GOOD[:-1])
@example(b"\xff\xff\xff\xff\x00\x00\x00\x00")
def test_random_bytes_raise_only_the_documented_errors(data: bytes) -> None:
    try:
        found = Leaf.deserialize_from_bytes(data)
    except READ_ERRORS:
        return
    assert isinstance(found, Leaf)


@settings(database=None, deadline=None, max_examples=500)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_streams_raise_only_the_documented_errors(damage: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for position, value in damage:
        data[position] = value
    try:
        found = Leaf.deserialize_from_bytes(bytes(data))
    except READ_ERRORS:
        return
    assert isinstance(found, Leaf)


@settings(database=None, deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(RICH) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_rich_streams_raise_only_the_documented_errors(damage: list[tuple[int, int]]) -> None:
    data = bytearray(RICH)
    for position, value in damage:
        data[position] = value
    try:
        found = Rich.deserialize_from_bytes(bytes(data))
    except READ_ERRORS:
        return
    assert isinstance(found, Rich)


@settings(database=None, deadline=None, max_examples=200)
@given(st.integers(0, len(GOOD)), st.binary(max_size=40))
def test_cut_and_extended_streams_raise_only_the_documented_errors(cut: int, tail: bytes) -> None:
    try:
        found = Leaf.deserialize_from_bytes(GOOD[:cut] + tail)
    except READ_ERRORS:
        return
    assert isinstance(found, Leaf)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.sampled_from(Color),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(database=None, deadline=None, max_examples=300)
@given(KINDS, ANY, st.booleans())
def test_wrong_values_raise_only_ordinary_errors(kind: Kind, value: Any, top: bool) -> None:
    try:
        through(kind.annotation, value, top=top)
    except (*READ_ERRORS, OverflowError, AttributeError):
        return
