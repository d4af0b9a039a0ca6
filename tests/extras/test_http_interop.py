"""What other implementations of the protocol do over HTTP, and honest services with unusual names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("httpx")

from tests.extras.storage_server import Store, anything
from vgi_rpc_extras import storage
from vgi_rpc_extras.http import http_connect, make_sync_client, request_upload_urls

NOTHING = pa.schema([])
NUMBERS = pa.schema([("n", pa.int64())])
KEY = bytes(range(32))


@dataclass
class Count(core.ProducerState):
    left: int

    def produce(self, out: Any, ctx: Any) -> None:
        if not self.left:
            return out.finish()
        self.left -= 1
        return out.emit_pydict({"n": [self.left]})


@dataclass
class Turns(core.ExchangeState):
    done: int = 0

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        self.done += 1
        out.emit_pydict({"n": [self.done]})


@dataclass
class Blank(core.ExchangeState):
    done: int = 0

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        self.done += 1
        if self.done % 3 == 0:
            ctx.client_log(core.Level.INFO, f"turn {self.done}")
        out.emit(core.empty_batch(NOTHING))


class Service(Protocol):
    def count(self, note: str, end: int) -> core.Stream[Count]: ...
    def turns(self) -> core.Stream[Turns]: ...
    def blank(self) -> core.Stream[Blank]: ...
    def number(self) -> int: ...
    def text(self, of: str) -> str | None: ...


class Impl:
    def __init__(self, store: Any = None) -> None:
        self.store = store

    def count(self, note: str, end: int) -> core.Stream[Count]:
        return core.Stream(NUMBERS, Count(end))

    def turns(self) -> core.Stream[Turns]:
        return core.Stream(NUMBERS, Turns(), input_schema=NOTHING)

    def blank(self) -> core.Stream[Blank]:
        return core.Stream(NOTHING, Blank(), input_schema=NOTHING)

    def number(self) -> Any:
        return self._stored(7, pa.field("result", pa.int64(), False))

    def text(self, of: str, ctx: Any) -> Any:
        return self._stored(of * 2, pa.field("result", pa.utf8())) if of else None

    def _stored(self, value: object, field: pa.Field) -> Any:
        batch = pa.RecordBatch.from_arrays([pa.array([value], field.type)], schema=pa.schema([field]))
        return storage.publish_external(batch, self.store)


def over_http(impl: Any, *, logs: list[Any] | None = None, **options: Any) -> Any:
    config = storage.ServerExternalConfig(None, url_validator=anything, private_addresses=True)
    client = make_sync_client(core.RpcServer(Service, impl, external_location=config), token_key=KEY, **options)
    own = storage.ClientExternalConfig(url_validator=anything)
    return http_connect(Service, client=client, external_location=own, on_log=None if logs is None else logs.append)


@pytest.mark.parametrize("door", ["pipe", "http"])
@pytest.mark.parametrize("method", ["turns", "blank"])
def test_an_exchange_without_input_columns_answers_every_turn(door: str, method: str) -> None:
    empty = core.AnnotatedBatch(core.empty_batch(NOTHING))
    logs: list[Any] = []
    opened = core.serve_pipe(Service, Impl(), on_log=logs.append) if door == "pipe" else over_http(Impl(), logs=logs)
    with opened as proxy, getattr(proxy, method)() as session:
        found = [session.exchange(empty) for _ in range(100)]
    if method == "turns":
        assert [item.batch["n"].to_pylist() for item in found] == [[n] for n in range(1, 101)]
    else:
        assert [item.batch.schema for item in found] == [NOTHING] * 100
        assert [log.message for log in logs] == [f"turn {n}" for n in range(3, 101, 3)]


def test_the_opening_of_a_stream_may_be_a_pointer(store: Store) -> None:
    """What a request that travelled through storage says of its way is not said to the stream's first turn."""
    server = core.RpcServer(
        Service,
        Impl(),
        external_location=storage.ServerExternalConfig(None, url_validator=anything, private_addresses=True),
    )
    client = make_sync_client(server, token_key=KEY, max_request_bytes=5000, upload_url_provider=store)
    assert request_upload_urls(client=client)
    own = storage.ClientExternalConfig(url_validator=anything)
    with http_connect(Service, client=client, external_location=own, compression_level=None) as proxy:
        for note, puts in (("short", 0), ("x" * 20_000, 1)):
            with proxy.count(note=note, end=3) as session:
                assert [item.batch["n"].to_pylist() for item in session] == [[2], [1], [0]]
            assert store.verbs().count("PUT") == puts


@pytest.mark.parametrize("door", ["pipe", "http"])
def test_a_result_may_be_kept_elsewhere_whatever_is_declared(door: str, store: Store) -> None:
    impl = Impl(store)
    own = storage.ClientExternalConfig(url_validator=anything)
    opened = core.serve_pipe(Service, impl, external_location=own) if door == "pipe" else over_http(impl)
    with opened as proxy:
        for _ in range(3):  # learned and not
            assert (proxy.number(), proxy.text(of="ab"), proxy.text(of="")) == (7, "abab", None)


# ---- names beyond ASCII


class Sizes(Protocol):
    def größe(self, straße: str) -> str: ...
    def zähle(self, bis: int) -> core.Stream[Count]: ...


class SizesImpl:
    def größe(self, straße: str) -> str:
        return straße.upper()

    def zähle(self, bis: int) -> core.Stream[Count]:
        return core.Stream(NUMBERS, Count(bis))


def test_methods_have_names_of_any_letters() -> None:
    client = make_sync_client(core.RpcServer(Sizes, SizesImpl()), token_key=KEY)
    with http_connect(Sizes, client=client) as proxy:
        assert proxy.größe(straße="ü") == "Ü"
        assert [item.batch["n"].to_pylist() for item in proxy.zähle(bis=2)] == [[1], [0]]


@pytest.mark.parametrize("name", ["gr%C3%B6%C3%9Fe", "gr%c3%b6%c3%9fe", "%67r%C3%B6%C3%9Fe", "gr%C3%B6%C3%9Fe%2F", "%"])
def test_a_name_is_spelled_in_one_way(name: str) -> None:
    client = make_sync_client(core.RpcServer(Sizes, SizesImpl()), token_key=KEY)
    answer = client.post(f"/Sizes/{name}", content=b"", headers={"Content-Type": "application/vnd.apache.arrow.stream"})
    assert answer.status_code == (400 if name == "gr%C3%B6%C3%9Fe" else 404)  # 400: found, and the body is no request
