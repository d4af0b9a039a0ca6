"""The examples in docstrings: every function of the front door has one of at most five lines, and it is run."""

from __future__ import annotations

import doctest
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.core import core

FRONT_DOOR = (
    *("connect", "unix_connect", "tcp_connect", "serve_pipe", "serve_unix_pipe", "serve_tcp_pipe", "serve_unix"),
    *("serve_tcp", "WorkerPool", "with_options", "submit", "map_calls", "ping", "list_protocols"),
    *("describe_protocol", "introspect"),
)
WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.core import core
from tests.test_doctests import Calc, CalcImpl
core.run_server(Calc, CalcImpl())
"""


class Calc(Protocol):
    """What the examples call."""

    def add(self, a: float, b: float) -> float: ...


class CalcImpl:
    """What they call it on."""

    def add(self, a: float, b: float) -> float:
        return a + b


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the examples may use: a worker.py, a server at calc.sock, another at `port`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core._TransportAcceptor, "FIRST_CLIENT", 2.0)  # what nobody visits ends
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(Path(__file__).resolve().parents[1])))
    server, bound, ports = core.RpcServer(Calc, CalcImpl()), threading.Barrier(3), list[int]()
    options = {"threaded": True, "idle_timeout": 5.0}

    def at_path(path: str) -> None:
        bound.wait(10)

    def at_port(host: str, port: int) -> None:
        ports.append(port)
        bound.wait(10)

    for target, args, on_bound in ((core.serve_unix, ("calc.sock",), at_path), (core.serve_tcp, (), at_port)):
        kwargs = {**options, "on_bound": on_bound}
        threading.Thread(target=target, args=(server, *args), kwargs=kwargs, daemon=True).start()
    bound.wait(10)
    yield {**vars(core), "Calc": Calc, "CalcImpl": CalcImpl, "sys": sys, "port": ports[0]}


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(getattr(core, name).__doc__ or "", name)


@pytest.mark.parametrize("name", FRONT_DOOR)
def test_an_example_does_what_it_shows(name: str, names: dict[str, Any]) -> None:
    found = examples(name)
    assert found and sum(len((example.source + example.want).splitlines()) for example in found) <= 5
    test = doctest.DocTest(found, names, name, "vgi_rpc.py", 0, getattr(core, name).__doc__)
    shown: list[str] = []
    result = doctest.DocTestRunner().run(test, out=shown.append)
    assert result.attempted and not result.failed, "".join(shown)


def test_no_example_is_left_out() -> None:
    public = [name for name in vars(core) if not name.startswith("_") and callable(getattr(core, name))]
    assert {name for name in public if ">>>" in (getattr(core, name).__doc__ or "")} == set(FRONT_DOOR)
