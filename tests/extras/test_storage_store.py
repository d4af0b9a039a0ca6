"""Batches that are kept elsewhere, over every kind of transport."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import pickle
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pytest

from tests.extras.storage_server import Store, Thing, anything, stream

pytest.importorskip("httpx")

from vgi_rpc_extras import storage

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

ROWS = pa.schema([("n", pa.int64())])
RESULT = pa.schema([pa.field("result", pa.binary(), nullable=False)])


@dataclass
class Head(core.ArrowSerializableDataclass):
    text: str


@dataclass
class Counting(core.ProducerState):
    left: int
    size: int

    def produce(self, out: Any, ctx: Any) -> None:
        out.client_log(core.Level.INFO, f"left {self.left}")
        if not self.left:
            out.finish()
            return
        self.left -= 1
        out.emit_pydict({"n": list(range(self.size))}, {"left": str(self.left)})


@dataclass
class Doubling(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit_pydict({"n": [2 * n for n in input.batch["n"].to_pylist()]})


class Service(Protocol):
    def blob(self, size: int) -> bytes: ...
    def measure(self, data: bytes) -> int: ...
    def optional(self, size: int) -> bytes | None: ...
    def count(self, left: int, size: int) -> core.Stream[Counting]: ...
    def head(self, size: int) -> core.Stream[Counting, Head]: ...
    def double(self) -> core.Stream[Doubling]: ...
    def published(self, which: str) -> bytes | core.ExternalRef: ...
    def talk(self, size: int) -> bytes: ...


class Impl:
    def __init__(self) -> None:
        self.refs: dict[str, Any] = {}

    def blob(self, size: int) -> bytes:
        return b"x" * size

    def measure(self, data: bytes) -> int:
        return len(data)

    def optional(self, size: int) -> bytes | None:
        return b"x" * size if size else None

    def count(self, left: int, size: int) -> Any:
        return core.Stream(ROWS, Counting(left, size))

    def head(self, size: int) -> Any:
        return core.Stream(ROWS, Counting(1, 1), header=Head("h" * size))

    def double(self) -> Any:
        return core.Stream(ROWS, Doubling(), input_schema=ROWS)

    def published(self, which: str) -> Any:
        return self.refs[which] if which in self.refs else which.encode()

    def talk(self, size: int, ctx: Any) -> bytes:
        ctx.client_log(core.Level.INFO, "before")
        return b"x" * size


def config_of(store: Any, **options: Any) -> storage.ServerExternalConfig:
    given = {"externalize_threshold_bytes": 10_000, "url_validator": anything, "retry_delay_seconds": 0.01, **options}
    return storage.ServerExternalConfig(store, **given)


def names(store: Store) -> int:
    return len(store.things)


TRANSPORTS = ("pipe", "unix", "tcp", "http")


def connected(transport: str, config: Any, impl: Any = None, on_log: Any = None) -> Any:
    impl = impl or Impl()
    if transport == "http":
        pytest.importorskip("falcon")
        from vgi_rpc_extras.http import http_connect, make_sync_client

        client = make_sync_client(core.RpcServer(Service, impl, external_location=config))
        return http_connect(Service, client=client, external_location=config, on_log=on_log)
    door: Any = {"pipe": core.serve_pipe, "unix": core.serve_unix_pipe, "tcp": core.serve_tcp_pipe}[transport]
    return door(Service, impl, external_location=config, on_log=on_log)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("codec", [None, "zstd", "gzip"])
def test_large_results_go_through_the_store(store: Store, transport: str, codec: Any) -> None:
    compression = storage.Compression(codec) if codec else None
    logs: list[core.Message] = []
    with connected(transport, config_of(store, compression=compression), on_log=logs.append) as proxy:
        assert proxy.blob(100) == b"x" * 100 and names(store) == 0
        assert proxy.blob(100_000) == b"x" * 100_000 and names(store) == 1
        assert proxy.optional(0) is None and proxy.optional(50_000) == b"x" * 50_000
        assert proxy.talk(20_000) == b"x" * 20_000 and [m.message for m in logs] == ["before"]
        stored = store.things["s0"]
        assert stored.coding == (codec or "") and (len(stored.data) < 5000) == bool(codec)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_turns_go_as_a_whole_and_in_order(store: Store, transport: str) -> None:
    logs: list[core.Message] = []
    with connected(transport, config_of(store), on_log=logs.append) as proxy:
        got = [(b.batch.num_rows, b.custom_metadata[b"left"]) for b in proxy.count(3, 5000)]
        assert got == [(5000, b"2"), (5000, b"1"), (5000, b"0")] and names(store) == 3
        assert [m.message for m in logs] == ["left 3", "left 2", "left 1", "left 0"]
        with proxy.double() as session:
            for size in (5, 5000, 5):
                batch = pa.RecordBatch.from_pydict({"n": list(range(size))}, schema=ROWS)
                answer = session.exchange(core.AnnotatedBatch(batch))
                assert answer.batch["n"].to_pylist() == [2 * n for n in range(size)]
                assert not answer.custom_metadata or b"vgi_rpc.location" not in answer.custom_metadata
        assert names(store) == 4
        session = proxy.head(20_000)
        assert session.typed_header(Head).text == "h" * 20_000 and names(store) == 5
        assert session.read_all().num_rows == 1
        assert proxy.measure(b"abc") == 3


def test_metadata_says_where_a_batch_came_from(store: Store) -> None:
    with connected("pipe", config_of(store)) as proxy:
        [item] = list(proxy.count(1, 5000))
        metadata = item.custom_metadata
        assert metadata[b"left"] == b"0" and float(metadata[b"vgi_rpc.location.fetch_ms"]) >= 0
        assert metadata[b"vgi_rpc.location.source"].startswith(f"{store.url}/s0?k=hunter2".encode())
        assert b"vgi_rpc.location" not in metadata and b"vgi_rpc.location.sha256" not in metadata


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_client_without_a_store_says_so(store: Store, transport: str) -> None:
    with connected(transport, config_of(store)) as proxy:
        plain = core.with_options(proxy)
        plain._options = plain._options._replace(store=None)
        with pytest.raises(core.RpcError, match="pass external_location="):
            plain.blob(20_000)
        assert plain.blob(5) == b"xxxxx" and proxy.blob(20_000) == b"x" * 20_000


def test_the_threshold_counts_what_is_in_the_batch(store: Store) -> None:
    config = config_of(store, externalize_threshold_bytes=800)
    whole = pa.RecordBatch.from_pydict({"n": list(range(10_000))}, schema=ROWS)
    for size, stored in ((99, 0), (100, 1), (101, 1)):
        batch, _, raw = storage.maybe_externalize_batch(whole.slice(0, size), None, config)
        assert (batch.num_rows == 0, raw > 0) == (bool(stored), bool(stored))
        assert storage.predict_externalize_bytes_for_batch(whole.slice(0, size), config) == 8 * size * stored
    assert storage.maybe_externalize_batch(whole, None, config_of(None))[2] == 0
    nothing = storage.maybe_externalize_batch(whole.slice(0, 0), None, config_of(store, externalize_threshold_bytes=0))
    assert nothing[2] == 0


def test_a_collector_by_hand(store: Store) -> None:
    config = config_of(store)
    out = core.OutputCollector(ROWS)
    out.client_log(core.Level.INFO, "a")
    assert storage.maybe_externalize_collector(out, config)[1] == 0
    assert storage.predict_externalize_bytes_for_collector(out, config) == 0
    out.emit_pydict({"n": list(range(5000))})
    out.client_log(core.Level.INFO, "b")
    assert storage.predict_externalize_bytes_for_collector(out, config) == 40_000
    items, raw = storage.maybe_externalize_collector(out, config)
    assert len(items) == 1 and raw > 40_000
    logs: list[core.Message] = []
    batch, metadata = core.resolve_external_location(*items[0], config, logs.append)
    assert batch.num_rows == 5000 and [m.message for m in logs] == ["a", "b"]
    assert core.resolve_external_location(batch, metadata, config) == (batch, metadata)
    assert core.resolve_external_location(*items[0], None) == items[0]


# ---- what is not what it should be: one typed error, and the connection goes on

GOOD = stream(RESULT, (pa.RecordBatch.from_pydict({"result": [b"good"]}, schema=RESULT), None))
ONE = pa.RecordBatch.from_pydict({"result": [b"one"]}, schema=RESULT)
NONE = ONE.slice(0, 0)
OTHER = pa.RecordBatch.from_pydict({"result": [1]})
LOG = {"vgi_rpc.log_level": "INFO", "vgi_rpc.log_message": "said"}
FAULT = {"vgi_rpc.log_level": "EXCEPTION", "vgi_rpc.log_message": "KeyError: gone"}
NULLABLE = pa.schema([pa.field("result", pa.binary())])

BAD: dict[str, tuple[Thing, str]] = {
    "two data batches": (Thing(stream(RESULT, (ONE, None), (ONE, None))), "Multiple data batches"),
    "none": (Thing(stream(RESULT)), "No data batch found"),
    "only a message": (Thing(stream(RESULT, (NONE, LOG))), "No data batch found"),
    "wrong schema": (Thing(stream(OTHER.schema, (OTHER, None))), "Schema mismatch"),
    "wrong nullability": (Thing(stream(NULLABLE, (ONE.cast(NULLABLE), None))), "Schema mismatch"),
    "nested": (Thing(stream(RESULT, (NONE, {"vgi_rpc.location": "https://x/y?k=hunter2"}))), "Redirect loop"),
    "nested, with rows": (Thing(stream(RESULT, (ONE, {"vgi_rpc.location": "https://x/y"}))), "Redirect loop"),
    "shared memory": (Thing(stream(RESULT, (NONE, {"vgi_rpc.shm_offset": "1"}))), "Redirect loop"),
    "cut": (Thing(GOOD[:-40]), "not a complete Arrow IPC stream"),
    "empty": (Thing(b""), "not a complete Arrow IPC stream"),
    "not Arrow": (Thing(b"hello world, this is a login page"), "not a complete Arrow IPC stream"),
    "absurd size": (Thing(b"\xff\xff\xff\xff\xff\xff\xff\x7f" + GOOD), "not a complete Arrow IPC stream"),
    "not found": (Thing(GOOD, status=404), "HTTP 404"),
    "gone between": (Thing(GOOD, status=404, head_status=200), "HTTP 404"),
    "busy": (Thing(GOOD, status=503), "after 3 attempts"),
    "an error": (Thing(stream(RESULT, (NONE, FAULT))), "gone"),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", BAD)
def test_bad_objects(store: Store, transport: str, name: str) -> None:
    thing, text = BAD[name]
    impl = Impl()
    impl.refs["bad"] = core.ExternalRef(store.add("bad", thing))
    logs: list[core.Message] = []
    with connected(transport, config_of(store), impl, logs.append) as proxy:
        for _ in range(2):
            with pytest.raises(core.RpcError, match=text) as caught:
                proxy.published("bad")
            assert isinstance(caught.value, core.ExternalLocationError) == (name != "an error")
            assert "hunter2" not in repr(caught.value) and caught.value.__cause__ is not caught.value
            assert proxy.published("fine") == b"fine"
    assert logs == []


def test_bad_objects_in_a_stream(store: Store) -> None:
    with connected("pipe", config_of(store)) as proxy:
        session = proxy.count(3, 5000)
        assert session.tick().batch.num_rows == 5000
        store.upload = lambda *args, **options: store.add("bad", Thing(GOOD))  # type: ignore[method-assign]
        try:
            with pytest.raises(core.ExternalLocationError, match="checksum"):
                session.tick()
            with pytest.raises(core.RpcError, match="a stream is open"):
                proxy.blob(1)
        finally:
            del store.upload
        assert session.tick().batch.num_rows == 5000  # in step: only that batch is lost
        session.close()
        assert proxy.blob(5) == b"xxxxx"


@pytest.mark.parametrize("digest", ["0" * 64, hashlib.sha256(GOOD).hexdigest()[:-1] + "x", "short"])
def test_wrong_digests(store: Store, digest: str) -> None:
    pointer = core.make_external_location_batch(RESULT, store.add("a", GOOD), digest)
    with pytest.raises(core.ExternalLocationError, match="checksum"):
        core.resolve_external_location(*pointer, config_of(store))
    upper = core.make_external_location_batch(RESULT, store.add("a", GOOD), hashlib.sha256(GOOD).hexdigest().upper())
    assert core.resolve_external_location(*upper, config_of(store))[0]["result"].to_pylist() == [b"good"]


def test_retries_deliver_messages_once(store: Store) -> None:
    said = stream(RESULT, (NONE, LOG), (ONE, None), (NONE, LOG))
    pointer = core.make_external_location_batch(RESULT, store.add("a", Thing(said, fails=2)))
    logs: list[core.Message] = []
    core.resolve_external_location(*pointer, config_of(store), logs.append)
    assert [m.message for m in logs] == ["said", "said"] and store.verbs() == ["HEAD", "HEAD", "HEAD", "GET"]
    store.add("a", Thing(said, fails=9))
    with pytest.raises(core.ExternalLocationError, match=r"after 1 attempts: http://127\.0\.0\.1"):
        core.resolve_external_location(*pointer, config_of(store, max_retries=0))
    store.asked.clear()
    with pytest.raises(core.ExternalLocationError, match="after 3 attempts"):
        core.resolve_external_location(*pointer, config_of(store, max_retries=99))
    assert len(store.asked) == 3


def test_on_log_that_raises_leaves_the_connection_in_step(store: Store) -> None:
    def refuse(message: core.Message) -> None:
        raise KeyError(message.message)

    impl = Impl()
    impl.refs["said"] = core.ExternalRef(store.add("said", stream(RESULT, (NONE, LOG), (ONE, None))))
    with connected("pipe", config_of(store), impl, refuse) as proxy:
        with pytest.raises(KeyError, match="said"):
            proxy.published("said")
        with pytest.raises(KeyError, match="left 2"):
            proxy.count(2, 5000).tick()
        assert proxy.blob(5) == b"xxxxx"


def test_a_call_does_not_wait_longer_than_it_wants(store: Store) -> None:
    impl = Impl()
    impl.refs["slow"] = core.ExternalRef(store.add("slow", Thing(GOOD, pause=3)))
    with connected("pipe", config_of(store), impl) as proxy:
        with pytest.raises(core.DeadlineExceededError):
            core.with_options(proxy, timeout=0.3).published("slow")
        assert proxy.blob(5) == b"xxxxx"


# ---- storing that fails


class Broken:
    """A storage whose library talks too much."""

    def upload(self, data: bytes, schema: pa.Schema, *, content_encoding: str | None = None) -> str:
        raise OSError("PUT https://bucket/x?X-Amz-Signature=hunter2 failed")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_failed_upload_is_an_error_of_the_method(transport: str) -> None:
    with connected(transport, config_of(Broken())) as proxy:
        with pytest.raises(core.RpcError, match="upload of") as caught:
            proxy.blob(20_000)
        assert "hunter2" not in str(caught.value) + str(caught.value.__notes__)
        with pytest.raises(core.RpcError, match="upload of"):
            proxy.count(2, 5000).read_all()
        with pytest.raises(core.RpcError, match="upload of"):
            proxy.head(20_000).close()
        assert proxy.blob(5) == b"xxxxx"


def test_a_store_that_raises_anything() -> None:
    class Odd(storage.ClientExternalConfig):
        def load(self, url: str, sha256: str | None, timeout: float | None) -> Any:
            raise KeyError(f"{url}hunter2")

        def wants(self, batch: pa.RecordBatch) -> bool:
            return True

        def save(self, schema: pa.Schema, data: bytes) -> Any:
            raise KeyError("hunter2")

    pointer = core.make_external_location_batch(RESULT, "https://x/y")
    for call in (lambda: core.resolve_external_location(*pointer, Odd()), lambda: core.externalize(Odd(), ONE, [])):
        with pytest.raises(core.ExternalLocationError, match="KeyError") as caught:
            call()
        assert "hunter2" not in str(caught.value) and caught.value.__suppress_context__


# ---- requests that are pointers


def pointer_request(method: str, url: str, schema: pa.Schema, **extra: str) -> bytes:
    metadata = {
        "vgi_rpc.method": method,
        "vgi_rpc.request_version": "1",
        "vgi_rpc.protocol": "Service",
        "vgi_rpc.location": url,
        **extra,
    }
    return stream(schema, (core.empty_batch(schema), metadata))


def ask(server: Any, request: bytes) -> pa.RecordBatch:
    client, served = core.make_pipe_pair()
    thread = threading.Thread(target=server.serve, args=(served,), daemon=True)
    thread.start()
    try:
        client.writer.write(request)
        client.writer.flush()
        reader = pa.ipc.open_stream(client.reader)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, reader.schema) as writer:
            while True:
                try:
                    batch, metadata = reader.read_next_batch_with_custom_metadata()
                except StopIteration:
                    break
                writer.write_batch(batch, custom_metadata=metadata)
        return core.read_reply(sink.getvalue().to_pybytes())
    finally:
        client.close()
        thread.join(5)
        served.close()


ARGUMENT = pa.schema([pa.field("data", pa.binary(), nullable=False)])


def test_an_argument_that_is_kept_elsewhere(store: Store) -> None:
    row = pa.RecordBatch.from_pydict({"data": [b"x" * 777]}, schema=ARGUMENT)
    url = store.add("a", stream(ARGUMENT, (row, {"vgi_rpc.method": "nonsense"})))
    server = core.RpcServer(Service, Impl(), external_location=storage.ServerExternalConfig(url_validator=anything))
    request = pointer_request("measure", url, ARGUMENT)
    assert ask(server, request)["result"].to_pylist() == [777]
    wrong = pointer_request("measure", url, ARGUMENT, **{"vgi_rpc.location.sha256": "0" * 64})
    with pytest.raises(core.RpcError, match="checksum") as caught:
        ask(server, wrong)
    assert "hunter2" not in str(caught.value) + str(caught.value.__notes__)
    with pytest.raises(core.RpcError, match="Expected 1 row"):
        ask(core.RpcServer(Service, Impl()), request)


def test_a_server_does_not_reach_inside_unless_allowed(store: Store) -> None:
    """The default: https, and no address that is not of the public internet."""
    url = store.add("a", b"").replace("http:", "https:")
    request = pointer_request("measure", url, ARGUMENT)
    for options, text in (
        ({}, "no public address"),
        ({"private_addresses": True}, "after 3 attempts"),  # tried: there is no TLS
        ({"url_validator": None}, "no public address"),
        ({"url_validator": lambda url: None, "private_addresses": False}, "no public address"),
        ({"url_validator": lambda url: None}, "after 3 attempts"),
    ):
        config = storage.ServerExternalConfig(retry_delay_seconds=0, **options)
        with pytest.raises(core.RpcError, match=text) as caught:
            ask(core.RpcServer(Service, Impl(), external_location=config), request)
        assert "hunter2" not in str(caught.value)
    plain = pointer_request("measure", store.add("a", b""), ARGUMENT)
    with pytest.raises(core.RpcError, match="URL rejected: only https"):
        ask(core.RpcServer(Service, Impl(), external_location=storage.ServerExternalConfig()), plain)
    assert store.asked == []


def test_an_input_of_a_stream_that_is_kept_elsewhere(store: Store) -> None:
    row = pa.RecordBatch.from_pydict({"n": [1, 2]}, schema=ROWS)
    url = store.add("a", stream(ROWS, (row, None)))
    metadata = core.make_external_location_batch(ROWS, url)[1]
    with connected("pipe", config_of(store)) as proxy:
        with proxy.double() as session:
            answer = session.exchange(core.AnnotatedBatch(core.empty_batch(ROWS), metadata))
            assert answer.batch["n"].to_pylist() == [2, 4]
        store.things.clear()
        with proxy.double() as session, pytest.raises(core.RpcError, match="HTTP 404"):
            session.exchange(core.AnnotatedBatch(core.empty_batch(ROWS), metadata))
        assert proxy.blob(5) == b"xxxxx"


# ---- published results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_result_published_once(store: Store, transport: str) -> None:
    impl = Impl()
    impl.refs["a"] = storage.publish_external(ONE, store, storage.Compression())
    impl.refs["b"] = storage.publish_external(ONE, store, include_sha256=False)
    assert impl.refs["a"].sha256 and impl.refs["b"].sha256 is None
    with connected(transport, storage.ServerExternalConfig(url_validator=anything), impl) as proxy:
        assert [proxy.published(which) for which in "aabx"] == [b"one", b"one", b"one", b"x"]
    assert names(store) == 2
    with pytest.raises(ValueError, match="one row"):
        storage.publish_external(NONE, store)


def test_references() -> None:
    ref = core.ExternalRef("https://x/y?k=hunter2", "A" * 64)
    assert "hunter2" not in repr(ref) and ref.sha256 == "a" * 64
    assert pickle.loads(pickle.dumps(ref)) == ref and hash(ref)
    batch, metadata = ref.pointer_batch(RESULT)
    assert core.is_external_location_batch(batch, metadata) and batch.schema == RESULT
    assert not core.is_external_location_batch(ONE, metadata) and not core.is_external_location_batch(NONE, None)
    assert not core.is_external_location_batch(NONE, core.merge_metadata(metadata, LOG))
    for url, digest in (("", None), ("https://x", "short"), ("https://x", "z" * 64)):
        with pytest.raises(ValueError, match=r"URL|hex"):
            core.ExternalRef(url, digest)


def test_a_bare_reference_has_no_schema() -> None:
    for annotation in (core.ExternalRef, core.ExternalRef | None, core.Stream[Counting] | core.ExternalRef):

        def method(self: Any) -> Any: ...

        method.__annotations__["return"] = annotation
        with pytest.raises(TypeError, match=r"T \| ExternalRef"):
            core.rpc_methods(type("P", (Protocol,), {"m": method}))
    info = core.rpc_methods(Service)["published"]
    assert info.result_type is bytes and info.returns_ref and info.result_schema == RESULT


# ---- configuration


def test_configurations(store: Store) -> None:
    config = config_of(store)
    assert config == config_of(store, fetch_config=config.fetch_config) and isinstance(store, storage.ExternalStorage)
    assert storage.ExternalLocationConfig is storage.ServerExternalConfig and isinstance(
        store, storage.UploadUrlProvider
    )
    assert pickle.loads(pickle.dumps(storage.FetchConfig(max_redirects=1))) == storage.FetchConfig(max_redirects=1)
    with pytest.raises(AttributeError):
        config.storage = None  # type: ignore[misc]
    for bad in (lambda: storage.Compression("lz4"), lambda: config_of(store, externalize_threshold_bytes=-1)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must"):
            bad()
    place = store.generate_upload_url(ROWS)
    assert "hunter2" not in repr(place)
    for name in ("ServerExternalConfig", "FetchConfig", "publish_external", "redact_url"):
        assert getattr(core, name) is getattr(storage, name)


def test_connections_belong_to_the_process(store: Store) -> None:
    config = storage.FetchConfig()
    with config:
        url = store.add("a", b"abc")
        assert storage.fetch_url(url, config) == b"abc"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if storage.fetch_url(url, config) == b"abc" else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert storage.fetch_url(url, config) == b"abc"


def test_nothing_secret_is_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    impl = Impl()
    impl.refs["bad"] = core.ExternalRef(store.add("bad", Thing(GOOD, status=503)))
    with caplog.at_level(logging.DEBUG), connected("pipe", config_of(store), impl) as proxy:
        proxy.blob(20_000)
        with pytest.raises(core.RpcError):
            proxy.published("bad")
    assert "vgi_rpc.external" in {r.name for r in caplog.records}
    assert "hunter2" not in caplog.text
    record = next(r for r in caplog.records if r.name == "vgi_rpc.access" and r.__dict__["method"] == "blob")
    assert record.__dict__["externalized_bytes"] == len(store.things["s1"].data)


def test_the_command_line_fetches_and_shows_how_far_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    strict = core._CliStore()
    with pytest.raises(core.ExternalLocationError, match="only https"):
        strict.load(store.add("a", GOOD), None, None)
    allowed = functools.partial(storage.ClientExternalConfig, url_validator=anything)
    monkeypatch.setattr(core, "ClientExternalConfig", allowed)
    pointer = core.make_external_location_batch(RESULT, store.add("a", GOOD))
    assert core.resolve_external_location(*pointer, core._CliStore())[0]["result"].to_pylist() == [b"good"]
    assert f"fetching [{'#' * 30}] 0.0 of 0.0 MB" in shown.getvalue() and shown.getvalue().endswith("\r\x1b[K")
    monkeypatch.setattr(core, "FetchConfig", lambda **options: (_ for _ in ()).throw(ImportError("pip install it")))
    with pytest.raises(core.ExternalLocationError, match="pip install it"):
        core.resolve_external_location(*pointer, core._CliStore())


def test_fetching_without_httpx_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import vgi_rpc_extras.storage as package

    monkeypatch.delattr(package, "fetch", raising=False)
    monkeypatch.delitem(sys.modules, "vgi_rpc_extras.storage.fetch", raising=False)
    monkeypatch.setitem(sys.modules, "httpx", None)
    pointer = core.make_external_location_batch(RESULT, store.add("a", GOOD))
    with pytest.raises(core.ExternalLocationError, match=r"'httpx'.*pip install"):
        core.resolve_external_location(*pointer, config_of(None))
