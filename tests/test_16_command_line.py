"""The command line against real servers: started by `serve`, called in this process and as a program."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.core import core

SERVICE = """
from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import importlib
import os
import struct
import time
from typing import Annotated, Protocol

import pyarrow as pa

core = importlib.import_module(os.environ["VGI_RPC_CORE"])


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Point(core.ArrowSerializableDataclass):
    x: float
    y: float


class Kitchen(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def scale(self, x: int, by: int = 3) -> int: ...
    def nothing(self) -> None: ...
    def flag(self, v: bool) -> bool: ...
    def paint(self, v: Color) -> Color: ...
    def raw(self, v: bytes) -> bytes: ...
    def at(self, v: datetime.datetime) -> datetime.datetime: ...
    def day(self, v: datetime.date) -> datetime.date: ...
    def clock(self, v: datetime.time) -> datetime.time: ...
    def span(self, v: datetime.timedelta) -> datetime.timedelta: ...
    def money(self, v: Annotated[decimal.Decimal, core.ArrowType(pa.decimal128(12, 2))]) -> Annotated[
        decimal.Decimal, core.ArrowType(pa.decimal128(12, 2))]: ...
    def tags(self, v: list[str]) -> list[str]: ...
    def prices(self, v: dict[str, float]) -> dict[str, float]: ...
    def numbered(self, v: dict[int, list[datetime.date]]) -> dict[int, list[datetime.date]]: ...
    def maybe(self, v: int | None) -> int | None: ...
    def points(self, v: list[Point]) -> list[Point]: ...
    def shift(self, p: Point, by: float) -> Point: ...
    def warn(self, text: str) -> int: ...
    def fail(self, text: str) -> int: ...
    def slow(self, seconds: float) -> int: ...
    def count(self, n: int) -> core.Stream[core.ProducerState]: ...
    def titled(self, n: int) -> core.Stream[core.ProducerState, Point]: ...
    def breaks(self, n: int) -> core.Stream[core.ProducerState]: ...
    def nanos(self) -> core.Stream[core.ProducerState]: ...
    def double(self) -> core.Stream[core.ExchangeState]: ...
    def either(self, n: int) -> core.Stream[core.StreamState]: ...


class Other(Protocol):
    def hello(self) -> str: ...


class Count(core.ProducerState):
    def __init__(self, n: int, end: str = "finish") -> None:
        self.n, self.end, self.i = n, end, 0

    def produce(self, out, ctx):
        if self.i == self.n:
            if self.end == "break":
                raise RuntimeError("the stream broke")
            out.finish()
            return
        ctx.client_log(core.Level.DEBUG, f"turn {self.i}")
        out.emit_pydict({"i": [self.i], "text": ["x" * self.i]})
        self.i += 1


class Nanos(core.ProducerState):
    done = False

    def produce(self, out, ctx):
        if self.done:
            out.finish()
            return
        self.done = True
        out.emit(NANOS)


NANOS = pa.record_batch(
    {
        "ts": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
        "utc": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns", tz="UTC")),
        "clock": pa.array([3_600_000_000_001], pa.time64("ns")),
        "span": pa.array([10_000_000_001], pa.duration("ns")),
        "ten": pa.array([10], pa.duration("s")),
        "kind": pa.array(["a"]).dictionary_encode(),
        "big": pa.array([[b"\\xff"]], pa.large_list(pa.large_binary())),
        "half": pa.Array.from_buffers(pa.float16(), 1, [None, pa.py_buffer(struct.pack("<e", 1.5))]),
        "halves": pa.StructArray.from_arrays(
            [pa.Array.from_buffers(pa.float16(), 1, [None, pa.py_buffer(struct.pack("<e", 1.5))])], ["x"]
        ),
        "nan": pa.array([float("nan")]),
    }
)


class Double(core.ExchangeState):
    def exchange(self, input, out, ctx):
        out.emit_pydict({"y": [2.0 * v.as_py() for v in input.batch.column("x")]})


COUNT = pa.schema([("i", pa.int64()), ("text", pa.utf8())])


class KitchenImpl:
    def flag(self, v): return v
    def paint(self, v): return v
    def raw(self, v): return v
    def at(self, v): return v
    def day(self, v): return v
    def clock(self, v): return v
    def span(self, v): return v
    def money(self, v): return v
    def tags(self, v): return v
    def prices(self, v): return v
    def numbered(self, v): return v
    def maybe(self, v): return v
    def points(self, v): return v
    def add(self, a, b): return a + b
    def scale(self, x, by=3): return x * by
    def nothing(self): pass
    def shift(self, p, by): return Point(p.x + by, p.y + by)

    def warn(self, text, ctx):
        ctx.client_log(core.Level.WARN, text)
        return len(text)

    def fail(self, text): raise LookupError(text)

    def slow(self, seconds):
        time.sleep(seconds)
        return 1

    def count(self, n): return core.Stream(COUNT, Count(n))
    def titled(self, n): return core.Stream(COUNT, Count(n), header=Point(1.5, -2.0))
    def breaks(self, n): return core.Stream(COUNT, Count(n, "break"))
    def nanos(self): return core.Stream(NANOS.schema, Nanos())
    def double(self):
        return core.Stream(pa.schema([("y", pa.float64())]), Double(), pa.schema([("x", pa.float64())]))
    def either(self, n): return core.Stream(COUNT, Count(n))


class OtherImpl:
    def hello(self): return "hi"


class Box:
    kitchen = KitchenImpl()


class NeedsArgument:
    def __init__(self, path): ...


def make(): return KitchenImpl()


def two(): return core.RpcServer(Kitchen, KitchenImpl(), extra_protocols=[(Other, OtherImpl())], enable_describe=True)


if __name__ == "__main__":
    core.run_server(two())
"""


class Place:
    """A directory with service.py, and how to run the command line in it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        (directory / "service.py").write_text(SERVICE, encoding="utf-8")
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.env = {**os.environ, "PYTHONPATH": path, "VGI_RPC_CORE": core.__name__, "PYTHONIOENCODING": "utf-8"}
        self.program = [sys.executable, "-m", core.__name__]
        self.worker = shlex.join([sys.executable, "service.py"])
        self.socket = str(directory / "s")

    def run(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.program, *args],
            cwd=self.path,
            env=self.env,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    def start(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.program, *args], cwd=self.path, env=self.env, text=True, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("cli"))
    flags = ("--unix", made.socket, "--idle-timeout", "0")
    with made.start("serve", "service:Kitchen", "service:KitchenImpl", *flags, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == f"UNIX:{made.socket}\n"
        yield made
        server.terminate()


class Ran:
    """What a run of main() left behind."""

    def __init__(self, status: int, out: bytes, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.decode().splitlines()]

    @property
    def result(self) -> Any:
        assert self.status == 0, self.err
        (row,) = self.lines
        return row["result"]


class Cli:
    """Runs main() in this process, against the module's server."""

    def __init__(self, place: Place, capfdbinary: pytest.CaptureFixture[bytes], patch: pytest.MonkeyPatch) -> None:
        self._where = ("--unix", place.socket)
        self._captured = capfdbinary
        self._patch = patch

    def __call__(self, *args: str, stdin: str = "", where: tuple[str, ...] | None = None) -> Ran:
        self._patch.setattr(sys, "stdin", io.StringIO(stdin))
        status = core.main([*(self._where if where is None else where), *args])
        sys.stdout.flush()
        out, err = self._captured.readouterr()
        return Ran(status, out, err.decode())


@pytest.fixture
def cli(place: Place, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(place, capfdbinary, monkeypatch)


# ---- values


@pytest.mark.parametrize(
    ("method", "text", "result"),
    [
        ("flag", "true", True),
        ("flag", "YES", True),
        ("flag", "1", True),
        ("flag", "on", False),
        ("paint", "BLUE", "BLUE"),
        ("raw", "/wBh", "/wBh"),
        ("at", "2026-01-02T03:04:05.000006", "2026-01-02T03:04:05.000006"),
        ("at", "2026-01-02", "2026-01-02T00:00:00"),
        ("day", "2026-01-02", "2026-01-02"),
        ("clock", "03:04:05.5", "03:04:05.500000"),
        ("span", "PT10S", "PT10S"),
        ("span", "PT0S", "PT0S"),
        ("span", "P1DT2H", "PT93600S"),
        ("span", "-PT1.5S", "-PT1.5S"),
        ("money", "-12345.60", "-12345.60"),
        ("tags", '["a", "ü"]', ["a", "ü"]),
        ("tags", "[]", []),
        ("prices", '{"a": 1, "b": 2.5}', {"a": 1.0, "b": 2.5}),
        ("numbered", '{"7": ["2026-01-02"]}', {"7": ["2026-01-02"]}),
        ("maybe", "9007199254740993", 9007199254740993),
        ("points", '[{"x": 1, "y": -0.5}]', [{"x": 1.0, "y": -0.5}]),
    ],
)
def test_values_come_back(cli: Cli, method: str, text: str, result: Any) -> None:
    assert cli("call", method, f"v={text}").result == result


@pytest.mark.parametrize(
    ("method", "value", "result"),
    [
        ("flag", "false", False),
        ("maybe", "null", None),
        ("raw", '"/wBh"', "/wBh"),
        ("day", '"2026-01-02"', "2026-01-02"),
        ("money", "1.5", "1.50"),
        ("numbered", '{"1": []}', {"1": []}),
    ],
)
def test_values_from_json(cli: Cli, method: str, value: str, result: Any) -> None:
    assert cli("call", method, "-j", f'{{"v": {value}}}').result == result


def test_text_is_taken_as_it_is(cli: Cli) -> None:
    text = 'a=b "ü" \t{'
    assert cli("call", "warn", f"text={text}").result == len(text)


def test_defaults_and_missing_parameters(cli: Cli) -> None:
    assert cli("call", "scale", "x=4").result == 12
    assert cli("call", "scale", "x=4", "by=-2").result == -8
    assert cli("call", "maybe").result is None
    ran = cli("call", "add", "a=1")
    assert ran.status == 2
    assert ran.err == "Error: Missing parameter 'b' (double): give b=VALUE\n"


def test_void_is_null(cli: Cli) -> None:
    assert cli("call", "nothing").out == b"null\n"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("add", "a=notint", "b=1"), "parameter 'a'"),
        (("scale", "x=1.5"), "parameter 'x'"),
        (("scale", "x=9223372036854775808"), "parameter 'x'"),
        (("at", "v=yesterday"), "parameter 'v'"),
        (("span", "v=P"), "parameter 'v'"),
        (("raw", "v=???"), "parameter 'v'"),
        (("money", "v=x"), "parameter 'v'"),
        (("money", "v=0.001"), "parameter 'v'"),
        (("tags", "v=a"), "parameter 'v'"),
        (("tags", "v={}"), "parameter 'v'"),
        (("prices", "v=[1]"), "parameter 'v'"),
        (("points", 'v=[{"z": 1}]'), "parameter 'v'"),
        (("numbered", 'v={"x": []}'), "parameter 'v'"),
        (("add", "-j", '{"a": "x", "b": 1}'), "parameter 'a'"),
        (("add", "-j", "[1]"), "--json"),
        (("add", "-j", "{"), "--json"),
        (("add", "-j", "{}", "a=1"), "--json"),
        (("add", "a=1", "zz=2"), "Unknown parameter 'zz'. Available: a, b"),
        (("nothing", "zz=2"), "Unknown parameter 'zz'. Available: (none)"),
        (("add", "a"), "Expected key=value, got: a"),
        ((), "METHOD"),
    ],
)
def test_misuse_of_call(cli: Cli, args: tuple[str, ...], text: str) -> None:
    ran = cli("call", *args)
    assert (ran.status, ran.out) == (2, b"")
    assert text in ran.err
    assert "Traceback" not in ran.err


def test_a_dataclass_parameter_is_bytes(cli: Cli) -> None:
    batch = pa.record_batch(
        {"x": [1.0], "y": [2.0]},
        schema=pa.schema([pa.field("x", pa.float64(), nullable=False), pa.field("y", pa.float64(), nullable=False)]),
    )
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    found = cli("call", "shift", f"p={base64.b64encode(sink.getvalue()).decode()}", "by=0.5").result
    assert pa.ipc.open_stream(base64.b64decode(found)).read_all().to_pylist() == [{"x": 1.5, "y": 2.5}]
    ran = cli("call", "shift", 'p={"x": 1, "y": 2}', "by=0.5")
    assert ran.status == 2
    assert "parameter 'p'" in ran.err


# ---- formats and output


def test_table(cli: Cli) -> None:
    assert cli("-f", "table", "call", "add", "a=1", "b=2").out == b"result\n------\n3.0\n"
    assert cli("-f", "table", "call", "titled", "n=2").out.decode() == (
        "Header:\n  x: 1.5\n  y: -2.0\n\ni  text\n-  ----\n0\n1  x\n"
    )


def test_arrow(cli: Cli, tmp_path: Path) -> None:
    table = pa.ipc.open_stream(cli("-f", "arrow", "call", "add", "a=1", "b=2").out).read_all()
    assert table.to_pydict() == {"result": [3.0]}
    file = tmp_path / "out.arrow"
    assert cli("call", "titled", "n=3", "-f", "arrow", "-o", str(file)).out == b""
    with file.open("rb") as source:
        header = pa.ipc.open_stream(source).read_all()
        data = pa.ipc.open_stream(source).read_all()
        assert source.read() == b""
    assert header.to_pylist() == [{"x": 1.5, "y": -2.0}]
    assert data.to_pydict() == {"i": [0, 1, 2], "text": ["", "x", "xx"]}


def test_arrow_of_an_empty_stream_has_the_schema(cli: Cli) -> None:
    assert pa.ipc.open_stream(cli("-f", "arrow", "call", "count", "n=0").out).read_all().schema.names == ["i", "text"]


def test_output_goes_to_the_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert cli("-o", str(file), "call", "tags", 'v=["ü"]').out == b""
    assert json.loads(file.read_text(encoding="utf-8")) == {"result": ["ü"]}
    ran = cli("-o", str(tmp_path / "none" / "x"), "call", "nothing")
    assert ran.status == 1
    assert "No such file or directory" in ran.err


def test_options_before_and_after(cli: Cli) -> None:
    want = b"result\n------\n3.0\n"
    assert cli("call", "add", "a=1", "b=2", "--format", "table").out == want
    assert cli("call", "add", "--format", "table", "a=1", "b=2").out == want
    assert cli("call", "add", "a=1", "-f", "table", "b=2").out == want
    assert cli("call", "-f", "table", "add", "a=1", "b=2").out == want
    assert cli("-f", "json", "call", "add", "a=1", "b=2", "-f", "table").out == want


# ---- streams


def test_producer(cli: Cli) -> None:
    assert cli("call", "count", "n=3").lines == [{"i": i, "text": "x" * i} for i in range(3)]


def test_header_comes_first(cli: Cli) -> None:
    assert cli("call", "titled", "n=1").lines == [{"__header__": {"x": 1.5, "y": -2.0}}, {"i": 0, "text": ""}]


def test_every_kind_of_value_has_a_json_form(cli: Cli) -> None:
    ran = cli("call", "nanos")
    assert ran.status == 0, ran.err
    (row,) = ran.lines
    assert row["ts"] == "2023-11-14T22:13:20.123456789"
    assert row["utc"] == "2023-11-14T22:13:20.000000001+00:00"
    assert row["clock"] == "01:00:00.000000001"
    assert (row["span"], row["ten"]) == ("PT10.000000001S", "PT10S")
    assert (row["kind"], row["big"], row["half"], row["halves"]) == ("a", ["/w=="], 1.5, {"x": 1.5})


def test_exchange(cli: Cli) -> None:
    ran = cli("call", "double", stdin='{"x": 1.5}\n\n{"x": 2}\n{"x": -1}\n')
    assert (ran.status, ran.err) == (0, "")
    assert ran.lines == [{"y": 3.0}, {"y": 4.0}, {"y": -2.0}]


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_exchange_from_a_file(cli: Cli, tmp_path: Path, writer: Any) -> None:
    file = tmp_path / "in.arrow"
    with writer(str(file), pa.schema([("x", pa.float64())])) as out:
        out.write_batch(pa.record_batch({"x": [1.0, 2.0]}))
        out.write_batch(pa.record_batch({"x": [5.0]}))
    assert cli("call", "double", "-i", str(file)).lines == [{"y": 2.0}, {"y": 4.0}, {"y": 10.0}]


def test_exchange_without_input(cli: Cli) -> None:
    assert cli("call", "double", "--no-stdin", stdin='{"x": 1}').out == b""
    assert cli("call", "double").out == b""


@pytest.mark.parametrize("line", ['{"x": "text"}', "nonsense", "[1]", '{"z": 1}', '{"x": {}}'])
def test_a_bad_line_is_named(cli: Cli, line: str) -> None:
    ran = cli("call", "double", stdin=f'{{"x": 1.5}}\n{line}\n{{"x": 9.0}}\n')
    assert ran.status == 1
    assert ran.lines == [{"y": 3.0}]
    assert "line 2" in ran.err
    assert "Traceback" not in ran.err


def test_a_file_that_is_not_arrow(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "in.arrow"
    file.write_bytes(b"not arrow at all")
    for name, text in ((str(file), "--input"), (str(tmp_path / "absent"), "No such file")):
        ran = cli("call", "double", "-i", name)
        assert (ran.status, ran.out) == (1, b"")
        assert text in ran.err


def test_a_stream_that_breaks_shows_what_came_before(cli: Cli) -> None:
    ran = cli("call", "breaks", "n=2")
    assert ran.status == 1
    assert [row["i"] for row in ran.lines] == [0, 1]
    error = json.loads(ran.err)["error"]
    assert error["type"] == "RuntimeError"
    assert "the stream broke" in error["message"]


def test_a_stream_of_unknown_kind_is_ticked_when_there_is_no_input(cli: Cli) -> None:
    assert [row["i"] for row in cli("call", "either", "n=2", "--no-stdin").lines] == [0, 1]


# ---- describe, loggers, logs


def test_describe(cli: Cli) -> None:
    (found,) = cli("describe").lines
    assert list(found) == [
        "protocol_name",
        "server_id",
        "request_version",
        "describe_version",
        "protocol_hash",
        "protocol_version",
        "methods",
    ]
    assert (found["protocol_name"], found["request_version"]) == ("Kitchen", "1")
    assert len(found["protocol_hash"]) == 64
    assert found["methods"]["add"] == {
        "method_type": "unary",
        "has_return": True,
        "params_schema": "a: double not null\nb: double not null",
        "result_schema": "result: double not null",
    }
    text = cli("describe", "-f", "table").out.decode()
    assert text.startswith("RPC Service: Kitchen\n")
    assert "add(a: double, b: double) -> double" in text


def test_loggers(cli: Cli) -> None:
    (found,) = cli("loggers", where=()).lines
    assert {"vgi_rpc.access", "vgi_rpc.wire.request"} <= {row["name"] for row in found}
    assert all(list(row) == ["name", "description", "scenario"] for row in found)
    table = cli("-f", "table", "loggers", where=()).out.decode().splitlines()
    assert table[0].split() == ["name", "description", "scenario"]
    assert len(table) == len(found) + 2


def test_messages_of_the_server(cli: Cli) -> None:
    ran = cli("call", "warn", "text=hm\x1b[2J", "-v")
    assert ran.result == 6
    assert ran.err == "[WARN] hm\\x1b[2J\n"
    assert cli("call", "warn", "text=hm").err == ""


def test_debug_and_loggers(cli: Cli) -> None:
    ran = cli("--debug", "call", "add", "a=1", "b=2")
    assert "vgi_rpc.wire.request" in ran.err
    assert "vgi_rpc.wire.batch" in ran.err
    ran = cli("--log-logger", "vgi_rpc.wire.request", "call", "add", "a=1", "b=2", "--log-format", "json")
    records = [json.loads(line) for line in ran.err.splitlines()]
    assert {record["logger"] for record in records} == {"vgi_rpc.wire.request"}
    ran = cli("--log-logger", "x", "call", "add", "a=1", "b=2", "--log-logger", "y")
    assert ran.err.splitlines() == ["Warning: unknown logger 'x'", "Warning: unknown logger 'y'"]
    assert cli("--log-level", "ERROR", "call", "nothing").err == ""


# ---- what goes wrong


def test_remote_error(cli: Cli) -> None:
    ran = cli("call", "fail", "text=ü")
    assert (ran.status, ran.out) == (1, b"")
    error = json.loads(ran.err)["error"]
    assert set(error) == {"type", "message", "traceback"}
    assert error["type"] == "LookupError"
    assert "ü" in error["message"]


def test_unknown_method(cli: Cli) -> None:
    ran = cli("call", "nope")
    assert (ran.status, ran.out) == (1, b"")
    assert ran.err.startswith("Error: Unknown method 'nope'. Available: add, at, breaks,")


def test_timeout(cli: Cli) -> None:
    ran = cli("call", "slow", "seconds=30", "--timeout", "0.3")
    assert ran.status == 1
    assert json.loads(ran.err)["error"]["type"] == "DeadlineExceededError"


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (("describe",), 1, "Either --url, --cmd, or --unix is required"),
        (("--cmd", "x", "--unix", "y", "describe"), 2, "not allowed with argument"),
        (("--cmd", "x", "describe", "--tcp", "h:1"), 2, "not allowed with argument"),
        (("--url", "http://127.0.0.1:1", "describe"), 1, "Connection refused"),
        (("--cmd", "/nonexistent/program", "describe"), 1, "Error: [Errno 2]"),
        (("--cmd", "'", "describe"), 2, "--cmd"),
        (("--cmd", " ", "describe"), 2, "--cmd"),
        (("--unix", "/nonexistent/s", "describe"), 1, "Error: [Errno 2]"),
        (("--tcp", "127.0.0.1:1", "describe"), 1, "Connection refused"),
        (("--tcp", "h:port", "describe"), 1, "--tcp"),
        (("--timeout", "0", "loggers"), 2, "--timeout"),
        (("--timeout", "nan", "loggers"), 2, "--timeout"),
        (("--format", "xml", "loggers"), 2, "--format"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_misuse(cli: Cli, args: tuple[str, ...], status: int, text: str) -> None:
    ran = cli(*args, where=())
    assert (ran.status, ran.out) == (status, b"")
    assert text in ran.err
    assert "Traceback" not in ran.err


def test_no_command_is_help(cli: Cli) -> None:
    ran = cli(where=())
    assert ran.status == 2
    assert "describe" in ran.out.decode() + ran.err


def test_version(cli: Cli) -> None:
    for args in (("--version",), ("-V",), ("describe", "--version")):
        ran = cli(*args, where=())
        assert ran.status == 0
        assert ran.out.decode().startswith(f"vgi-rpc {core.__version__} (")
        assert core.__file__ in ran.out.decode()


def test_a_server_that_does_not_describe_itself(cli: Cli, place: Place, tmp_path: Path) -> None:
    (tmp_path / "mute.py").write_text(SERVICE.replace("enable_describe=True", "enable_describe=False"))
    ran = place.run("--cmd", shlex.join([sys.executable, str(tmp_path / "mute.py")]), "describe")
    assert (ran.returncode, ran.stdout) == (1, "")
    message = json.loads(ran.stderr)["error"]["message"]
    assert "--describe" in message
    assert "enable_describe=True" in message


def test_a_worker_that_is_no_worker(place: Place) -> None:
    ran = place.run("--cmd", shlex.join([sys.executable, "-c", "print('hello')"]), "--timeout", "20", "describe")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "error" in json.loads(ran.stderr.splitlines()[-1])
    assert "Traceback (most recent" not in ran.stderr


def test_a_program_that_says_nothing_is_given_up(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_CLI_PATIENCE", 1.0)
    began = time.monotonic()
    ran = cli("describe", where=("--cmd", shlex.join([sys.executable, "-c", "import time; time.sleep(60)"])))
    assert time.monotonic() - began < 20
    assert (ran.status, ran.out) == (1, b"")
    error = json.loads(ran.err)["error"]
    assert error["type"] == "DeadlineExceededError"
    assert error["message"] == "no answer within 1 s; a worker calls run_server(); --timeout S waits longer"
    assert cli("call", "slow", "seconds=1.5").status == 0  # a call may last
    ran = cli("describe", "--help")
    assert "by default 1 to describe itself, then no limit" in " ".join(ran.out.decode().split())


def test_credentials_are_for_http(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGI_RPC_TOKEN", "t")
    assert cli("call", "add", "a=1", "b=2").result == 3.0
    ran = cli("call", "add", "a=1", "b=2", "--header", "X: y")
    assert (ran.status, ran.err) == (2, "Error: --header goes with --url\n")


# ---- as a program


def test_several_protocols(place: Place) -> None:
    for name, method in (("Kitchen", "nothing"), ("Other", "hello")):
        ran = place.run("--cmd", place.worker, "--protocol", name, "describe")
        assert json.loads(ran.stdout)["protocol_name"] == name
        assert method in json.loads(ran.stdout)["methods"]
    ran = place.run("call", "hello", "--cmd", place.worker, "--protocol", "Other")
    assert ran.stdout == '{"result": "hi"}\n'
    ran = place.run("describe", "--cmd", place.worker, "--protocol", "Absent")
    assert ran.returncode == 1
    assert "Absent" in json.loads(ran.stderr)["error"]["message"]


def test_tcp(place: Place) -> None:
    with place.start("serve", "service:Kitchen", "service:KitchenImpl", "--tcp", "0", stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("TCP:127.0.0.1:")
        ran = place.run("--tcp", line.strip().removeprefix("TCP:"), "call", "add", "a=1", "b=2")
        server.terminate()
    assert ran.stdout == '{"result": 3.0}\n'


@pytest.mark.parametrize(
    "args",
    [
        ("service:Kitchen", "service:Box.kitchen"),
        ("service:Kitchen", "service:make", "--factory"),
        ("--factory", "service:Kitchen", "service:make"),
    ],
)
def test_serve_over_stdio(place: Place, args: tuple[str, ...]) -> None:
    command = shlex.join([*place.program, "serve", *args])
    ran = place.run("--cmd", command, "call", "scale", "x=5")
    assert (ran.stdout, ran.stderr) == ('{"result": 15}\n', "")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("absent:Kitchen", "service:KitchenImpl"), "absent"),
        (("service.deeper:Kitchen", "service:KitchenImpl"), "service"),
        (("service:Absent", "service:KitchenImpl"), "Absent"),
        (("service:Kitchen", "service:Box.absent"), "absent"),
        (("service", "service:KitchenImpl"), "MODULE:NAME"),
        (("service:make", "service:KitchenImpl"), "not a Protocol class"),
        (("service:Kitchen", "service:OtherImpl"), "add"),
        (("service:Kitchen", "service:NeedsArgument"), "path"),
    ],
)
def test_misuse_of_serve(place: Place, args: tuple[str, ...], text: str) -> None:
    ran = place.run("serve", *args)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert text in ran.stderr
    assert "Traceback" not in ran.stderr


def test_demo(place: Place) -> None:
    ran = place.run("demo")
    assert (ran.returncode, ran.stderr) == (0, "")
    for text in ("= 3.5", "ZeroDivisionError", "RPC Service: Calc", "[INFO]", "add(a: double, b: double) -> double"):
        assert text in ran.stdout


def test_a_copied_file_works_as_a_script(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "anything.py"
    script.write_bytes(Path(core.__file__).read_bytes())
    ran = subprocess.run(
        [sys.executable, str(script), "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "RPC Service: Calc" in ran.stdout


def test_head_ends_an_endless_stream_quietly(place: Place) -> None:
    count = ("call", "count", "n=1000000000", "--unix", place.socket)
    with place.start(*count, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        assert json.loads(ran.stdout.readline())["i"] == 0
        ran.stdout.close()
        assert ran.stderr.read() == ""
        assert ran.wait(30) == 0


def test_rows_are_written_as_they_arrive(place: Place) -> None:
    double = ("call", "double", "--unix", place.socket)
    with place.start(*double, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as ran:
        assert ran.stdin is not None and ran.stdout is not None
        for x in (1.0, 2.0):
            ran.stdin.write(json.dumps({"x": x}) + "\n")
            ran.stdin.flush()
            assert json.loads(ran.stdout.readline()) == {"y": 2 * x}
        ran.stdin.close()
        assert ran.wait(30) == 0


@pytest.mark.parametrize("over", ["unix", "cmd"])
def test_interrupt(place: Place, over: str) -> None:
    where = ("--unix", place.socket) if over == "unix" else ("--cmd", place.worker)
    began = time.monotonic()
    call = ("call", "count", "n=1000000000", *where)
    with place.start(*call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        ran.stdout.readline()
        os.killpg(ran.pid, signal.SIGINT)  # as a terminal does: the worker gets it too
        ran.stdout.read()
        errors = ran.stderr.read()
        assert ran.wait(30) == 130
    assert '"error"' not in errors
    assert over == "cmd" or errors == ""
    assert time.monotonic() - began < 20


def test_progress_on_a_terminal(place: Place) -> None:
    pty = pytest.importorskip("pty")
    main, terminal = pty.openpty()
    count = ("call", "count", "n=1000000000", "--unix", place.socket)
    with place.start(*count, stdout=subprocess.DEVNULL, stderr=terminal, start_new_session=True) as ran:
        os.close(terminal)
        shown = b""
        while b"rows" not in shown:
            shown += os.read(main, 4096)
        os.killpg(ran.pid, signal.SIGINT)
        assert ran.wait(30) == 130
    os.close(main)
    for text in (b"batches", b"rows", b"B", b"/s"):
        assert text in shown


def test_rows_of_json() -> None:
    schema = pa.schema([("n", pa.int64()), ("when", pa.date32()), ("raw", pa.binary())])
    row = {"n": 5, "when": "2026-01-02", "raw": "AQI="}
    batch = core.batch_from_json(row, schema)
    assert core.batch_to_json(batch) == [row]
    assert core.batch_to_json(core.batch_from_json({}, schema)) == [{"n": None, "when": None, "raw": None}]
    with pytest.raises(ValueError, match="'n' is not a valid int64"):
        core.batch_from_json({"n": "x"}, schema)
    with pytest.raises(ValueError, match="unknown: z"):
        core.batch_from_json({"z": 1}, schema)
