"""The state of a stream is the same data in every turn: over HTTP, and on a pipe that seals it as HTTP does."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

import pyarrow as pa
import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("httpx")

from vgi_rpc_extras.http import http_connect, make_sync_client, make_wsgi_app

TEXT = pa.schema([("said", pa.utf8())])
UTC = datetime.UTC


class Mode(enum.StrEnum):
    FAST = "fast"


class Level(enum.IntEnum):
    HIGH = 3


class Plain(enum.Enum):
    ONE = 1


@dataclass
class Inner(core.ArrowSerializableDataclass):
    texts: list[str]


@dataclass
class Told(core.ProducerState):
    """Says what it holds, three times."""

    turns: int = field(default=0, kw_only=True)

    def produce(self, out: Any, ctx: Any) -> None:
        self.turns += 1
        if self.turns > 3:
            return out.finish()
        return out.emit_pydict({"said": [self.say()]})

    def say(self) -> str:
        return repr({n: v for n, v in vars(self).items() if n != "turns" and not n.startswith("_")})


@dataclass
class Text(Told):
    value: str


@dataclass
class MaybeText(Told):
    value: str | None


@dataclass
class Number(Told):
    value: int


@dataclass
class Real(Told):
    value: float


@dataclass
class Reals(Told):
    value: list[float]

    def say(self) -> str:
        return str([float(value) for value in self.value])


@dataclass
class Texts(Told):
    value: list[str]


@dataclass
class Pairs(Told):
    value: dict[str, list[int]]


@dataclass
class When(Told):
    value: datetime.datetime


@dataclass
class Money(Told):
    value: Annotated[decimal.Decimal, core.ArrowType(pa.decimal128(10, 2))]


@dataclass
class Kind(Told):
    value: Plain


@dataclass
class Nested(Told):
    value: Inner


@dataclass
class Grows(Told):
    value: int

    def __post_init__(self) -> None:
        self.value += 10


@dataclass
class Opens(Told):
    value: int
    handle: Annotated[Any, core.Transient()] = None

    def rehydrate(self, implementation: object) -> None:
        self.handle = "open"

    def __post_init__(self) -> None:
        self.handle = "open"


@dataclass
class Hidden(Told):
    value: int

    def __post_init__(self) -> None:
        self._seen = [self.value]


@dataclass
class Cached(Told):
    value: int

    @functools.cached_property
    def twice(self) -> int:
        return 2 * self.value

    def say(self) -> str:
        return str(self.twice)


@dataclass
class Sum(core.ExchangeState):
    total: int = 0
    made: int = 0

    def __post_init__(self) -> None:
        self.made += 1

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        self.total += input.batch["n"][0].as_py()
        out.emit_pydict({"said": [f"{self.total} {self.made}"]})


class Service(Protocol):
    def tell(self) -> core.Stream[core.StreamState]: ...
    def sum(self) -> core.Stream[core.StreamState]: ...


class Impl:
    def __init__(self, state: Any) -> None:
        self.state = state

    def tell(
        self,
    ) -> core.Stream[
        Text
        | MaybeText
        | Number
        | Real
        | Reals
        | Texts
        | Pairs
        | When
        | Money
        | Kind
        | Nested
        | Grows
        | Opens
        | Hidden
        | Cached
    ]:
        return core.Stream(TEXT, self.state())

    def sum(self) -> core.Stream[Sum]:
        return core.Stream(TEXT, Sum(), input_schema=pa.schema([("n", pa.int64())]))


@contextlib.contextmanager
def door(kind: str, state: Any = None) -> Iterator[Any]:
    impl = Impl(state)
    if kind == "http":
        with http_connect(Service, client=make_sync_client(core.RpcServer(Service, impl))) as proxy:
            yield proxy
        return
    with core.serve_pipe(Service, impl, seal_state=kind == "sealed") as proxy:
        yield proxy


def said(kind: str, state: Any) -> list[str]:
    with door(kind, state) as proxy:
        return [item.batch["said"][0].as_py() for item in proxy.tell()]


@pytest.mark.parametrize(
    "state",
    [
        lambda: Text("x"),
        lambda: Text(Mode.FAST),
        lambda: MaybeText(Mode.FAST),
        lambda: MaybeText(None),
        lambda: Number(Level.HIGH),
        lambda: Number(True),
        lambda: Real(float("nan")),
        lambda: Real(0),  # as people write it
        lambda: Reals([0, 1.5, float("inf")]),
        lambda: Texts(["a", "b"]),
        lambda: Pairs({"a": [1], "b": []}),
        lambda: When(datetime.datetime(2026, 1, 2, 3, 4, 5, 6)),
        lambda: Money(decimal.Decimal("1.50")),
        lambda: Kind(Plain.ONE),
        lambda: Nested(Inner(["x"])),
        lambda: Grows(1),
        lambda: Opens(1),
        lambda: Cached(4),
    ],
)
def test_a_state_is_the_same_everywhere_and_in_every_turn(state: Any) -> None:
    found = said("pipe", state)
    assert len(found) == 3
    assert found == [found[0]] * 3
    assert said("sealed", state) == found
    assert said("http", state) == found


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (lambda: Texts(("a", "b")), r"Texts\.value is a tuple that comes back as a list"),  # type: ignore[arg-type]
        (lambda: Texts([Mode.FAST]), r"Texts\.value is a list"),
        (lambda: When(datetime.datetime(2026, 1, 2, tzinfo=UTC)), r"When\.value"),
        (lambda: Hidden(1), r"Hidden\._seen is no field"),
    ],
)
@pytest.mark.parametrize("kind", ["sealed", "http"])
def test_what_would_come_back_as_something_else_is_refused_at_once(kind: str, state: Any, text: str) -> None:
    with pytest.raises(core.RpcError, match=text):
        said(kind, state)
    assert len(said("pipe", state)) == 3


@pytest.mark.parametrize("kind", ["pipe", "sealed", "http"])
def test_an_exchange_goes_on_from_where_it_was(kind: str) -> None:
    with door(kind) as proxy, proxy.sum() as session:
        one = core.AnnotatedBatch(pa.RecordBatch.from_pydict({"n": [2]}))
        assert [session.exchange(one).batch["said"][0].as_py() for _ in range(4)] == ["2 1", "4 1", "6 1", "8 1"]


@dataclass
class Stuck(core.ProducerState):
    good: int
    bad: object

    def produce(self, out: Any, ctx: Any) -> None:
        out.finish()


class Holds(Protocol):
    def go(self) -> core.Stream[Stuck]: ...


class HoldsImpl:
    def go(self) -> core.Stream[Stuck]:
        return core.Stream(TEXT, Stuck(1, object()))


def test_a_state_that_cannot_travel_is_refused_when_the_server_is_made() -> None:
    server = core.RpcServer(Holds, HoldsImpl())
    with pytest.raises(TypeError, match=r"state of go\(\) cannot travel over HTTP.*Stuck\.bad"):
        make_wsgi_app(server, token_key=bytes(32))
    with core.serve_pipe(Holds, HoldsImpl()) as proxy:
        assert list(proxy.go()) == []
    with (
        core.serve_pipe(Holds, HoldsImpl(), seal_state=True) as proxy,
        pytest.raises(core.RpcError, match=r"Stuck\.bad"),
    ):
        list(proxy.go())


class Undecorated(Text):
    more: int = 0


class Fieldless(core.ProducerState):
    limit: ClassVar[int] = 3

    def produce(self, out: Any, ctx: Any) -> None:
        out.finish()


def test_a_state_without_its_decorator() -> None:
    with pytest.raises(TypeError, match=r"Undecorated\.more would not be sent"):
        core.check_state_class(Undecorated)
    core.check_state_class(Fieldless)
    core.check_state_class(Text)
