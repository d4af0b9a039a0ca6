# pyright: strict
"""What type checkers see of a user's calls; tests/test_typing.py compares each `reveal_type` with its comment.

This file is read by checkers only. `vgi_rpc` in the import is replaced when a vendored copy is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, reveal_type

from vgi_rpc import (
    ArrowSerializableDataclass,
    CallContext,
    Level,
    Message,
    OutputCollector,
    ProducerState,
    RpcError,
    RpcServer,
    Stream,
    WorkerPool,
    connect,
    ping,
    run_server,
    serve_pipe,
    tcp_connect,
    unix_connect,
    with_options,
)


@dataclass(frozen=True)
class Point(ArrowSerializableDataclass):
    """A value with two fields."""

    x: float
    y: float = 0.0


@dataclass
class CountState(ProducerState):
    """State of `Calc.count`."""

    left: int

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Count down to the end."""
        reveal_type(ctx.time_left())  # reveals: float | None
        out.finish()


class Calc(Protocol):
    """A service."""

    def add(self, a: float, b: float) -> float:
        """Add."""
        ...

    def name(self, point: Point | None = None) -> str | None:
        """Name a point."""
        ...

    def mirror(self, points: list[Point]) -> dict[str, Point]:
        """Mirror points."""
        ...

    def count(self, n: int) -> Stream[CountState]:
        """Count."""
        ...


class CalcImpl:
    """Its implementation."""

    def add(self, a: float, b: float) -> float:
        """Add."""
        return a + b

    def name(self, point: Point | None = None) -> str | None:
        """Name a point."""
        return None if point is None else str(point)

    def mirror(self, points: list[Point]) -> dict[str, Point]:
        """Mirror points."""
        return {str(point): Point(-point.x, -point.y) for point in points}

    def count(self, n: int) -> Stream[CountState]:
        """Count."""
        raise NotImplementedError


def on_log(message: Message) -> None:
    """Look at a log message."""
    reveal_type(message.level)  # reveals: Level
    assert message.level is not Level.ERROR


def use(calc: Calc) -> None:
    """Call everything."""
    reveal_type(calc.add(1.0, b=2.0))  # reveals: float
    reveal_type(calc.name(Point(1.0)))  # reveals: str | None
    reveal_type(calc.mirror([Point(1.0)]))  # reveals: dict[str, Point]
    with calc.count(3) as stream:
        for batch in stream:
            reveal_type(batch)  # reveals: AnnotatedBatch
    reveal_type(with_options(calc, timeout=1.0))  # reveals: Calc
    reveal_type(ping(calc))  # reveals: float


def doors() -> None:
    """Every door gives a typed proxy."""
    with connect(Calc, ["python", "worker.py"], on_log=on_log, timeout=1.0) as calc:
        reveal_type(calc)  # reveals: Calc
        use(calc)
    with unix_connect(Calc, "/tmp/calc.sock") as calc:
        reveal_type(calc)  # reveals: Calc
    with tcp_connect(Calc, "127.0.0.1", 9000) as calc:
        reveal_type(calc)  # reveals: Calc
    with serve_pipe(Calc, CalcImpl()) as calc:
        reveal_type(calc)  # reveals: Calc
    with WorkerPool() as pool, pool.connect(Calc, ["python", "worker.py"]) as calc:
        reveal_type(calc)  # reveals: Calc


def main() -> None:
    """Serve."""
    try:
        run_server(Calc, CalcImpl())
    except RpcError as error:
        reveal_type(error.error_code)  # reveals: str
    run_server(RpcServer(Calc, CalcImpl()))
