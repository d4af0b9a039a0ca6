"""The seam for batches that are kept elsewhere, with a store in memory; storage itself is tested in extras."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

ROWS = pa.schema([("n", pa.int64())])


class Memory:
    """A BatchStore: what is larger than a limit, by the number in its URL."""

    def __init__(self, least: int = 1000) -> None:
        self.least = least
        self.objects: list[bytes] = []
        self.waits: list[float | None] = []

    def wants(self, batch: pa.RecordBatch) -> bool:
        return batch.nbytes >= self.least

    def save(self, schema: pa.Schema, data: bytes) -> tuple[str, str, int]:
        self.objects.append(data)
        return f"mem:{len(self.objects) - 1}", hashlib.sha256(data).hexdigest(), len(data) // 2

    def load(self, url: str, sha256: str | None, timeout: float | None) -> tuple[bytes, float]:
        self.waits.append(timeout)
        data = self.objects[int(url.removeprefix("mem:"))]
        assert sha256 in (None, hashlib.sha256(data).hexdigest())
        return data, 0.0123


@dataclass
class Head(core.ArrowSerializableDataclass):
    text: str


@dataclass
class Twice(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.client_log(core.Level.INFO, "before")
        out.emit_pydict({"n": input.batch["n"].to_pylist() * 2}, {"own": "yes"})
        out.client_log(core.Level.INFO, "after")


class Service(Protocol):
    def text(self, size: int) -> str: ...
    def nothing(self) -> None: ...
    def twice(self, size: int) -> core.Stream[Twice, Head]: ...
    def known(self) -> str | core.ExternalRef: ...


class Impl:
    ref: Any = None

    def text(self, size: int) -> str:
        return "x" * size

    def nothing(self) -> None: ...

    def twice(self, size: int) -> Any:
        return core.Stream(ROWS, Twice(), input_schema=ROWS, header=Head("h" * size))

    def known(self) -> Any:
        return self.ref


def test_results_turns_and_headers() -> None:
    store, logs = Memory(), list[Any]()
    with core.serve_pipe(Service, Impl(), external_location=store, on_log=logs.append) as proxy:
        assert proxy.text(10) == "x" * 10 and proxy.nothing() is None and not store.objects
        assert proxy.text(5000) == "x" * 5000 and len(store.objects) == 1
        assert list(core.map_calls(proxy.text, ({"size": n} for n in (5, 2000)))) == ["x" * 5, "x" * 2000]
        assert core.submit(proxy.text, 3000).result(10) == "x" * 3000
        with proxy.twice(2000) as session:
            assert session.typed_header(Head).text == "h" * 2000 and len(store.objects) == 4
            for size, kept in ((10, 4), (500, 5)):
                rows = pa.RecordBatch.from_pydict({"n": list(range(size))}, schema=ROWS)
                answer = session.exchange(core.AnnotatedBatch(rows))
                assert answer.batch.num_rows == 2 * size and answer.custom_metadata[b"own"] == b"yes"
                assert len(store.objects) == kept
            assert answer.custom_metadata[b"vgi_rpc.location.fetch_ms"] == b"12.3"
            assert answer.custom_metadata[b"vgi_rpc.location.source"] == b"mem:4"
        assert [message.message for message in logs] == ["before", "after"] * 2
        core.with_options(proxy, timeout=7).text(5000)
        assert store.waits[-1] == 7 and store.waits[0] is None


def test_shared_memory_goes_before_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is uploaded for a call that has a segment, not even what finds no room in it (wire.md section 12)."""
    monkeypatch.setenv("VGI_RPC_SHM_MIN_BATCH_BYTES", "1000")
    store = Memory()
    segment = core.ShmSegment.create(core.HEADER_SIZE + 64 * 1024)
    client, far = core.make_pipe_pair()
    server = core.RpcServer(Service, Impl(), external_location=store)
    thread = threading.Thread(target=server.serve, args=(core.ShmPipeTransport(far, segment),))
    thread.start()
    shared = core.ShmPipeTransport(client, segment)
    with core.RpcConnection(Service, shared, external_location=store) as proxy:
        assert proxy.text(5000) == "x" * 5000
        assert segment.batches_shared == 1
        assert proxy.text(500_000) == "x" * 500_000
        assert (segment.batches_shared, segment.batches_inline) == (1, 1)
        with proxy.twice(2000) as session:
            assert session.typed_header(Head).text == "h" * 2000
            rows = pa.RecordBatch.from_pydict({"n": list(range(500))}, schema=ROWS)
            assert session.exchange(core.AnnotatedBatch(rows)).batch.num_rows == 1000
    thread.join(10)
    far.close()
    assert segment.batches_shared == 3 and not store.objects
    segment.close()
    segment.unlink()


def test_references() -> None:
    store, impl = Memory(1 << 30), Impl()
    with core.serve_pipe(Service, impl, external_location=store) as proxy:
        impl.ref = "plain"
        assert proxy.known() == "plain"
        schema = core.rpc_methods(Service)["known"].result_schema
        data = core.serialize_record_batch_bytes(pa.RecordBatch.from_pydict({"result": ["far"]}, schema=schema))
        impl.ref = core.ExternalRef(*store.save(schema, data)[:2])
        assert proxy.known() == "far"
        impl.ref = core.ExternalRef("mem:9")
        with pytest.raises(core.ExternalLocationError, match="IndexError"):
            proxy.known()
        assert proxy.text(3) == "xxx"
    with core.serve_pipe(Service, impl) as proxy, pytest.raises(core.RpcError, match="pass external_location="):
        proxy.known()


def test_a_limit_counts_before_anything_is_stored() -> None:
    store = Memory(0)
    batch = pa.RecordBatch.from_pydict({"n": [1]}, schema=ROWS)
    found = core.externalize(store, batch, [(batch, {b"k": b"v"})])
    assert found.raw_bytes == len(store.objects[0]) and found.stored_bytes == found.raw_bytes // 2
    again, metadata = core.resolve_external_location(found.batch, found.metadata, store)
    assert again.equals(batch) and metadata[b"k"] == b"v"
    with pytest.raises(RuntimeError, match="max_externalized_response_bytes leaves: 10"):
        core.externalize(store, batch, [(batch, None)], 10)
    assert len(store.objects) == 1
    assert core.externalize(None, batch, []) is None and core.externalize(store, batch.slice(0, 0), []) is None


def test_a_whole_reply() -> None:
    batch = pa.RecordBatch.from_pydict({"n": [1]}, schema=ROWS)
    assert core.read_reply(core.serialize_record_batch_bytes(batch)).equals(batch)
    body = core.RpcServer(Service, Impl()).error_body(KeyError("gone"))
    with pytest.raises(core.RpcError, match="gone"):
        core.read_reply(body)
    empty = pa.BufferOutputStream()
    core.new_ipc_stream(empty, ROWS).close()
    for bad, text in ((b"", "not readable"), (b"nonsense", "not readable"), (bytes(empty.getvalue()), "no result")):
        with pytest.raises(core.RpcError, match=text):
            core.read_reply(bad)
