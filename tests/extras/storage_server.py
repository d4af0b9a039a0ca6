"""A store on loopback that misbehaves as it is told, and what is stored in it."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc


@dataclass
class Thing:
    """One object; the attributes say how the server gets it wrong."""

    data: bytes
    coding: str = ""
    status: int = 200
    head_status: int = 0
    location: str = ""
    ranges: bool = True
    claim: int | None = None  # Content-Length that is claimed
    head_claim: int | None = None
    pause: float = 0.0  # seconds before the answer
    drip: float = 0.0  # seconds between bytes
    slow_range: str = ""  # the first request for this range hangs
    etag: str = '"one"'
    get_only: int = 0  # so many GETs succeed, then 404
    fails: int = 0  # so many requests fail with 503


@dataclass
class Asked:
    """A request as it came."""

    verb: str
    path: str
    headers: dict[str, str]


@dataclass
class Store:
    """The running server. It is an ExternalStorage and an UploadUrlProvider, too."""

    url: str = ""
    things: dict[str, Thing] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)
    query: str = "?X-Amz-Signature=hunter2&sig=topsecret"

    def add(self, name: str, thing: Thing | bytes) -> str:
        """Keep a thing; returns its URL."""
        self.things[name] = thing if isinstance(thing, Thing) else Thing(thing)
        return f"{self.url}/{name}{self.query}"

    def upload(self, data: bytes, schema: pa.Schema, *, content_encoding: str | None = None) -> str:
        with self.lock:
            return self.add(f"s{len(self.things)}", Thing(bytes(data), content_encoding or ""))

    def generate_upload_url(self, schema: pa.Schema) -> Any:
        from vgi_rpc_extras.storage import UploadUrl

        with self.lock:
            url = self.add(f"u{len(self.things)}", Thing(b"", status=404))
        return UploadUrl(url, url, datetime(2100, 1, 1, tzinfo=UTC))

    def verbs(self) -> list[str]:
        return [asked.verb for asked in self.asked]


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    """Run a store until the block ends."""
    store = Store()

    class Handler(_Handler):
        owner = store

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    owner: Store

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().finish()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note()
        name = self.path[1:].partition("?")[0]
        refused = self.owner.things.get("refuse-put")
        if refused is None:
            self.owner.things[name] = Thing(body, self.headers.get("Content-Encoding") or "")
        self._head(200 if refused is None else refused.status, {"Content-Length": "0"})

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _note(self) -> None:
        with self.owner.lock:
            headers = {key.lower(): value for key, value in self.headers.items()}
            self.owner.asked.append(Asked(self.command, self.path, headers))

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, body: bool) -> None:
        self._note()
        thing = self.owner.things.get(self.path[1:].partition("?")[0])
        status = 404 if thing is None else (thing.status if body else thing.head_status or thing.status)
        if thing is not None and thing.fails:
            thing.fails -= 1
            status = 503
        if thing is not None and thing.get_only and body:
            thing.get_only -= 1
            thing.status = 404 if not thing.get_only else thing.status
        if thing is None or status >= 300:
            location = {} if thing is None or not thing.location else {"Location": thing.location}
            return self._head(status, {"Content-Length": "0", **location})
        time.sleep(thing.pause)
        asked = self.headers.get("Range") if thing.ranges else None
        data, extra = thing.data, {"ETag": thing.etag}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if asked == thing.slow_range:
                thing.slow_range = ""
                time.sleep(30)
            data = thing.data[int(first) : int(last) + 1]
            status = 206
            extra["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{len(thing.data)}"
        claim = thing.claim if body else (thing.head_claim if thing.head_claim is not None else thing.claim)
        extra["Content-Length"] = str(len(data) if claim is None or asked else claim)
        if thing.ranges:
            extra["Accept-Ranges"] = "bytes"
        if thing.coding:
            extra["Content-Encoding"] = thing.coding
        self._head(status, extra)
        if body:
            self._send(data, thing.drip)
        if claim is not None and claim > len(data):
            self.close_connection = True

    def _send(self, data: bytes, drip: float) -> None:
        if not drip:
            self.wfile.write(data)
            return
        for at in range(len(data)):
            self.wfile.write(data[at : at + 1])
            self.wfile.flush()
            time.sleep(drip)


def stream(schema: pa.Schema, *items: tuple[pa.RecordBatch, dict[str, str] | None]) -> bytes:
    """An IPC stream of batches with metadata."""
    sink = io.BytesIO()
    with ipc.new_stream(sink, schema) as writer:
        for batch, metadata in items:
            writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(metadata or {}))
    return sink.getvalue()


def anything(url: str) -> None:
    """A validator that lets loopback in."""
    if not url.startswith("http://127.0.0.1:"):
        raise ValueError(f"not the test store: {url}")
