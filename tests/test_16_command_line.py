"""Room 16: the command line."""

from __future__ import annotations

import datetime
import enum
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest
from pyarrow import ipc

from tests.core import core

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"}
MYSELF = [sys.executable, "-W", "error", "-m", core.__name__]
WORKER = [*MYSELF, "serve", f"{__name__}:Service", f"{__name__}:Impl"]
NOTHING = pa.schema([])
NUMBERS = pa.schema([("x", pa.float64())])


class Colour(enum.Enum):
    RED = "r"


class Service(Protocol):
    def add(self, a: int, b: int = 5) -> int: ...
    def shown(self, f: float, flag: bool, s: str, c: Colour, m: dict[str, int], items: list[float]) -> str: ...
    def nothing(self) -> None: ...
    def raw(self, x: bytes) -> bytes: ...
    def day(self, x: datetime.date) -> datetime.date: ...
    def moment(self, x: datetime.datetime) -> datetime.datetime: ...
    def span(self, x: datetime.timedelta) -> datetime.timedelta: ...
    def table(self) -> dict[str, int]: ...
    def maybe(self, x: int | None) -> int | None: ...
    def fail(self) -> None: ...
    def count(self, n: int) -> core.Stream[core.ProducerState, None]: ...  # type: ignore[name-defined]
    def double(self) -> core.Stream[core.ExchangeState, None]: ...  # type: ignore[name-defined]


class Count(core.ProducerState):  # type: ignore[misc,name-defined]
    def __init__(self, n: int) -> None:
        self.left = n

    def produce(self, out: Any, ctx: Any) -> None:
        if not self.left:
            out.finish()
            return
        out.emit_pydict({"left": [self.left], "text": ["a\nb"]})
        self.left -= 1


class Double(core.ExchangeState):  # type: ignore[misc,name-defined]
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit_pydict({"x": [2 * value for value in input.batch.column("x").to_pylist()]})


class Impl:
    def add(self, a: int, b: int, ctx: Any) -> int:
        ctx.client_log(core.Level.WARN, f"adding\x1b[2J {a}")
        return a + b

    def shown(self, f: float, flag: bool, s: str, c: Colour, m: dict[str, int], items: list[float]) -> str:
        return repr((f, flag, s, c.name, m, items))

    def nothing(self) -> None:
        pass

    def raw(self, x: bytes) -> bytes:
        return x

    day = moment = span = maybe = lambda self, x: x

    def table(self) -> dict[str, int]:
        return {"a": 1, "b": 2}

    def fail(self) -> None:
        raise ValueError("boom")

    def count(self, n: int) -> Any:
        return core.Stream(pa.schema([("left", pa.int64()), ("text", pa.string())]), Count(n))

    def double(self) -> Any:
        return core.Stream(NUMBERS, Double(), NUMBERS)


def make() -> Impl:
    return Impl()


class Ran:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A worker of `serve`, on a Unix socket."""
    path = str(tmp_path_factory.mktemp("cli") / "s")
    worker = subprocess.Popen([*WORKER, "--unix", path], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == f"UNIX:{path}\n"
        yield path
    finally:
        worker.kill()
        worker.communicate()


@pytest.fixture
def run(socket_path: str, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*args: str, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        status = core.main(["--unix", socket_path, *args])
        return Ran(status, *capfd.readouterr())

    return run


def command(*args: str, cwd: Path = ROOT, env: dict[str, str] = ENV, **options: Any) -> Ran:
    ran = subprocess.run([*MYSELF, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, **options)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


# ---- describe, call


def test_describe(run: Any) -> None:
    found = json.loads(run("describe").out)
    keys = "protocol_name, server_id, request_version, describe_version, protocol_hash, protocol_version, methods"
    assert ", ".join(found) == keys
    assert found["protocol_name"] == "Service"
    assert found["methods"]["add"] == {
        "method_type": "unary",
        "has_return": True,
        "params_schema": "a: int64 not null\nb: int64 not null",
        "result_schema": "result: int64 not null",
    }
    assert run("describe", "--format", "table").out.startswith("RPC Service: Service\n")


@pytest.mark.parametrize(
    ("args", "result"),
    [
        (["add", "a=1", "b=2"], 3),
        (["add", "a=1"], 6),  # null on the wire is the default
        (["add", "-j", '{"a": 1, "b": 2}'], 3),
        (["add", "a=1", "--timeout", "9", "b=2", "-v", "--protocol", "Service", "--no-stdin"], 3),
        (
            ["shown", "f=2", "flag=YES", "s=a=b", "c=RED", 'm={"k": 1}', "items=[1, 2.5]"],
            repr((2.0, True, "a=b", "RED", {"k": 1}, [1.0, 2.5])),
        ),
        (["raw", "x=aGk="], "aGk="),
        (["day", "x=2024-02-29"], "2024-02-29"),
        (["moment", "x=2024-02-29T01:02:03.000004"], "2024-02-29T01:02:03.000004"),
        (["span", "x=P1DT1H0.5S"], "PT90000.5S"),
        (["span", "x=-PT1M40S"], "-PT100S"),
        (["table"], {"a": 1, "b": 2}),
        (["maybe"], None),
        (["maybe", "x=3"], 3),
    ],
)
def test_unary(run: Any, args: list[str], result: Any) -> None:
    ran = run("call", *args)
    assert (ran.status, [line for line in ran.err.splitlines() if "[WARN]" not in line]) == (0, [])
    assert json.loads(ran.out) == {"result": result}
    assert ran.out.count("\n") == 1


def test_void(run: Any) -> None:
    assert run("call", "nothing").out == "null\n"


def test_table(run: Any) -> None:
    assert run("call", "add", "a=1", "b=2", "-f", "table").out == "result\n------\n3\n"
    assert run("-f", "table", "call", "count", "n=2").out == "left  text\n----  ----\n2     a\\nb\n1     a\\nb\n"


@pytest.mark.parametrize("n", [0, 2])
def test_arrow(run: Any, tmp_path: Path, n: int) -> None:
    file = tmp_path / "out.arrow"
    assert run("call", "count", f"n={n}", "-f", "arrow", "-o", str(file)).out == ""
    with ipc.open_stream(file.read_bytes()) as reader:
        assert reader.read_all().to_pydict() == {"left": list(range(n, 0, -1)), "text": ["a\nb"] * n}


def test_producer(run: Any) -> None:
    assert [json.loads(line) for line in run("call", "count", "n=2").out.splitlines()] == [
        {"left": 2, "text": "a\nb"},
        {"left": 1, "text": "a\nb"},
    ]


def test_exchange_takes_the_first_lines_types(run: Any) -> None:
    ran = run("call", "double", stdin='{"x": 1.5}\n\n{"x": 2}\n')
    assert (ran.status, ran.out) == (0, '{"x": 3.0}\n{"x": 4.0}\n')


@pytest.mark.parametrize("line", ['{"y": 1}', '{"x": "a"}', "[1]", "{"])
def test_exchange_names_the_bad_line(run: Any, line: str) -> None:
    ran = run("call", "double", stdin=f'{{"x": 1.5}}\n{line}\n')
    assert (ran.status, ran.out) == (1, '{"x": 3.0}\n')
    assert ran.err.startswith("Error: line 2 of the input: ")


def test_exchange_does_not_cut_fractions(run: Any) -> None:
    ran = run("call", "double", stdin='{"x": 1}\n{"x": 1.5}\n')
    assert ran.status == 1
    assert "not a whole number" in ran.err


@pytest.mark.parametrize("opened", [ipc.new_stream, ipc.new_file])
def test_exchange_from_a_file(run: Any, tmp_path: Path, opened: Any) -> None:
    file = tmp_path / "in.arrow"
    with opened(str(file), NUMBERS) as writer:
        for values in ([1.0, 2.0], [3.0]):
            writer.write_batch(pa.RecordBatch.from_pydict({"x": values}, schema=NUMBERS))
    assert run("call", "double", "-i", str(file)).out == '{"x": 2.0}\n{"x": 4.0}\n{"x": 6.0}\n'


def test_exchange_without_input(run: Any) -> None:
    ran = run("call", "double", "--no-stdin", stdin='{"x": 1.5}\n')
    assert (ran.status, ran.out, ran.err) == (0, "", "")


def test_messages_cannot_move_the_cursor(run: Any) -> None:
    assert run("-v", "call", "add", "a=1").err == "[WARN] adding\\x1b[2J 1\n"


def test_header_comes_first(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"total": [2]})
    shown = {}
    for form in ("json", "table", "arrow"):
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        printer = core._CliPrinter(out, form)
        printer.header(batch)
        printer.batch(pa.RecordBatch.from_pydict({"i": [1]}))
        printer.close(None)
        out.flush()
        shown[form] = out.buffer.getvalue()  # type: ignore[attr-defined]
    assert shown["json"] == b'{"__header__": {"total": 2}}\n{"i": 1}\n'
    assert shown["table"] == b"Header:\n  total: 2\n\ni\n-\n1\n"
    both = io.BytesIO(shown["arrow"])
    assert [ipc.open_stream(both).read_all().to_pydict() for _ in range(2)] == [{"total": [2]}, {"i": [1]}]


# ---- misuse and failure


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["call", "nope"], 1, "Error: Unknown method 'nope'. Available: add, count, day, double, fail, "),
        (["call", "add", "zz=1"], 2, "Error: Unknown parameter 'zz'. Available: a, b"),
        (["call", "add", "a"], 2, "Error: Expected key=value, got: a"),
        (["call", "add", "a=notint"], 2, "Error: parameter 'a': 'notint' is not a valid int64"),
        (["call", "add", "a=99999999999999999999"], 2, "Error: parameter 'a': "),
        (["call", "add", "-j", '{"a": 1.5}'], 2, "Error: parameter 'a': '1.5' is not a valid int64"),
        (["call", "add", "-j", '{"a": "1"}'], 2, "Error: parameter 'a': "),
        (["call", "add", "-j", "[]"], 2, "Error: --json: expected an object"),
        (["call", "add", "-j", "{}", "a=1"], 2, "Error: --json and key=value exclude each other"),
        (["call", "day", "x=yesterday"], 2, "Error: parameter 'x': 'yesterday' is not a valid date32[day]"),
        (["call", "span", "x=PT"], 2, "Error: parameter 'x': 'PT' is not a valid duration[us]"),
        (["call", "raw", "x=!"], 2, "Error: parameter 'x': '!' is not a valid binary"),
        (["call", "shown", "m=[1"], 2, "Error: parameter 'm': "),
        (["call", "double", "-i", "/nowhere"], 1, "Error: [Errno 2] "),
        (["call", "add", "--tcp", "a:1"], 2, "not allowed with argument"),
        (["call", "add", "--timeout", "0"], 2, "argument --timeout"),
        (["describe", "--log-logger", "x"], 0, "Warning: unknown logger 'x'"),
    ],
)
def test_complaints(run: Any, args: list[str], status: int, text: str) -> None:
    ran = run(*args)
    assert text in ran.err
    assert ran.status == status


def test_remote_error(run: Any) -> None:
    ran = run("call", "fail")
    error = json.loads(ran.err)["error"]
    assert (ran.status, ran.out) == (1, "")
    assert error["type"] == "ValueError"
    assert "boom" in error["message"]
    assert "Traceback" in error["traceback"]


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["describe"], 1, "Error: Either --url, --cmd, or --unix is required"),
        (["describe", "-c", "/nowhere/at/all"], 1, "Error: [Errno 2] "),
        (["describe", "-c", "'"], 2, "--cmd cannot be split"),
        (["-c", "x", "--unix", "y", "describe"], 2, "argument --unix: not allowed with argument --cmd"),
        (["describe", "--url", "http://localhost"], 1, "--url needs the http extra"),
        (["describe", "--tcp", "localhost:x"], 1, "expects [HOST:]PORT, got 'localhost:x'"),
        (["serve", "nowhere:A", "b:C"], 2, "Error: nowhere:A: no module named 'nowhere'\n"),
        (["serve", "json", "b:C"], 2, "Error: expected MODULE:NAME, got 'json'\n"),
        (["serve", "json:Nope", "b:C"], 2, "Error: json:Nope: module 'json' has no attribute 'Nope'\n"),
        (["serve", "json:dumps", "b:C"], 2, "Error: json:dumps is not a Protocol class\n"),
        (["nonsense"], 2, "invalid choice"),
        (["describe", "more"], 2, "unrecognized arguments: more"),
        (["call", "add", "--nonsense", "a=1"], 2, "unrecognized arguments: --nonsense a=1"),
    ],
)
def test_complaints_without_a_server(capfd: Any, args: list[str], status: int, text: str) -> None:
    assert core.main(args) == status
    assert text in capfd.readouterr().err


def test_help_without_a_command(capfd: Any) -> None:
    assert core.main([]) == 2
    assert "describe" in capfd.readouterr().out


def test_version_names_the_file(capfd: Any) -> None:
    assert core.main(["-V"]) == 0
    assert capfd.readouterr().out == f"vgi-rpc {core.__version__} ({os.path.abspath(core.__file__)})\n"


def test_server_that_does_not_describe_itself(tmp_path: Path) -> None:
    code = f"import {__name__} as t; t.core.run_server(t.Service, t.Impl())"
    ran = command("describe", "-c", shlex.join([sys.executable, "-c", code]))
    assert ran.status == 1
    message = json.loads(ran.err)["error"]["message"]
    assert "--describe" in message and "enable_describe=True" in message


def test_loggers(capfd: Any) -> None:
    assert core.main(["loggers"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {"vgi_rpc", "vgi_rpc.access", "vgi_rpc.wire.request"} <= {entry["name"] for entry in found}
    assert {tuple(entry) for entry in found} == {("name", "description", "scenario")}


def test_logging_is_undone(run: Any) -> None:
    logger = logging.getLogger("vgi_rpc")
    before = (logger.level, list(logger.handlers))
    ran = run("call", "add", "a=1", "--debug", "--log-format", "json")
    lines = [json.loads(line) for line in ran.err.splitlines()]
    assert {"vgi_rpc.wire.request", "vgi_rpc.wire.response"} <= {line["logger"] for line in lines}
    assert (logger.level, logger.handlers) == before


# ---- whole processes


@pytest.mark.parametrize("flags", [["--factory"], []])
def test_serve(flags: list[str]) -> None:
    worker = [*MYSELF, "serve", f"{__name__}:Service", f"{__name__}:{'make' if flags else 'Impl'}", *flags]
    ran = command("-c", shlex.join(worker), "call", "add", "a=1", "b=2")
    assert (ran.status, ran.out, ran.err) == (0, '{"result": 3}\n', "")


def test_demo() -> None:
    ran = command("demo")
    assert (ran.status, ran.err) == (0, "")
    for text in ("calc.add(1.5, 2.0) = 3.5", "[INFO] adding", "{'left': [1]}", "RPC Service: Calc", "ZeroDivision"):
        assert text in ran.out
    assert len(ran.out.splitlines()) < 20


def test_file_runs_alone(tmp_path: Path) -> None:
    copy = tmp_path / "renamed.py"
    copy.write_bytes(Path(core.__file__).read_bytes())
    (tmp_path / "mine.py").write_text(
        "from renamed import Stream, ProducerState\nfrom typing import Protocol\n"
        "class P(Protocol):\n    def one(self) -> int: ...\n"
        "class I:\n    def one(self): return 1\n"
    )
    env = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    worker = shlex.join([sys.executable, str(copy), "serve", "mine:P", "mine:I"])
    ran = subprocess.run(
        [sys.executable, str(copy), "-c", worker, "call", "one"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, '{"result": 1}\n'), ran.stderr


def test_reader_that_leaves() -> None:
    line = f"{shlex.join([*MYSELF, '-c', shlex.join(WORKER), 'call', 'count', 'n=20000'])} | head -n 1"
    ran = subprocess.run(["sh", "-c", line], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ('{"left": 20000, "text": "a\\nb"}\n', "")


def test_interrupt(socket_path: str) -> None:
    client = subprocess.Popen(
        [*MYSELF, "--unix", socket_path, "call", "double"],
        env=ENV,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write('{"x": 1.5}\n')
    client.stdin.flush()
    assert client.stdout.readline() == '{"x": 3.0}\n'
    client.send_signal(signal.SIGINT)
    assert client.wait(30) == 130
    client.stdin.close()
    client.stdout.close()
