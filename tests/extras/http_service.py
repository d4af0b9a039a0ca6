"""The service of the HTTP tests, and the bytes of its requests."""

from __future__ import annotations

import base64
import importlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import pyarrow as pa
import pyarrow.ipc as ipc

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

ARROW = "application/vnd.apache.arrow.stream"
KEY = b"k" * 32
NUMBERS = pa.schema([pa.field("n", pa.int64())])


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something that comes by itself; AssertionError when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.005)


@dataclass
class Head(core.ArrowSerializableDataclass):
    title: str


@dataclass
class Fixed(core.ArrowSerializableDataclass):
    step: int


@dataclass
class CountState(core.ProducerState):
    CALL_STATE_TYPE: ClassVar[type | None] = Fixed
    at: int
    end: int

    def bind_call_state(self, call_state: Any) -> None:
        self._fixed = call_state

    def produce(self, out: Any, ctx: Any) -> None:
        if self.at >= self.end:
            out.finish()
            return
        fixed = getattr(self, "_fixed", None)
        out.client_log(core.Level.INFO, f"at {self.at}")
        out.emit_pydict({"n": [self.at]}, {"pid": str(os.getpid())})
        self.at += 1 if fixed is None else fixed.step


@dataclass
class CountDownState(core.ProducerState):
    left: int

    def process(self, input: Any, out: Any, ctx: Any) -> None:
        if not self.left:
            out.finish()
            return
        seen = sorted(k.decode() for k in (input.custom_metadata or {}))
        out.emit_pydict({"n": [self.left]}, {"seen": ",".join(seen)})
        self.left -= 1

    def produce(self, out: Any, ctx: Any) -> None:
        raise AssertionError


@dataclass
class SumState(core.ExchangeState):
    total: int = 0
    padding: bytes = b""
    cancelled: ClassVar[list[int]] = []

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        self.total += sum(input.batch.column("n").to_pylist())
        if self.total < 0:
            raise ValueError("negative")
        out.emit_pydict({"n": [self.total]}, {"pid": str(os.getpid())})

    def on_cancel(self, ctx: Any) -> None:
        SumState.cancelled.append(self.total)
        raise RuntimeError("swallowed")


@dataclass
class UndeclaredState(SumState):
    pass


class Service(Protocol):
    protocol_version: ClassVar[str] = "1.2.0"

    def add(self, a: float, b: float = 1.0) -> float: ...
    def fail(self, kind: str) -> str: ...
    def nothing(self) -> None: ...
    def blob(self, size: int) -> bytes: ...
    def who(self) -> str: ...
    def wait(self, seconds: float) -> float: ...
    def hold(self, folder: str) -> str: ...
    def cookie(self, name: str) -> str: ...
    def count(self, end: int) -> core.Stream[core.ProducerState]: ...
    def down(self, end: int, step: int) -> core.Stream[core.ProducerState, Head]: ...
    def running_sum(self) -> core.Stream[core.ExchangeState]: ...
    def other_sum(self) -> core.Stream[core.ExchangeState]: ...
    def undeclared(self) -> core.Stream[core.ExchangeState]: ...


class Impl:
    """Says hello <b>& more</b>."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def on_serve_start(self, kind: Any) -> None:
        self.started.append(str(kind))

    def add(self, a: float, b: float = 1.0) -> float:
        return a + b

    def fail(self, kind: str) -> str:
        if kind == "exit":
            raise SystemExit(3)
        if kind == "none":
            return cast(str, None)
        raise ValueError("no luck")

    def nothing(self) -> None:
        pass

    def blob(self, size: int) -> bytes:
        return b"x" * size

    def who(self, ctx: Any) -> str:
        ctx.client_log(core.Level.INFO, "asked")
        limit = f" {ctx.response_limit_bytes} {ctx.preferred_response_bytes}"
        return f"{core.current_auth().principal} {ctx.auth.principal} {ctx.kind} {ctx.transport_metadata}" + limit

    def wait(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def hold(self, folder: str) -> str:
        Path(folder, "begun").touch()
        until(Path(folder, "go").exists)
        return "held"

    def cookie(self, name: str, ctx: Any) -> str:
        ctx.set_cookie(name, "v", same_site="lax", max_age=5)
        ctx.delete_cookie("old")
        return ",".join(ctx.cookies.values())

    def count(self, end: int) -> core.Stream[CountState | CountDownState]:
        return core.Stream(NUMBERS, CountState(0, end))

    def down(self, end: int, step: int, ctx: Any) -> core.Stream[CountState | CountDownState, Head]:
        ctx.client_log(core.Level.INFO, "init")
        if step > 0:
            return core.Stream(NUMBERS, CountState(0, end), header=Head("up"), call_state=Fixed(step))
        return core.Stream(NUMBERS, CountDownState(end), header=Head("down"))

    def running_sum(self) -> core.Stream[SumState]:
        return core.Stream(NUMBERS, SumState(), NUMBERS)

    def other_sum(self) -> core.Stream[SumState]:
        return core.Stream(NUMBERS, SumState(100, b"p" * 5000), NUMBERS)

    def undeclared(self) -> core.Stream[SumState]:
        return core.Stream(NUMBERS, UndeclaredState(), NUMBERS)


class Second(Protocol):
    def running_sum(self) -> core.Stream[core.ExchangeState]: ...


class SecondImpl:
    def running_sum(self) -> core.Stream[SumState]:
        return core.Stream(NUMBERS, SumState(), NUMBERS)


def extra(name: str) -> Any:
    """A module of the extras that belong to the core under test."""
    app: Any = getattr(core, "make_wsgi_app")  # noqa: B009 (a lazy name)
    package = app.__module__.rpartition(".")[0]
    return importlib.import_module(name if name.startswith(".") else f".{name}", package)


def make_server(**options: Any) -> Any:
    options.setdefault("enable_describe", True)
    return core.RpcServer(Service, Impl(), extra_protocols=[(Second, SecondImpl())], server_version="9", **options)


def stream(batch: pa.RecordBatch, metadata: Mapping[Any, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    with core.new_ipc_stream(sink, batch.schema) as writer:
        writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(dict(metadata)) if metadata else None)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def request(method: str, *, metadata: Mapping[Any, Any] | None = None, **values: Any) -> bytes:
    """The body of a call; metadata adds, and takes away with None."""
    schema = core.rpc_methods(Service)[method].params_schema
    given = [pa.array([values[field.name]], field.type) for field in schema]
    batch = pa.RecordBatch.from_arrays(given, schema=schema) if given else core.empty_batch(schema)
    found = {
        b"vgi_rpc.method": method.encode(),
        b"vgi_rpc.request_version": b"1",
        b"vgi_rpc.protocol": b"Service",
        b"vgi_rpc.protocol_version": b"1.2.0",
        **(metadata or {}),
    }
    return stream(batch, {key: value for key, value in found.items() if value is not None})


def numbers(*values: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(values, pa.int64())], schema=NUMBERS)


def turn(tokens: Mapping[bytes, bytes], *values: int, **metadata: str) -> bytes:
    """One input batch, or a tick, that brings the tokens along."""
    batch = numbers(*values) if values else core.empty_batch(pa.schema([]))
    return stream(batch, {**tokens, **{key.encode(): value.encode() for key, value in metadata.items()}})


class Read:
    """An Arrow response, read."""

    def __init__(self, response: Any) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.failed = response.headers.get("X-VGI-RPC-Error") == "true"
        self.rows: list[list[Any]] = []  # of every stream
        self.metadata: list[dict[bytes, bytes]] = []  # of data batches
        self.schemas: list[pa.Schema] = []
        self.tokens: dict[bytes, bytes] = {}
        self.logs: list[str] = []
        self.error = ""
        self.error_kind = ""
        self.error_code = ""
        data = pa.BufferReader(response.content)
        while data.tell() < len(response.content):
            self._read(data)

    def _read(self, data: Any) -> None:
        rows: list[Any] = []
        with ipc.open_stream(data) as reader:
            self.schemas.append(reader.schema)
            for batch, metadata in reader.iter_batches_with_custom_metadata():
                found = dict(metadata or {})
                level = found.get(b"vgi_rpc.log_level")
                if level == b"EXCEPTION":
                    self.error = found[b"vgi_rpc.log_message"].decode()
                    self.error_kind = found.get(b"vgi_rpc.error_kind", b"").decode()
                    self.error_code = found.get(b"vgi_rpc.error_code", b"").decode()
                elif level is not None:
                    self.logs.append(found[b"vgi_rpc.log_message"].decode())
                else:
                    self.tokens.update({k: v for k, v in found.items() if k.endswith(b"_state#b64")})
                    if batch.num_rows:
                        rows += batch.to_pylist()
                        self.metadata.append(found)
        self.rows.append(rows)

    @property
    def numbers(self) -> list[int]:
        return [row["n"] for row in self.rows[-1]]

    @property
    def result(self) -> Any:
        return self.rows[-1][0]["result"]


def call(client: Any, path: str, body: bytes, **headers: str) -> Read:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Read(client.post(client.prefix + path, content=body, headers={"Content-Type": ARROW, **named}))


def tampered(token: bytes, at: int) -> bytes:
    raw = bytearray(base64.b64decode(token))
    raw[at] ^= 1
    return base64.b64encode(raw)
