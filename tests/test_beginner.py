"""Mistakes of a first day, one by one: the message says what happened, where, and what to do next."""

from __future__ import annotations

import os
import pty
import re
import socket
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

ROOT = Path(str(core.__file__)).parents[core.__name__.count(".")]
NUMBERS = pa.schema([("n", pa.int64())])


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def name(self, who: str) -> str: ...


class CalcImpl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def name(self, who: str) -> str:
        return who.upper()


@dataclass
class Countdown(core.ProducerState):
    left: int

    def produce(self, out: Any, ctx: Any) -> None:
        if self.left == 0:
            out.finish()
            return
        out.emit_pydict({"n": [self.left]})
        self.left -= 1


@dataclass
class Doubler(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit_pydict({"n": [2 * n for n in input.batch["n"].to_pylist()]})


class Numbers(Protocol):
    def countdown(self, start: int) -> core.Stream[Countdown]: ...
    def double(self) -> core.Stream[Doubler]: ...


class NumbersImpl:
    def countdown(self, start: int) -> Any:
        return core.Stream(NUMBERS, Countdown(start))

    def double(self) -> Any:
        return core.Stream(NUMBERS, Doubler(), input_schema=NUMBERS)


def serving(signature: str, body: str = "return 1") -> str:
    """A script with a service of one method `f`; `CALL` is replaced by its call."""
    parameters = re.findall(r"(\w+)(?=:)|(?<=, )(\w+)(?=[,)])", signature)
    names = ", ".join(["self", *(first or second for first, second in parameters)])
    return (
        f"class P(Protocol):\n    def f{signature}: ...\nclass I:\n    def f({names}): {body}\n"
        "with serve_pipe(P, I()) as p: p.f"
    )


CALL = "with serve_pipe(Calc, CalcImpl()) as c: "
STREAM = "with serve_pipe(Numbers, NumbersImpl()) as n:\n  with n."
ONE = 'AnnotatedBatch.from_pydict({"n": [1]}, NUMBERS)'
OTHER = 'AnnotatedBatch.from_pydict({"m": [1]})'
WITH = "with connect(...) as proxy: proxy.add(...)"

# What is written, and what the message must contain.
IN_PROCESS = {
    "no annotation": (serving("(self, a, b: int) -> int") + "(1, 2)", ["P.f() parameter 'a' has no annotation"]),
    "no return annotation": (serving("(self)") + "()", ["f() returned a int", "no return annotation: write -> int"]),
    "tuple": (serving("(self, a: tuple) -> int") + "(1)", ["Cannot infer", "list[T]", "P.f() parameter 'a'"]),
    "bare list": (serving("(self, a: list) -> int") + "(1)", ["list[float]", "P.f() parameter 'a'"]),
    "two types": (serving("(self, a: int | str) -> int") + "(1)", ["T | None", "P.f() parameter 'a'"]),
    "table": (serving("(self, a: pa.Table) -> int") + "(1)", ["pa.RecordBatch", "Stream.from_arrow"]),
    "plain dataclass": (
        "import dataclasses\n@dataclasses.dataclass\nclass D:\n    x: int\n" + serving("(self, a: D) -> int") + "(1)",
        ["class D(ArrowSerializableDataclass)", "P.f() parameter 'a'"],
    ),
    "not decorated": (
        "class D(ArrowSerializableDataclass):\n    x: int\n" + serving("(self, a: D) -> int") + "(1)",
        ["D: must be", "add @dataclass"],
    ),
    "iterator": (serving("(self) -> Iterator[int]") + "()", ["returns a Stream", "P.f() result"]),
    "unknown name": (serving("(self, a: Nothing) -> int") + "(1)", ["P.f()", "'Nothing' is not defined"]),
    "no self": (serving("(a: int) -> int") + "(1)", ["P.f() has no 'self'"]),
    "async in the Protocol": (serving("(self) -> int").replace("def f", "async def f", 1), ["write def"]),
    "async implementation": (
        "class A(CalcImpl):\n  async def add(self, a, b): ...\nserve_pipe(Calc, A()).__enter__()",
        ["'add()' is async def", "write def"],
    ),
    "generator": (serving("(self) -> int", "yield 1"), ["'f()' is a generator", "Stream"]),
    "missing method": ("serve_pipe(Calc, object()).__enter__()", ["missing method add(a: float, b: float)"]),
    "other parameters": (
        serving("(self, a: int) -> int").replace("f(self, a):", "f(self, x):"),
        ["missing parameter 'a'", "required parameter 'x'"],
    ),
    "a class, no instance": ("serve_pipe(Calc, CalcImpl).__enter__()", ["give an instance: CalcImpl()"]),
    "an object, no Protocol": ("serve_pipe(CalcImpl(), CalcImpl()).__enter__()", ["a Protocol class, got a CalcImpl"]),
    "swapped": (
        "class C:\n  def add(self, a): ...\nserve_pipe(C, Calc).__enter__()",
        ["C.add()", "the Protocol class comes first"],
    ),
    "no body": (
        serving("(self) -> int").replace("class I", "class I(P)").replace("def f(self): return 1", "pass") + "()",
        ["f() expected a non-None return value", "its annotation is int"],
    ),
    "wrong result": (serving("(self) -> int", "return 'x'") + "()", ["f() must return int, got str"]),
    "default None": (serving("(self, a: int = None) -> int") + "()", ["parameter 'a'", "its default", "int | None"]),
    "wrong default": (serving("(self, a: int = 'x') -> int") + "()", ["parameter 'a'", "(declared int)"]),
    "bad version": ("class P(Protocol):\n  protocol_version = '1.2'\nRpcServer(P, CalcImpl())", ["MAJOR.MINOR.PATCH"]),
    "wrong type": (CALL + "c.add('one', 2.0)", ["add() parameter 'a'", "'one'", "(declared float)"]),
    "None": (CALL + "c.add(None, 2.0)", ["add() parameter 'a' is not optional"]),
    "too few": (CALL + "c.add(1.0)", ["add() missing required argument: 'b'"]),
    "unknown argument": (CALL + "c.add(a=1.0, b=2.0, c=3)", ["unexpected argument 'c'", "Parameters: a, b"]),
    "too many": (CALL + "c.add(1.0, 2.0, 3.0)", ["takes 2 argument(s) but 3"]),
    "unknown method": (CALL + "c.ad(1.0, 2.0)", ["no RPC method 'ad'", "Available: add, name"]),
    "pandas": (serving("(self, a: pa.RecordBatch) -> int") + "(object())", ["parameter 'a'", "RecordBatch, got obj"]),
    "no with": ("serve_pipe(Calc, CalcImpl()).add(1.0, 2.0)", [WITH]),
    "no with, pool": ("WorkerPool().connect(Calc, ['x']).add(1.0, 2.0)", [WITH]),
    "after the block": (CALL + "pass\nc.add(1.0, 2.0)", ["is closed; connect again"]),
    "string for a list": ("connect(Calc, 'python worker.py').__enter__()", ["a list", "['python', 'worker.py']"]),
    "empty list": ("connect(Calc, []).__enter__()", ["cmd is empty", "the program, then its arguments"]),
    "program missing": ("connect(Calc, ['pyhton', 'x']).__enter__()", ["No such file", "'pyhton'", "could not start"]),
    "no program": ("connect(Calc, ['nowhere.py']).__enter__()", ["could not start", "[sys.executable, 'nowhere.py']"]),
    "timeout 0": ("serve_pipe(Calc, CalcImpl(), timeout=0).__enter__()", ["positive number of seconds", "got 0"]),
    "URL over TCP": ("tcp_connect(Calc, 'http://h', 1).__enter__()", ["'http://h'", "http_connect"]),
    "nobody on TCP": ("tcp_connect(Calc, '127.0.0.1', 1).__enter__()", ["refused", "no server answers on 127.0.0.1:1"]),
    "no socket": ("unix_connect(Calc, __file__).__enter__()", ["test_beginner.py is not a socket", "--unix PATH"]),
    "long path": ("unix_connect(Calc, '/x' * 99).__enter__()", ["too long", "at most 107 bytes"]),
    "a call inside a stream": (STREAM + "countdown(3): n.double()", ["a stream is open", "close it first"]),
    "tick of an exchange": (STREAM + "double() as s: s.tick()", ["is an exchange", "exchange()"]),
    "exchange of a producer": (STREAM + f"countdown(3) as s: s.exchange({ONE})", ["is a producer: iterate it"]),
    "wrong columns": (STREAM + f"double() as s: s.exchange({OTHER})", ["expected (n: int64), got (m: int64)"]),
    "dict into an exchange": (STREAM + "double() as s: s.exchange({'n': [1]})", ["got dict", "from_pydict"]),
    "table into an exchange": (STREAM + "double() as s: s.exchange(AnnotatedBatch(pa.table({})))", ["got Table"]),
    "emit a dict": ("OutputCollector(NUMBERS).emit({'n': [1]})", ["a pa.RecordBatch, got dict", "emit_pydict"]),
    "emit nothing": ("OutputCollector(NUMBERS).validate()", ["No data batch was emitted", "finish()"]),
    "a closed stream": (STREAM + f"double() as s: pass\n  s.exchange({ONE})", ["has been closed"]),
    "an unknown extra": ("core.http_conect", ["http_conect"]),
}


@pytest.mark.parametrize(("script", "wanted"), IN_PROCESS.values(), ids=IN_PROCESS)
def test_in_process(script: str, wanted: list[str]) -> None:
    names = {name: getattr(core, name) for name in core.__all__} | globals()
    with pytest.raises(Exception) as caught:
        exec(compile(script, "script.py", "exec"), {**names, "Iterator": Iterator, "__name__": __name__})
    error = caught.value
    text = "".join(traceback.format_exception_only(error))
    assert [part for part in wanted if part not in text] == [], text
    assert not re.search(r"(\w+Error): \1: ", text), text


def test_a_connection_without_with() -> None:
    client, server = core.make_pipe_pair()
    with pytest.raises(AttributeError, match=re.escape(WITH)):
        core.RpcConnection(Calc, client).add(1.0, 2.0)
    client.close()
    server.close()


def test_a_wrong_input_does_not_cost_the_connection() -> None:
    with core.serve_pipe(Numbers, NumbersImpl()) as numbers, numbers.double() as session:
        for wrong in ({"n": [1]}, core.AnnotatedBatch(pa.table({"n": [1]}))):
            with pytest.raises(core.RpcArgumentError):
                session.exchange(wrong)
        assert session.exchange(core.AnnotatedBatch.from_pydict({"n": [1]}, NUMBERS)).batch["n"].to_pylist() == [2]


WORKER = f"""
from typing import Protocol
from {core.__name__} import run_server

class Calc(Protocol):
    def add(self, a: float, b: float = 2.0) -> float: ...
    def mean(self, v: list[float]) -> float: ...

class CalcImpl:
    def add(self, a, b): return a / b
    def mean(self, v): return sum(v) / len(v)

if __name__ == "__main__":
    run_server(Calc, CalcImpl())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("day1")
    (where / "worker.py").write_text(WORKER)
    (where / "quiet.py").write_text("")
    (where / "loud.py").write_text("import sys\nprint('hello', flush=True)\nsys.stdin.read()\n")
    (where / "broken.py").write_text("import nunpy\n")
    return where


def run(where: Path, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=where, env=env, capture_output=True, text=True, timeout=60, **options
    )


PYTHON = sys.executable
CLI = ["-m", core.__name__]
DESCRIBED = ["--cmd", f"{PYTHON} worker.py --describe"]

# A command of Python, its exit status, and what stderr must contain.
COMMANDS: dict[str, tuple[list[str], int, list[str]]] = {
    "no transport": ([*CLI, "describe"], 1, ["--url, --cmd, or --unix", '--cmd "python worker.py --describe"']),
    "not describing": ([*CLI, "describe", "--cmd", f"{PYTHON} worker.py"], 1, ["enable_describe=True (--describe)"]),
    "no worker": ([*CLI, "describe", "--cmd", f"{PYTHON} quiet.py"], 1, ["exited with status 0", "run_server()"]),
    "prints": (
        [*CLI, "describe", "--cmd", f"{PYTHON} loud.py"],
        1,
        ["not an Arrow IPC stream", "hello", "print() to stdout: nothing may"],
    ),
    "raises": ([*CLI, "describe", "--cmd", f"{PYTHON} broken.py"], 1, ["No module named 'nunpy'", "status 1"]),
    "wrong path": ([*CLI, "describe", "--cmd", f"{PYTHON} wroker.py"], 1, ["wroker.py", "status 2"]),
    "a script": ([*CLI, "describe", "--cmd", "worker.py"], 1, ["could not start", "run it by Python"]),
    "no socket": ([*CLI, "describe", "--unix", "worker.py"], 1, ["worker.py is not a socket"]),
    "UNIX: as printed": ([*CLI, "describe", "--unix", "UNIX:/no/s"], 1, ["UNIX: is not part of the path /no/s"]),
    "URL for TCP": ([*CLI, "describe", "--tcp", "http://h:1"], 1, ["[HOST:]PORT", "a URL goes with --url"]),
    "unknown method": ([*CLI, "call", "ad", *DESCRIBED], 1, ["Unknown method 'ad'", "Available: add, mean"]),
    "missing parameter": ([*CLI, "call", "add", *DESCRIBED], 2, ["Missing parameter 'a' (double): give a=VALUE"]),
    "without names": ([*CLI, "call", "add", "1", *DESCRIBED], 2, ["key=value, got: 1", "Parameters: a, b"]),
    "list as text": ([*CLI, "call", "mean", "v=1,2", *DESCRIBED], 2, ["parameter 'v'", "JSON, such as [1, 2]"]),
    "method forgotten": ([*CLI, "call", *DESCRIBED], 2, ["required: METHOD\n"]),
    "a file to import": ([*CLI, "serve", "worker.py:Calc", "x:y"], 2, ["no module named", "worker:Calc"]),
    "Protocol twice": ([*CLI, "serve", "worker:Calc", "worker:Calc"], 2, ["implementation comes second"]),
    "file in the way": (["worker.py", "--unix", "quiet.py"], 1, ["non-socket", "choose another path"]),
    "no directory": (["worker.py", "--unix", "no/s"], 1, ["No such file", "a directory that exists"]),
    "unknown flag": (["worker.py", "--prot", "1"], 2, ["unrecognized arguments: --prot 1"]),
}


@pytest.mark.parametrize(("command", "status", "wanted"), COMMANDS.values(), ids=COMMANDS)
def test_command(command: list[str], status: int, wanted: list[str], folder: Path) -> None:
    ran = run(folder, *command, stdin=subprocess.DEVNULL)
    assert [part for part in wanted if part not in ran.stderr] == [], ran.stderr
    assert ran.returncode == status
    if "broken.py" not in str(command):
        assert not ran.stderr.startswith("Traceback")


def test_a_default_is_the_servers(folder: Path) -> None:
    assert run(folder, *CLI, "call", "add", "a=3", *DESCRIBED).stdout == '{"result": 1.5}\n'


def test_port_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = run(folder, "worker.py", "--tcp", where)
    assert ran.returncode == 1
    assert "already in use" in ran.stderr
    assert f"cannot listen on {where}; choose another port, or 0 for any" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_stdout_closed(folder: Path) -> None:
    ran = run(folder, "-c", "import os, sys\nos.close(1)\nos.execv(sys.executable, [sys.executable, 'worker.py'])")
    assert ran.returncode == 1
    assert "stdout is closed; a worker needs it, or --unix or --tcp" in ran.stderr


def test_errors_are_read_at_a_terminal(folder: Path) -> None:
    command = [*CLI, "call", "add", "a=1", "b=0", *DESCRIBED]
    shown = [at_terminal(folder, [*command, *more]) for more in ([], ["--verbose"], ["--format", "json"])]
    assert shown[0].splitlines() == [
        "Error: ZeroDivisionError: float division by zero",
        "(--verbose shows the traceback of the server)",
    ]
    assert "Error: ZeroDivisionError: float division by zero\r\nTraceback (most recent call last):" in shown[1]
    assert shown[2].startswith('{"error": {"type": "ZeroDivisionError"')


def at_terminal(where: Path, command: list[str]) -> str:
    """What a command writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [PYTHON, *command], cwd=where, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        found = b""
        try:
            while data := os.read(ours, 65536):
                found += data
        except OSError:  # the other end is closed
            pass
        process.communicate(timeout=60)
    os.close(ours)
    return found.decode()


def test_http_where_bytes_are_expected() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, core.tcp_connect(Calc, "127.0.0.1", listener.getsockname()[1], timeout=10) as calc:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            with pytest.raises(core.ConnectionLostError, match="this is HTTP, whose client is http_connect"):
                calc.add(1.0, 2.0)


def test_older_python(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Path(str(core.__file__)).read_text().partition("\nfrom typing import (")[0]
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(ImportError, match=r"needs Python 3\.11 or newer; this is .* \(" + re.escape(PYTHON)):
        exec(compile(begin, "old.py", "exec"), {"__name__": "old"})


def test_help_reads_like_an_index() -> None:
    script = textwrap.dedent(f"""
        import importlib, pydoc
        print(pydoc.render_doc(importlib.import_module({core.__name__!r})))
    """)
    ran = run(ROOT, "-c", script)
    assert ran.returncode == 0, ran.stderr
    assert "15. FRONT DOOR" in "\n".join(ran.stdout.splitlines()[:60])
