"""Law 1 by exhaustion: a KeyboardInterrupt at every line that a conversation runs through, one after the other.

Afterwards the connection is in step or broken, for this thread and for others; nobody holds it who cannot let go.
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

N = pa.schema([("n", pa.int64())])


@dataclass
class Head(core.ArrowSerializableDataclass):
    n: int


@dataclass
class Count(core.ProducerState):
    left: int

    def produce(self, out: Any, ctx: Any) -> None:
        if self.left == 0:
            out.finish()
            return
        self.left -= 1
        out.emit_pydict({"n": [self.left]})


@dataclass
class Same(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit(input.batch)


class Svc(Protocol):
    def echo(self, n: int) -> int: ...
    def count(self, n: int) -> core.Stream[Count]: ...
    def headed(self, n: int) -> core.Stream[Count, Head]: ...
    def same(self) -> core.Stream[Same]: ...


class Impl:
    def echo(self, n: int) -> int:
        return n

    def count(self, n: int) -> core.Stream[Count]:
        return core.Stream(N, Count(n))

    def headed(self, n: int) -> core.Stream[Count, Head]:
        return core.Stream(N, Count(n), header=Head(n))

    def same(self) -> core.Stream[Same]:
        return core.Stream(N, Same(), input_schema=N)


def _unary(p: Svc) -> object:
    return p.echo(7)


def _timed(p: Svc) -> object:
    return core.with_options(p, timeout=20.0).echo(7)


def _producer(p: Svc) -> object:
    return [item.batch.num_rows for item in p.count(1)]


def _closed(p: Svc) -> object:
    with p.headed(2) as session:
        return session.tick().batch.num_rows


def _cancelled(p: Svc) -> object:
    session = p.count(2)
    session.tick()
    return session.cancel()


def _exchange(p: Svc) -> object:
    with p.same() as session:
        return session.exchange(core.AnnotatedBatch.from_pydict({"n": [1]}, N)).batch.num_rows


def _ahead(p: Svc) -> object:
    return list(core.map_calls(p.echo, [{"n": n} for n in range(3)], depth=2))


class _Strike:
    """A trace function that raises KeyboardInterrupt at the n-th line of the core; not where Python swallows it."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.place = ""

    def __call__(self, frame: types.FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != core.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left <= 0 and not any(code.co_name == "__del__" for code in _callers(frame)):
                sys.settrace(None)
                self.place = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def _callers(frame: types.FrameType | None) -> Iterator[types.CodeType]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _struck(step: Callable[[Svc], object], at: int) -> tuple[str, list[str]]:
    """Where the n-th line is, and what the connection is good for afterwards; no place: it is beyond the end."""
    with core.serve_pipe(Svc, Impl()) as p:
        step(p)  # what is learned is learned
        strike, before = _Strike(at), sys.gettrace()
        sys.settrace(strike)
        try:
            step(p)
            found = ["finished"]
        except KeyboardInterrupt:
            found = ["struck"]
        finally:
            sys.settrace(before)
        if strike.place:
            thread = threading.Thread(target=lambda: found.append(_answer(p)))
            thread.start()
            thread.join(10)
            found.append(_answer(p))
        return strike.place, found


def _answer(p: Svc) -> str:
    try:
        return f"{core.with_options(p, timeout=5.0).echo(9)}"
    except core.ConnectionLostError as exc:
        return f"lost, sent {exc.sent}"
    except Exception as exc:
        return repr(exc)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("step", [_unary, _timed, _producer, _closed, _cancelled, _exchange, _ahead])
def test_an_interrupt_at_any_line_leaves_a_connection_in_step_or_broken(step: Callable[[Svc], object]) -> None:
    wrong, runs = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # an interrupted stream may be closed by its finaliser
        for at in range(1, 100_000):
            place, found = _struck(step, at)
            if not place:
                break
            runs += 1
            if found not in (["struck", "9", "9"], ["struck", "lost, sent no", "lost, sent no"]):
                wrong.append((place, found))
    assert not wrong
    assert runs > 30
