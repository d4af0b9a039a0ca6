# ruff: noqa: E402 (what may be missing is looked for first)
"""Requests that are too large to send, and the limits on what is stored, over HTTP."""

from __future__ import annotations

import contextlib
import logging
import threading
import tracemalloc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from tests.extras.storage_server import Store, Thing, anything, stream
from tests.extras.test_storage_store import ARGUMENT, ROWS, Impl, Service, config_of, pointer_request

for package in ("httpx", "falcon", "waitress"):
    pytest.importorskip(package)

import waitress.server
import waitress.wasyncore

from vgi_rpc_extras import storage
from vgi_rpc_extras.common import names
from vgi_rpc_extras.http import (
    http_capabilities,
    http_connect,
    http_introspect,
    make_sync_client,
    make_wsgi_app,
    request_upload_urls,
)
from vgi_rpc_extras.storage.store import vend_upload_urls

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

ARROW = "application/vnd.apache.arrow.stream"
CONTROL = "/__upload_url__/init"


@contextlib.contextmanager
def serving(config: Any = None, impl: Any = None, **options: Any) -> Iterator[str]:
    server = core.RpcServer(Service, impl or Impl(), external_location=config, enable_describe=True)
    sockets: dict[int, Any] = {}
    app = make_wsgi_app(server, token_key=b"k" * 32, **options)
    bound = waitress.server.create_server(app, map=sockets, host="127.0.0.1", port=0, threads=4)
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            waitress.wasyncore.loop(0.02, map=sockets, count=1)
        bound.task_dispatcher.shutdown()  # what still answers would miss what is closed next
        waitress.wasyncore.close_all(sockets)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.effective_port}"
    finally:
        over.set()
        thread.join(5)


@pytest.mark.parametrize("known", [True, False])
def test_requests_over_the_limit_are_uploaded(store: Store, known: bool) -> None:
    client = storage.ClientExternalConfig(url_validator=anything)
    with (
        serving(config_of(None), max_request_bytes=50_000, upload_url_provider=store) as url,
        http_connect(
            Service,
            url,
            external_location=client,
            compression_level=None,
            headers={"Authorization": "Bearer hunter3", "Cookie": "c=hunter3"},
            accepted_max_response_bytes=1 << 20 if known else None,
        ) as proxy,
    ):
        assert proxy.measure(b"x" * 10) == 10 and store.asked == []
        assert proxy.measure(b"x" * 200_000) == 200_000
        assert store.verbs() == ["PUT", "HEAD", "GET"]
        sent = store.asked[0].headers
        assert sent["content-type"] == ARROW and "hunter3" not in str(sent)
        with proxy.double() as session:
            batch = pa.RecordBatch.from_pydict({"n": list(range(20_000))}, schema=ROWS)
            answer = session.exchange(core.AnnotatedBatch(batch))
            assert answer.batch["n"].to_pylist()[-1] == 39_998
        assert store.verbs().count("PUT") == 2
        assert all("hunter3" not in str(asked) for asked in store.asked)


def test_an_upload_that_fails(store: Store) -> None:
    client = storage.ClientExternalConfig(url_validator=anything)
    with (
        serving(config_of(None), max_request_bytes=50_000, upload_url_provider=store) as url,
        http_connect(Service, url, external_location=client, compression_level=None) as proxy,
    ):
        store.things["refuse-put"] = Thing(b"", status=403)
        with pytest.raises(core.ExternalLocationError, match=r"could not be uploaded.*403") as caught:
            proxy.measure(b"x" * 200_000)
        assert (caught.value.error_type, caught.value.sent) == ("ExternalUploadFailed", "no")
        assert "hunter2" not in str(caught.value)
        assert proxy.measure(b"x") == 1
    with (
        serving(config_of(None), max_request_bytes=50_000, upload_url_provider=store) as url,
        http_connect(Service, url, external_location=storage.ClientExternalConfig()) as strict,
        pytest.raises(core.ExternalLocationError, match="URL rejected: only https"),
    ):
        strict.measure(b"x" * 20_000_000)


def test_request_upload_urls(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with serving(upload_url_provider=store, max_upload_bytes=777) as url, caplog.at_level(logging.INFO):
        for count, given in ((1, 1), (3, 3), (0, 1), (-5, 1), (1000, 100)):
            assert len(request_upload_urls(url, count=count)) == given
        place = request_upload_urls(url)[0]
        assert place.upload_url.startswith(store.url) and place.expires_at.tzinfo is not None
        found = http_capabilities(url)
        assert (found.upload_url_support, found.max_upload_bytes, found.externalization_enabled) == (True, 777, False)
    record = next(r for r in caplog.records if r.name == "vgi_rpc.access")
    assert (record.__dict__["method"], record.__dict__["method_type"]) == ("__upload_url__", "unary")
    assert "hunter2" not in caplog.text
    with serving() as url, pytest.raises(core.RpcError, match="vends no upload URLs") as caught:
        request_upload_urls(url)
    assert caught.value.error_type == "NotSupported"


def control(**metadata: str) -> bytes:
    schema = pa.schema([("count", pa.int64())])
    said = {"vgi_rpc.method": "__upload_url__", "vgi_rpc.request_version": "1", **metadata}
    return stream(schema, (pa.RecordBatch.from_pydict({"count": [2]}, schema=schema), said))


def test_what_the_control_route_refuses(store: Store) -> None:
    class Talks:
        def generate_upload_url(self, schema: pa.Schema) -> Any:
            raise OSError("https://x/y?k=hunter2")

    server = core.RpcServer(Service, Impl())
    client = make_sync_client(server, upload_url_provider=store, max_request_bytes=2000)
    arrow = {"Content-Type": ARROW}
    assert client.post(CONTROL, content=control(), headers=arrow).status_code == 200
    assert client.get(CONTROL).status_code == 405
    assert client.post(CONTROL, content=control(), headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post(CONTROL, content=bytes(3000), headers=arrow).status_code == 413
    for body in (control(**{"vgi_rpc.method": "x"}), control(**{"vgi_rpc.request_version": "2"}), b"", b"nonsense"):
        answer = client.post(CONTROL, content=body, headers=arrow)
        assert answer.status_code == 400 and "X-VGI-RPC-Error" not in answer.headers
        with pytest.raises(core.RpcError):
            core.read_reply(answer.content)
    answer = make_sync_client(server, upload_url_provider=Talks()).post(CONTROL, content=control(), headers=arrow)
    assert (answer.status_code, answer.headers["X-VGI-RPC-Error"]) == (200, "true")
    assert b"hunter2" not in answer.content
    with pytest.raises(core.RpcError, match="provider failed"):
        core.read_reply(answer.content)
    closed = make_sync_client(server, upload_url_provider=store, authenticate=lambda req: 1 / 0)
    assert closed.post(CONTROL, content=control(), headers=arrow).status_code == 500


def test_a_count_of_very_many_rows_costs_nothing(store: Store) -> None:
    rows = pa.RecordBatch.from_arrays([pa.nulls(1 << 24)], names=["count"])
    body = stream(rows.schema, (rows, {"vgi_rpc.method": "__upload_url__", "vgi_rpc.request_version": "1"}))
    client = make_sync_client(core.RpcServer(Service, Impl()), upload_url_provider=store)
    tracemalloc.start()
    try:
        answer = client.post(CONTROL, content=body, headers={"Content-Type": ARROW})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with pytest.raises(core.RpcError, match="unfold"):
        core.read_reply(answer.content)
    assert len(body) < 1000 and peak < 10_000_000


def test_answers_that_are_no_upload_urls() -> None:
    class Answers:
        def __init__(self, *columns: pa.Array) -> None:
            rows = pa.RecordBatch.from_arrays(list(columns), schema=names.UPLOAD_URL_RESPONSE_SCHEMA)
            self._body = core.serialize_record_batch_bytes(rows)

        def builtin(self, name: str, body: bytes, **options: Any) -> bytes:
            return self._body

    def asked(expires_at: int, count: int) -> str:
        times = pa.array([expires_at] * count, pa.timestamp("us", "UTC"))
        transport: Any = Answers(pa.array(["u"] * count), pa.array(["d"] * count), times)
        with pytest.raises(core.RpcError) as caught:
            vend_upload_urls(transport, 1)
        return str(caught.value)

    assert "no time" in asked(2**62, 1)
    assert "holds 101 upload URLs" in asked(0, 101)
    assert "no upload URLs" in asked(0, 0)


def test_an_argument_that_cannot_be_fetched_is_an_error_of_the_call(store: Store) -> None:
    client = make_sync_client(core.RpcServer(Service, Impl(), external_location=config_of(None)))
    headers = {"Content-Type": ARROW}
    body = pointer_request("measure", f"{store.url}/none?k=hunter2", ARGUMENT)
    answer = client.post("/Service/measure", content=body, headers=headers)
    assert (answer.status_code, answer.headers["X-VGI-RPC-Error"]) == (200, "true")
    with pytest.raises(core.RpcError, match="HTTP 404"):
        core.read_reply(answer.content)
    assert b"hunter2" not in answer.content
    refused = make_sync_client(
        core.RpcServer(Service, Impl(), external_location=config_of(None)),
        authenticate=lambda req: (_ for _ in ()).throw(ValueError("no")),
    )
    store.asked.clear()
    assert refused.post("/Service/measure", content=body, headers=headers).status_code == 401
    assert store.asked == []  # nothing is fetched for who has not been let in


def test_small_responses_of_large_data(store: Store) -> None:
    config = config_of(store)
    client = make_sync_client(
        core.RpcServer(Service, Impl(), external_location=config, enable_describe=True),
        max_response_bytes=65_536,
        max_externalized_response_bytes=300_000,
    )
    found = http_capabilities(client=client)
    assert (found.externalization_enabled, found.max_externalized_response_bytes) == (True, 300_000)
    assert "Service" in str(http_introspect(client=client, external_location=config))
    with http_connect(Service, client=client, external_location=config) as proxy:
        assert len(proxy.blob(250_000)) == 250_000
        before = len(store.things)
        with pytest.raises(core.RpcError, match="max_externalized_response_bytes") as caught:
            proxy.blob(400_000)
        assert caught.value.error_type == "RuntimeError" and len(store.things) == before
        assert sum(batch.batch.num_rows for batch in proxy.count(5, 20_000)) == 100_000
        with pytest.raises(core.RpcError, match="max_externalized_response_bytes"):
            proxy.count(1, 100_000).read_all()
    for options in ({"max_externalized_response_bytes": 0}, {"max_upload_bytes": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_sync_client(core.RpcServer(Service, Impl()), **options)


def test_what_methods_know_of_the_budget(store: Store) -> None:
    seen: list[tuple[Any, Any]] = []

    class Asking(Impl):
        def double(self) -> Any:
            return core.Stream(ROWS, Watching(), input_schema=ROWS)

    class Watching(core.ExchangeState):
        def serialize_to_bytes(self) -> bytes:
            return b"x"

        @classmethod
        def deserialize_from_bytes(cls, data: bytes, ipc_validation: Any = None) -> Any:
            return cls()

        def exchange(self, input: Any, out: Any, ctx: Any) -> None:
            seen.append((out.externalization_enabled, out.remaining_externalized_response_bytes))
            out.emit(input.batch)

    batch = core.AnnotatedBatch(pa.RecordBatch.from_pydict({"n": [1]}, schema=ROWS))
    with core.serve_pipe(Service, Asking(), external_location=config_of(store)) as proxy, proxy.double() as session:
        session.exchange(batch)
    assert seen == [(False, None)]
