"""Room 5 through whole calls: what callers see of values that do not fit, and what arrives of those that do."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import uuid
from typing import Annotated, Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

Base = core.ArrowSerializableDataclass


class Word(enum.StrEnum):
    HELLO = "hi"


class Number(enum.IntEnum):
    TWO = 2


@dataclasses.dataclass
class Row(Base):
    n: int
    s: str = "x"

    def __post_init__(self) -> None:
        self.s += "!"


Money = Annotated[decimal.Decimal, core.ArrowType(pa.decimal128(38, 2))]
Ids = Annotated[list[uuid.UUID], core.ArrowType(pa.list_(pa.uuid()))]
Pairs = Annotated[object, core.ArrowType(pa.map_(pa.utf8(), pa.int64()))]


class Echo(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def text(self, v: str) -> str: ...
    def whole(self, v: int) -> int: ...
    def texts(self, v: list[str]) -> list[str]: ...
    def counts(self, v: dict[str, int]) -> dict[str, int]: ...
    def maybe(self, v: list[int | None]) -> list[int | None]: ...
    def row(self, v: Row) -> Row: ...
    def at(self, v: dt.datetime) -> dt.datetime: ...
    def money(self, v: Money) -> Money: ...
    def ids(self, v: Ids | None) -> Ids | None: ...
    def pairs(self, v: Pairs) -> Pairs: ...


class EchoImpl:
    def add(self, a: float, b: float) -> float:
        return a + b


RESULTS: dict[str, Any] = {}


@pytest.fixture
def echo() -> Any:
    impl = type("Impl", (EchoImpl,), {name: made(name) for name in METHODS})
    with core.serve_pipe(Echo, impl()) as proxy:
        yield proxy
    RESULTS.clear()


METHODS = ("text", "whole", "texts", "counts", "maybe", "row", "at", "money", "ids", "pairs")


def made(name: str) -> Any:
    def method(self: Any, v: Any) -> Any:
        return RESULTS.get(name, lambda value: value)(v)

    return method


FITS: list[tuple[str, Any, Any]] = [
    ("text", Word.HELLO, "hi"),
    ("whole", Number.TWO, 2),
    ("texts", [Word.HELLO, "x"], ["hi", "x"]),
    ("counts", {Word.HELLO: Number.TWO}, {"hi": 2}),
    ("maybe", (None, 1), [None, 1]),
    ("row", Row(1), Row(1)),
    ("money", decimal.Decimal("1.5"), decimal.Decimal("1.50")),
    ("ids", [uuid.UUID(int=5)], [uuid.UUID(int=5)]),
    ("ids", None, None),
    ("pairs", {"a": 1}, [("a", 1)]),
]


@pytest.mark.parametrize(("method", "value", "arrives"), FITS)
def test_what_arrives(echo: Any, method: str, value: Any, arrives: Any) -> None:
    for _ in range(3):  # the first call is not learned yet
        found = getattr(echo, method)(value)
        assert found == arrives
        assert type(found) is type(arrives)


REFUSED: list[tuple[str, Any, str]] = [
    ("text", b"x", "expected str, got bytes"),
    ("whole", 1.5, "expected int, got 1.5"),
    ("texts", "abc", "expected a list, got 'abc'"),
    ("texts", ["a", None], "got None; annotate T | None to allow it, in element 1"),
    ("counts", [None], "expected a pair of key and value, got NoneType, in entry 0"),
    ("counts", {"a": None}, "got None; annotate T | None to allow it, in entry 0"),
    ("row", Row(None), "got None; annotate T | None to allow it, in field Row.n"),  # type: ignore[arg-type]
    ("at", 5, "expected datetime, got int"),
    ("at", dt.datetime(2020, 1, 1, tzinfo=dt.UTC), "has no zone"),
    ("money", decimal.Decimal("1e-999999999"), "expected a number that fits decimal128(38, 2)"),
    ("ids", ["x"], "expected bytes, got 'x', in element 0"),
    ("pairs", [("a", 1), None], "expected a pair of key and value, got NoneType, in entry 1"),
]


@pytest.mark.parametrize(("method", "value", "says"), REFUSED)
def test_what_is_refused_is_not_sent(echo: Any, method: str, value: Any, says: str) -> None:
    with pytest.raises(core.RpcArgumentError) as caught:
        getattr(echo, method)(value)
    assert f"{method}() parameter 'v': " in str(caught.value)
    assert says in str(caught.value)
    assert echo.add(1, 2) == 3.0


@pytest.mark.parametrize(("method", "value", "says"), [row for row in REFUSED if row[0] not in ("row", "ids")])
def test_results_are_looked_at_alike(echo: Any, method: str, value: Any, says: str) -> None:
    RESULTS[method] = lambda _: value
    good = next((given for name, given, _ in FITS if name == method), dt.datetime(2020, 1, 1))
    with pytest.raises(core.RpcError) as caught:
        getattr(echo, method)(good)
    assert f"{method}() must return" in str(caught.value)
    assert says in str(caught.value)
    assert echo.add(1, 2) == 3.0


def test_a_result_that_can_be_iterated_once(echo: Any) -> None:
    RESULTS["maybe"] = lambda v: (each for each in v)
    assert [echo.maybe([1, None, 3]) for _ in range(3)] == [[1, None, 3]] * 3


def test_ints_for_floats_are_the_same_bytes() -> None:
    plan = core._WirePlan(core.rpc_methods(Echo)["add"], "Echo", None)
    pieces = [
        b"".join(core._ipc_pieces(core._wire_request(plan, values))) for values in ((1.0, 2.0), (1, 2), (True, 2))
    ]
    assert pieces[0] == pieces[1] == pieces[2]
    assert isinstance(core._wire_request(plan, (1, 2)), bytes)  # by the template


def test_json_values_are_looked_at() -> None:
    schema = pa.schema([("m", pa.map_(pa.utf8(), pa.int64())), ("d", pa.decimal128(38, 2))])
    for values in ({"m": [None]}, {"m": [["a", 1], None]}, {"d": "1e-999999999"}, {"d": "1e999999999"}, {"m": "ab"}):
        with pytest.raises(ValueError, match=r"^'[md]' is not a valid (map|decimal)"):
            core.batch_from_json(values, schema)
    assert core.batch_from_json({"m": {"a": 1}, "d": "1.5"}, schema).num_rows == 1


def test_columns_of_an_emitted_batch_are_looked_at() -> None:
    schema = pa.schema([("m", pa.map_(pa.utf8(), pa.int64())), ("n", pa.int64())])
    out = core.OutputCollector(schema)
    with pytest.raises(TypeError, match="pair of key and value"):
        out.emit_pydict({"m": [[("a", 1)], [None]], "n": [1, 2]})
    out.emit_pydict({"m": [{"a": 1}, None], "n": [1, 2]})
    assert out.batches[0].batch.column("m").to_pylist() == [[("a", 1)], None]


class Coin(pa.ExtensionType):
    """As most of them: compared by value, and therefore without a hash."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "vgi_rpc.tests.coin")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Coin:
        return cls()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coin)


def test_extension_types_without_a_hash_are_parameters_and_results() -> None:
    class Till(Protocol):
        def pay(
            self, v: Annotated[int, core.ArrowType(Coin())], vs: Annotated[list[int], core.ArrowType(pa.list_(Coin()))]
        ) -> Annotated[int, core.ArrowType(Coin())]: ...

    class TillImpl:
        def pay(self, v: int, vs: list[int]) -> int:
            return v + sum(vs)

    with pytest.raises(TypeError, match="unhashable"):
        hash(Coin())
    pa.register_extension_type(Coin())
    try:
        with core.serve_pipe(Till, TillImpl(), timeout=10) as till:
            assert [till.pay(n, [1, 2]) for n in range(3)] == [3, 4, 5]
    finally:
        pa.unregister_extension_type("vgi_rpc.tests.coin")
