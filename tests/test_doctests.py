"""The examples in docstrings: every function of the front door has one of at most five lines, and it is run."""

from __future__ import annotations

import contextlib
import doctest
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.core import core

FRONT_DOOR = (
    *("connect", "unix_connect", "tcp_connect", "serve_pipe", "serve_unix_pipe", "serve_tcp_pipe", "serve_unix"),
    *("serve_tcp", "WorkerPool", "with_options", "submit", "map_calls", "ping", "list_protocols"),
    *("describe_protocol", "introspect", "compare_protocols"),
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A folder with a worker.py and a server at calc.sock, and the port of another server."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "worker.py").write_text(WORKER.format(root=str(Path(__file__).resolve().parents[1])))
    with contextlib.ExitStack() as servers:
        said = []
        for flags in (["--unix", "calc.sock"], ["--tcp", "0"]):
            command = [sys.executable, "worker.py", *flags]
            served = servers.enter_context(
                subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            )
            servers.callback(served.terminate)
            assert served.stdout is not None
            said.append(served.stdout.readline())
        yield folder, int(said[1].rpartition(":")[2])


@pytest.fixture
def names(place: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples may use."""
    folder, port = place
    monkeypatch.chdir(folder)
    monkeypatch.setattr(core._TransportAcceptor, "FIRST_CLIENT", 0.2)  # the servers of examples end unvisited
    return {**vars(core), "Calc": Calc, "CalcImpl": CalcImpl, "sys": sys, "port": port}


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
