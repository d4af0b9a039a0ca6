# pyright: strict
"""Mistakes that type checkers must report; tests/test_typing.py compares the lines with the marks.

Every line marked `# wrong` has a mistake; the others have none. This file is read by checkers only.
"""

from __future__ import annotations

from typing import Protocol

from vgi_rpc import (
    connect,
    serve_pipe,
    tcp_connect,
    with_options,
)


class Calc(Protocol):
    """A service."""

    def add(self, a: float, b: float) -> float:
        """Add."""
        ...


class CalcImpl:
    """Its implementation."""

    def add(self, a: float, b: float) -> float:
        """Add."""
        return a + b


def use(calc: Calc) -> None:
    """Mistakes in calls."""
    calc.add(1.0, "2")  # wrong
    calc.add(1.0)  # wrong
    calc.add(1.0, c=2.0)  # wrong
    calc.subtract(1.0, 2.0)  # wrong
    text: str = calc.add(1.0, 2.0)  # wrong
    print(text)
    with_options(calc, timeout="soon")  # wrong
    with_options(calc, timeout=1.0).subtract()  # wrong


def doors() -> None:
    """Mistakes at the doors."""
    with serve_pipe(Calc, CalcImpl()) as calc:
        calc.subtract()  # wrong
    with connect(Calc, ["python", "worker.py"]) as calc:
        calc.add("1", 2.0)  # wrong
    with connect(Calc, ["python", "worker.py"], timeout="soon"):  # wrong
        pass
    with connect(Calc, [1, 2]):  # wrong
        pass
    with tcp_connect(Calc, "localhost", "9000"):  # wrong
        pass
