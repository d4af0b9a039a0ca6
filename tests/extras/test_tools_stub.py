"""Protocols from descriptions: on every transport, checked by mypy and pyright, with whatever names a peer sends."""

from __future__ import annotations

import ast
import contextlib
import datetime
import decimal
import importlib.util
import keyword
import os
import shlex
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core import core
from tests.test_05_types_property import KINDS

tool: Any = getattr(core, "_extras_load")("tools.stub", "the stub command")  # noqa: B009

SERVICE = """
from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import importlib
import os
from typing import Annotated, ClassVar, Protocol

import pyarrow as pa

core = importlib.import_module(os.environ["CORE_OF_THE_TEST"])


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Inner(core.ArrowSerializableDataclass):
    int: float
    day: datetime.date | None


@dataclasses.dataclass(frozen=True)
class Outer(core.ArrowSerializableDataclass):
    name: str
    inner: Inner
    color: Color
    many: list[Inner]


Small = Annotated[int, core.ArrowType(pa.int8())]
Money = Annotated[decimal.Decimal, core.ArrowType(pa.decimal128(12, 2))]
Zoned = Annotated[datetime.datetime, core.ArrowType(pa.timestamp("ms", tz="Europe/Berlin"))]
Wide = Annotated[list[int], core.ArrowType(pa.large_list(pa.int16()))]
Loose = Annotated[dict, core.ArrowType(pa.struct([pa.field("a b", pa.int32()), pa.field("class", pa.utf8())]))]


class Kitchen(Protocol):
    protocol_name: ClassVar[str] = "demo.Kitchen.v1"
    protocol_version: ClassVar[str] = "1.2.3"

    def add(self, a: float, b: float = 2.0) -> float: ...
    def nothing(self) -> None: ...
    def maybe(self, v: int | None) -> str | None: ...
    def list(self, v: list[str]) -> dict[str, Small]: ...
    def int(self, v: Small) -> list[int]: ...
    def pa(self, v: bytes) -> dict[int, list[Money]]: ...
    def Annotated(self, v: Color) -> Color: ...
    def when(self, v: Zoned, day: datetime.date, at: datetime.time, span: datetime.timedelta) -> datetime.datetime: ...
    def outer(self, v: list[Outer]) -> dict[str, Outer]: ...
    def packed(self, v: Inner) -> Inner: ...
    def wide(self, v: Wide | None) -> Wide: ...
    def loose(self, v: Loose) -> Loose: ...
    def count(self, n: int) -> core.Stream[core.ProducerState]: ...
    def titled(self, n: int) -> core.Stream[core.ProducerState, Outer]: ...
    def double(self) -> core.Stream[core.ExchangeState]: ...
    def either(self) -> core.Stream[core.StreamState]: ...


@dataclasses.dataclass
class Count(core.ProducerState):
    left: int

    def produce(self, out, ctx):
        if self.left == 0:
            return out.finish()
        out.emit_pydict({"left": [self.left]})
        self.left -= 1


@dataclasses.dataclass
class Double(core.ExchangeState):
    def exchange(self, input, out, ctx):
        out.emit_pydict({"y": [2 * v for v in input.batch.column("x").to_pylist()]})


NUMBER = pa.schema([("left", pa.int64())])
INNER = Inner(1.5, None)


class KitchenImpl:
    def add(self, a, b): return a + b
    def nothing(self): pass
    def maybe(self, v): return None if v is None else str(v)
    def list(self, v): return {text: len(text) for text in v}
    def int(self, v): return [v, v]
    def pa(self, v): return {len(v): [decimal.Decimal("1.50")]}
    def Annotated(self, v): return {Color.RED: Color.BLUE, Color.BLUE: Color.RED}[v]
    def when(self, v, day, at, span): return datetime.datetime.combine(day, at) + span
    def outer(self, v): return {item.name: item for item in v}
    def packed(self, v): return Inner(v.int + 1, v.day)
    def wide(self, v): return [1] if v is None else v[::-1]
    def loose(self, v): return v
    def count(self, n) -> core.Stream[Count]: return core.Stream(NUMBER, Count(n))
    def titled(self, n) -> core.Stream[Count, Outer]:
        return core.Stream(NUMBER, Count(n), header=Outer("o", INNER, Color.RED, [INNER]))
    def double(self) -> core.Stream[Double]:
        return core.Stream(pa.schema([("y", pa.int64())]), Double(), pa.schema([("x", pa.int64())]))
    def either(self) -> core.Stream[Count]: return core.Stream(NUMBER, Count(1))


if __name__ == "__main__":
    core.run_server(Kitchen, KitchenImpl())
"""


class Service:
    """The rich service, as a command and on a socket of each kind."""

    def __init__(self, where: Path) -> None:
        self.where = where
        (where / "service.py").write_text(SERVICE, encoding="utf-8")
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.env = {**os.environ, "PYTHONPATH": path, "CORE_OF_THE_TEST": core.__name__}
        self.command = [sys.executable, str(where / "service.py"), "--describe"]

    @contextlib.contextmanager
    def started(self, *flags: str) -> Iterator[str]:
        """Run the service on a socket; yields its first line."""
        command = [*self.command, *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=self.env, cwd=self.where, text=True) as server:
            assert server.stdout is not None
            try:
                yield server.stdout.readline().strip()
            finally:
                server.terminate()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORE_OF_THE_TEST", core.__name__)  # for workers that main() starts
        yield Service(tmp_path_factory.mktemp("stub"))


def imported(source: str | Path) -> Any:
    """The module of a generated file."""
    path = Path(source)
    spec = importlib.util.spec_from_file_location(f"generated_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def executed(text: str) -> dict[str, Any]:
    """The names that a generated text defines."""
    module = types.ModuleType("generated")
    sys.modules[module.__name__] = module
    exec(compile(text.encode(), "generated.py", "exec"), module.__dict__)
    return module.__dict__


def called(proxy: Any, module: Any) -> None:
    """Call everything the rich service has."""
    assert proxy.add(a=1.0, b=2.0) == 3.0
    assert proxy.nothing() is None
    assert (proxy.maybe(v=None), proxy.maybe(v=3)) == (None, "3")
    assert proxy.list(v=["a", "bcd"]) == {"a": 1, "bcd": 3}
    assert proxy.int(v=-7) == [-7, -7]
    assert proxy.pa(v=b"ab") == {2: [decimal.Decimal("1.50")]}
    assert proxy.Annotated(v="RED") == "BLUE"
    day, at = datetime.date(2026, 1, 2), datetime.time(3, 4, 5, 6)
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    assert proxy.when(v=now, day=day, at=at, span=datetime.timedelta(days=1)) == datetime.datetime(
        2026, 1, 3, 3, 4, 5, 6
    )
    inner = module.OuterVInner(int=1.5, day=day)
    outer = module.OuterV(name="n", inner=inner, color="BLUE", many=[inner, inner])
    assert proxy.outer(v=[outer]) == {"n": outer}
    packed = module.OuterVInner.deserialize_from_bytes(proxy.packed(v=inner.serialize_to_bytes()))
    assert packed == module.OuterVInner(int=2.5, day=day)
    assert (proxy.wide(v=None), proxy.wide(v=[1, 2])) == ([1], [2, 1])
    assert proxy.loose(v={"a b": 1, "class": None}) == {"a b": 1, "class": None}
    with proxy.count(n=2) as stream:
        assert [item.batch.to_pydict() for item in stream] == [{"left": [2]}, {"left": [1]}]
    with proxy.titled(n=1) as stream:
        assert stream.header.inner == module.OuterVInner(int=1.5, day=None)
        assert len(list(stream)) == 1
    with proxy.double() as stream:
        assert stream.exchange(core.AnnotatedBatch.from_pydict({"x": [4]})).batch.to_pydict() == {"y": [8]}
    with proxy.either() as stream:
        assert len(list(stream)) == 1


@pytest.mark.parametrize("kind", ["cmd", "unix", "tcp", "url"])
def test_a_generated_file_calls_the_service(service: Service, tmp_path: Path, kind: str) -> None:
    if kind == "url":
        pytest.importorskip("falcon")
        pytest.importorskip("waitress")
    out = tmp_path / "kitchen.py"
    unix = str(tmp_path / "s")
    flags = {"cmd": (), "unix": ("--unix", unix), "tcp": ("--tcp", "0"), "url": ("--http",)}[kind]
    with service.started(*flags) if flags else contextlib.nullcontext("") as said:
        port = said.rpartition(":")[2]
        where = {"unix": unix, "tcp": f"127.0.0.1:{port}", "url": f"http://127.0.0.1:{port}"}
        assert core.main(["stub", f"--{kind}", where.get(kind, shlex.join(service.command)), "-o", str(out)]) == 0
        module = imported(out)
        doors = {
            "cmd": lambda: core.connect(module.Kitchen, service.command),
            "unix": lambda: core.unix_connect(module.Kitchen, unix),
            "tcp": lambda: core.tcp_connect(module.Kitchen, "127.0.0.1", int(port)),
            "url": lambda: core.http_connect(module.Kitchen, where["url"]),
        }
        with doors[kind]() as proxy:
            called(proxy, module)


@pytest.fixture(scope="module")
def description(service: Service) -> Any:
    transport = core.SubprocessTransport(service.command)
    try:
        return core.introspect(transport)
    finally:
        transport.close()


def test_a_protocol_at_run_time_calls_the_service(service: Service, description: Any) -> None:
    draft = tool._Draft(description)
    module = types.SimpleNamespace(**{made.__name__: made for made in draft.classes.values()})
    with core.connect(draft.protocol, service.command) as proxy:
        called(proxy, module)
    made = core.protocol_from_description(description)
    assert (made.__name__, made.protocol_name, made.protocol_version) == ("Kitchen", "demo.Kitchen.v1", "1.2.3")
    assert core.compute_protocol_hash(made.protocol_name, core.rpc_methods(made)) == description.protocol_hash


def test_what_the_file_says(description: Any) -> None:
    text = core.generate_stub(description)
    assert f'hash "{description.protocol_hash}"\n#   The Protocol below has the same hash.' in text
    assert "defaults and docstrings: every argument has to be given" in text
    assert "`bytes`, an Arrow IPC stream" in text and "a batch brings its schema" in text
    assert "Left out" not in text
    assert "    def add(self, a: float, b: float) -> float: ...\n" in text
    assert "    def packed(self, v: bytes) -> bytes: ...\n" in text
    assert max(map(len, text.splitlines())) <= 200


USE = """
from __future__ import annotations

from typing import assert_type

from CORE import AnnotatedBatch, connect
from kitchen import Kitchen, OuterV, OuterVInner

with connect(Kitchen, ["python", "service.py"]) as kitchen:
    assert_type(kitchen.add(a=1.0, b=2.0), float)
    assert_type(kitchen.maybe(v=None), str | None)
    assert_type(kitchen.list(v=["a"]), dict[str, int])
    assert_type(kitchen.int(v=3), list[int])
    assert_type(kitchen.outer(v=[OuterV("n", OuterVInner(1.5, None), "RED", [])]), dict[str, OuterV])
    assert_type(kitchen.packed(v=b""), bytes)
    with kitchen.count(n=1) as stream:
        for item in stream:
            assert_type(item, AnnotatedBatch)
    with kitchen.double() as exchange:
        exchange.exchange(AnnotatedBatch.from_pydict({"x": [1]}))
    kitchen.add(a="x", b=2.0)  # type: ignore[arg-type]
"""


def checked(where: Path, *command: str) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    ran = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=110)
    if any(text in ran.stdout + ran.stderr for text in ("npm ERR", "getaddrinfo", "URLError")):
        pytest.skip("pyright cannot fetch its Node program without a network")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_checkers_accept_the_file(description: Any, tmp_path: Path, checker: str) -> None:
    program = Path(sys.executable).parent / checker
    if not program.exists():
        pytest.skip(f"{checker} is not installed; pip install -e . --group dev")
    copy = tmp_path.joinpath(*core.__name__.split(".")).with_suffix(".py")
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(core.__file__), copy)
    (tmp_path / "kitchen.py").write_text(core.generate_stub(description))
    (tmp_path / "use.py").write_text(USE.replace("CORE", core.__name__))
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-pyarrow.*]\nignore_missing_imports = True\n")
    options = {"mypy": ["--strict", "--python-executable"], "pyright": ["--pythonpath"]}[checker]
    checked(tmp_path, str(program), *options, sys.executable, "kitchen.py", "use.py")


# ---- names that Python does not take


def method(name: str, params: pa.Schema = core.EMPTY_SCHEMA, **more: Any) -> Any:
    settings_ = {"has_return": False, "result_schema": core.EMPTY_SCHEMA, "method_type": core.MethodType.UNARY, **more}
    return core.MethodDescription(name=name, params_schema=params, **settings_)


def service_of(*methods: Any, name: str = "Odd", **more: Any) -> Any:
    fields = {"request_version": "1", "describe_version": "5", "protocol_hash": "0" * 64, "server_id": "", **more}
    return core.ServiceDescription(protocol_name=name, methods={m.name: m for m in methods}, **fields)


def columns(*names: str) -> Any:
    return pa.schema([pa.field(name, pa.int64(), nullable=False) for name in names])


HEADER = {"has_header": True, "method_type": core.MethodType.STREAM}
LEFT_OUT = [
    (method("my-method"), 'the method name "my-method" is not a Python identifier'),
    (method("class"), 'the method name "class" is not a Python identifier'),
    (method(""), 'the method name "" is not a Python identifier'),
    (method("ﬁnd"), 'the method name "ﬁnd" reads as another name in Python'),
    (method("_hidden"), "the name means something else in a Protocol"),
    (method("protocol_version"), "the name means something else in a Protocol"),
    (method("f", columns("a b")), 'the parameter name "a b" is not a Python identifier'),
    (method("f", columns("lambda")), 'the parameter name "lambda" is not a Python identifier'),
    (method("f", columns("self")), "a parameter is called 'self'"),
    (method("f", columns("ctx")), "a parameter is called 'ctx'"),
    (method("f", columns("__debug__")), "a parameter is called '__debug__'"),
    (method("f", pa.schema([("a", pa.list_(pa.decimal32(5, 2)))])), 'the type "decimal32(5, 2)" has no name here'),
    (method("f", columns("a", "a")), "two of its parameters have the same name"),
    (method("f", has_return=True), "its result has 0 columns"),
    (method("f", header_schema=columns("serialize"), **HEADER), 'a column is called "serialize"'),
    (method("f", header_schema=columns("a", "a"), **HEADER), "two columns of a record have the same name"),
    (method("f", header_schema=columns("if"), **HEADER), 'the column name "if" is not a Python identifier'),
    (
        method("f", pa.schema([("a", pa.opaque(pa.utf8(), "t\n", "v"))])),
        'the extension type "arrow.opaque" has no name',
    ),
]


@pytest.mark.parametrize(("odd", "why"), LEFT_OUT, ids=[why[:50] for _, why in LEFT_OUT])
def test_what_python_cannot_say_is_left_out(odd: Any, why: str) -> None:
    desc = service_of(odd, method("fine", columns("a")))
    text = tool.generate_stub(desc)
    made = executed(text)["Odd"]
    assert list(core.rpc_methods(made)) == ["fine"] == list(core.rpc_methods(tool.protocol_from_description(desc)))
    assert f": {why}" in text
    assert "has another hash, because methods are left out: " in text


@pytest.mark.parametrize("name", ["", "a b", "x\nimport os", "a" * 300])
def test_a_protocol_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Protocol name"):
        tool.generate_stub(service_of(name=name))


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid protocol version"):
        tool.protocol_from_description(service_of(protocol_version='1.0"\nimport os'))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo.Calc.v1", "Calc"),
        ("Calc", "Calc"),
        ("a.class", "a"),
        ("v1", "Service"),
        ("class", "Service"),
        ("__debug__", "Service"),
        ("x.", "x"),
    ],
)
def test_class_names(name: str, expected: str) -> None:
    made = tool.protocol_from_description(service_of(name=name))
    assert made.__name__ == expected
    assert executed(tool.generate_stub(service_of(name=name)))[expected].__dict__.get("protocol_name", expected) == name


HIDING: tuple[str, ...] = (
    "int",
    "str",
    "list",
    "dict",
    "bytes",
    "float",
    "pa",
    "datetime",
    "decimal",
    "uuid",
    "Mapping",
    "Any",
)
HIDING += ("Annotated", "ClassVar", "Protocol", "Stream", "ArrowType", "ProducerState", "dataclass", "HeadHeader")


def test_methods_that_are_called_like_what_the_file_uses() -> None:
    struct = pa.struct([pa.field("Stream", pa.date32()), pa.field("bool", pa.bool_())])
    params = pa.schema(
        [
            pa.field("a", pa.list_(struct), nullable=False),
            pa.field("b", pa.map_(pa.utf8(), pa.binary()), nullable=False),
            pa.field("c", pa.decimal128(9, 2)),
            pa.field("d", pa.struct([("x", pa.float64())])),
            pa.field("e", pa.null()),
            pa.field("f", pa.timestamp("us")),
            pa.field("bool", pa.bool_(), nullable=False),
        ]
    )
    head = method("head", params, header_schema=columns("n"), is_exchange=False, **HEADER)
    desc = service_of(head, *(method(name, params) for name in HIDING), name="demo.Protocol.v1")
    space = executed(tool.generate_stub(desc))
    found = core.rpc_methods(space["Protocol"])
    assert set(found) == {"head", *HIDING}
    assert all(info.params_schema.equals(params) for info in found.values())
    assert space["HeadHeader_"].ARROW_SCHEMA.equals(head.header_schema)


def test_another_hash_is_told() -> None:
    """As after an extension type that is not registered here: it arrives as its storage type."""
    desc = service_of(method("fine", columns("a")))
    own = core.compute_protocol_hash("Odd", core.rpc_methods(tool.protocol_from_description(desc)))
    text = tool.generate_stub(desc)
    assert f"has another hash, because the service has types that arrive here as others: {own}\n" in text


# ---- nothing that a peer says becomes code

EVIL = [
    '"""\nimport os\nos.abort()\n"""',
    "# coding: utf-7",
    "x\r\nimport os",
    "x\x0cimport os",
    "x\u2028import os",
    "\\",
    "'\"",
    "}{__import__('os')}",
    "\ud800",
]
ALLOWED = (ast.Expr, ast.Import, ast.ImportFrom, ast.ClassDef)


def assert_harmless(text: str) -> None:
    """The file declares, and does nothing else."""
    data = text.encode()
    assert b"coding" not in b"\n".join(data.splitlines()[:2])
    for node in ast.parse(data).body:
        assert isinstance(node, ALLOWED)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            known = {*tool._WHERE.values(), *tool._MODULES.values(), core.__name__, "__future__"}
            assert set(names) <= known
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant)
        else:
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    assert [ast.unparse(line) for line in member.body] == ["..."] and not member.decorator_list
                    assert not member.args.defaults
                else:
                    assert isinstance(member, ast.AnnAssign | ast.Pass)
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Call)}
    assert {call.rpartition(".")[0] for call in calls} <= {"", "pa", "_pa"}
    assert {call for call in calls if "." not in call} <= {"ArrowType", "_ArrowType", "dataclass", "_dataclass"}


PEER_TEXT = st.sampled_from(EVIL) | st.text(max_size=20)


def hostile(text: str) -> Any:
    """A description that says `text` wherever a peer may say anything."""
    inner = pa.struct([pa.field(text, pa.int64()), pa.field("ok", pa.utf8())])
    with contextlib.suppress(UnicodeEncodeError):
        inner = pa.struct([pa.field("t", pa.timestamp("us", tz=text)), *inner])
    params = pa.schema([pa.field("a", inner), pa.field("b", pa.list_(inner))])
    header = {"header_schema": pa.schema([pa.field(text, inner)]), **HEADER}
    return service_of(
        method(text),
        method("f", pa.schema([pa.field(text, pa.int64())])),
        method("g", params),
        method("h", **header),
        name="demo.Evil.v1",
        protocol_hash=text,
        server_id=text,
    )


@pytest.mark.parametrize("text", [text for text in EVIL if text.isascii() or "\u2028" in text])
def test_evil_texts_stay_texts(text: str) -> None:
    source = tool.generate_stub(hostile(text))
    assert_harmless(source)
    assert "g" in core.rpc_methods(executed(source)["Evil"])


@settings(database=None, deadline=None, max_examples=100)
@given(PEER_TEXT.filter(lambda text: text.isprintable() or text.isascii()))
def test_random_texts_stay_texts(text: str) -> None:
    assert_harmless(tool.generate_stub(hostile(text)))


def test_literals_are_python() -> None:
    for text in (*EVIL, "plain", "ü", "\U0001f600", "\u202e"):
        literal = tool._literal(text)
        assert ast.literal_eval(literal) == text
        assert "\n" not in literal and len(literal.splitlines()) == 1


# ---- any types


def described(protocol: type) -> Any:
    """What a server of this Protocol says over a pipe."""
    methods = {name: getattr(protocol, name) for name in core.rpc_methods(protocol)}
    served = core.RpcServer(protocol, type("Implementation", (), methods)(), enable_describe=True)
    client, server = core.make_pipe_pair()
    thread = threading.Thread(target=served.serve, args=(server,))
    thread.start()
    try:
        return core.introspect(client)
    finally:
        client.close()
        thread.join(5.0)
        server.close()


def declared(methods: Mapping[str, tuple[dict[str, Any], Any]]) -> type:
    """A Protocol with these parameters and results."""
    space: dict[str, Any] = {name: tool._function(name, *what) for name, what in methods.items()}
    return types.new_class("Random", (Protocol,), exec_body=lambda body: body.update(space))


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(
    lambda name: name not in ("self", "ctx") and not keyword.iskeyword(name)
)
HINTS = KINDS.map(lambda kind: kind.annotation)
METHODS = st.dictionaries(NAMES, st.tuples(st.dictionaries(NAMES, HINTS, max_size=3), HINTS | st.none()), max_size=4)


def assert_same(desc: Any, made: Any) -> None:
    found = core.rpc_methods(made)
    assert sorted(found) == sorted(desc.methods)
    for name, info in found.items():
        assert info.params_schema.equals(desc.methods[name].params_schema), name
        assert info.result_schema.equals(desc.methods[name].result_schema), name
    assert core.compute_protocol_hash(desc.protocol_name, found) == desc.protocol_hash


@settings(database=None, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(METHODS)
def test_any_protocol_comes_back(methods: dict[str, tuple[dict[str, Any], Any]]) -> None:
    desc = described(declared(methods))
    text = tool.generate_stub(desc)
    assert "has the same hash" in text
    assert_same(desc, executed(text)["Random"])
    assert_same(desc, tool.protocol_from_description(desc))


PLAIN = [pa.bool_(), *(getattr(pa, f"{sign}int{size}")() for sign in ("", "u") for size in (8, 16, 32, 64))]
PLAIN += [pa.float16(), pa.float32(), pa.float64(), pa.utf8(), pa.large_utf8(), pa.string_view()]
PLAIN += [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3), pa.date32(), pa.date64()]
PLAIN += [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.month_day_nano_interval()]
PLAIN += [make(unit) for make in (pa.timestamp, pa.duration) for unit in ("s", "ms", "us", "ns")]
PLAIN += [pa.timestamp("us", tz="UTC"), pa.timestamp("ns", tz="Europe/Berlin")]
PLAIN += [pa.decimal128(38, 9), pa.decimal256(50, -3), pa.uuid(), pa.dictionary(pa.int8(), pa.utf8(), ordered=True)]
PLAIN += [pa.dictionary(pa.int16(), pa.utf8()), pa.run_end_encoded(pa.int32(), pa.utf8())]


def field_of(name: str, dtype: Any, nullable: bool) -> Any:
    return pa.field(name, dtype, nullable or pa.types.is_null(dtype))  # pyarrow refuses a null that is never null


def fields(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = NAMES | st.sampled_from(["a b", "class", "item", ""])
    return st.builds(pa.field, names, inner, st.booleans())


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    child = fields(inner) | inner
    many = st.lists(fields(inner), max_size=3)
    return (
        st.builds(pa.list_, child)
        | st.builds(pa.large_list, child)
        | st.builds(pa.list_view, child)
        | st.builds(pa.list_, child, st.integers(1, 3))
        | st.builds(pa.map_, inner, child, st.booleans())
        | many.map(pa.struct)
        | many.filter(bool).map(lambda children: pa.dense_union(children, [3 * i for i in range(len(children))]))
    )


TYPES: st.SearchStrategy[Any] = st.recursive(st.sampled_from(PLAIN), nested, max_leaves=5)


@settings(database=None, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(TYPES, st.booleans()), max_size=3), TYPES | st.just(pa.null()), st.booleans())
def test_any_arrow_types_come_back(params: list[tuple[Any, bool]], result: Any, nullable: bool) -> None:
    schema = pa.schema([field_of(f"p{i}", dtype, flag) for i, (dtype, flag) in enumerate(params)])
    returned = pa.schema([field_of("result", result, nullable)])
    wanted = service_of(method("m", schema, has_return=True, result_schema=returned))
    info = core.RpcMethodInfo("m", schema, returned, None, core.MethodType.UNARY, True, None)
    desc = wanted._replace(protocol_hash=core.compute_protocol_hash("Odd", {"m": info}))
    text = tool.generate_stub(desc)
    assert_same(desc, executed(text)["Odd"])
    assert_same(desc, tool.protocol_from_description(desc))


def test_a_type_without_a_maker_is_left_out() -> None:
    class Foreign(pa.ExtensionType):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(pa.int64(), "x\nimport os")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Foreign:
            return cls()

    text = tool.generate_stub(service_of(method("f", pa.schema([("a", pa.list_(Foreign()))]))))
    assert r'"f": the extension type "x\nimport os" has no name here' in text
    assert_harmless(text)


# ---- the command


def test_a_lone_file_says_what_to_install(tmp_path: Path) -> None:
    shutil.copy(str(core.__file__), tmp_path / "alone.py")
    code = (  # an editable install puts the project, and with it the folder, on the path
        "import os, sys\n"
        "sys.path[:] = [p for p in sys.path if not p or not os.path.exists(os.path.join(p, 'vgi_rpc.py'))]\n"
        "import alone\nsys.exit(alone.main(sys.argv[1:]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in ("stub", "doctor"):
        ran = subprocess.run(
            [sys.executable, "-c", code, command, "--cmd", "true"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 1
        assert f"the {command} command needs the package 'vgi_rpc_extras'" in ran.stderr
        assert "pip install" in ran.stderr


def test_the_file_goes_to_stdout(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    assert core.main(["stub", "--cmd", shlex.join(service.command), "--protocol", "vgi_rpc.Reflection.v1"]) == 0
    out, _ = capfd.readouterr()
    assert "class Reflection(Protocol):" in out
    assert executed(out)["Reflection"].protocol_name == "vgi_rpc.Reflection.v1"


def test_the_help_lists_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert core.main(["--help"]) == 0
    out, _ = capfd.readouterr()
    assert "write a typed Protocol for a service" in out and "find out what is wrong with a service" in out


def test_a_plain_file_is_imported_by_its_name(service: Service, tmp_path: Path) -> None:
    shutil.copy(str(core.__file__), tmp_path / "vgi_rpc.py")
    shutil.copytree(Path(tool.__file__).parents[1], tmp_path / "vgi_rpc_extras")
    command = [sys.executable, "vgi_rpc.py", "stub", "--cmd", shlex.join(service.command)]
    ran = subprocess.run(command, cwd=tmp_path, env=service.env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "\nfrom vgi_rpc import (" in ran.stdout
