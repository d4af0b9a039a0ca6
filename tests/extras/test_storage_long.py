# ruff: noqa: E402 (what may be missing is looked for first)
"""Large data with bounded memory, and how fast it is fetched; figures are printed (pytest -m long -s)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pytest

for package in ("httpx", "falcon", "waitress"):
    pytest.importorskip(package)

import httpx

from tests.extras.storage_server import anything
from vgi_rpc_extras.http import http_connect, serve_http
from vgi_rpc_extras.storage import ClientExternalConfig, FetchConfig, ServerExternalConfig, UploadUrl, fetch_url

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
ROWS = pa.schema([("n", pa.int64())])
BATCH_ROWS = 2 << 20  # 16 MiB
BATCHES = 64
NUMBERS = os.urandom(8 * BATCH_ROWS)
SPAWN = multiprocessing.get_context("spawn")


class Table(core.ProducerState):
    """1 GiB of numbers."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def produce(self, out: Any, ctx: Any) -> None:
        if self.at == BATCHES:
            out.finish()
            return
        out.emit_arrays([pa.Array.from_buffers(pa.int64(), BATCH_ROWS, [None, pa.py_buffer(NUMBERS)])])
        self.at += 1

    def serialize_to_bytes(self) -> bytes:
        return str(self.at).encode()

    @classmethod
    def deserialize_from_bytes(cls, data: bytes, ipc_validation: Any = None) -> Table:
        return cls(int(data))


class Large(Protocol):
    def table(self) -> core.Stream[Table]: ...
    def measure(self, data: bytes) -> int: ...


class LargeImpl:
    def table(self) -> Any:
        return core.Stream(ROWS, Table())

    def measure(self, data: bytes) -> int:
        return len(data)


def file_server(folder: str, bound: Any) -> None:
    """A store on disk, in a process of its own: what it holds is not in anyone's memory."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=folder)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_PUT(self) -> None:
            left = int(self.headers["Content-Length"])
            with open(os.path.join(folder, self.path[1:]), "wb") as file:
                while left:
                    left -= file.write(self.rfile.read(min(left, 1 << 20)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    bound.put(server.server_address[1])
    server.serve_forever()


class OnDisk:
    """Writes into the folder that the file server serves."""

    def __init__(self, folder: str, url: str) -> None:
        self.folder, self.url = folder, url

    def upload(self, data: bytes, schema: pa.Schema, *, content_encoding: str | None = None) -> str:
        name = os.urandom(8).hex()
        Path(self.folder, name).write_bytes(data)
        return f"{self.url}/{name}"

    def generate_upload_url(self, schema: pa.Schema) -> UploadUrl:
        from datetime import UTC, datetime

        url = f"{self.url}/{os.urandom(8).hex()}"
        return UploadUrl(url, url, datetime(2100, 1, 1, tzinfo=UTC))


def rpc_server(folder: str, url: str, bound: Any) -> None:
    store = OnDisk(folder, url)
    config = ServerExternalConfig(store, url_validator=anything, fetch_config=FetchConfig(max_fetch_bytes=1 << 30))
    serve_http(
        core.RpcServer(Large, LargeImpl(), external_location=config),
        token_key=b"k" * 32,
        max_response_bytes=1 << 20,
        max_request_bytes=1 << 20,
        upload_url_provider=store,
        on_bound=lambda host, port: bound.put(port),
    )


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        bound = SPAWN.Queue()
        files = SPAWN.Process(target=file_server, args=(folder, bound), daemon=True)
        files.start()
        url = f"http://127.0.0.1:{bound.get(timeout=60)}"
        server = SPAWN.Process(target=rpc_server, args=(folder, url, bound), daemon=True)
        server.start()
        yield f"http://127.0.0.1:{bound.get(timeout=60)}"
        for process in (server, files):
            process.kill()
            process.join()


def peak_of(work: Any, *args: Any) -> dict[str, Any]:
    """Run `work` in a fresh process; what it returns, and how much memory it had at most, in MB."""
    results = SPAWN.Queue()
    process = SPAWN.Process(target=_measured, args=(work, args, results))
    process.start()
    found: dict[str, Any] = results.get(timeout=500)
    process.join()
    return found


def _measured(work: Any, args: Any, results: Any) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    value = work(*args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put({"value": value, "seconds": time.monotonic() - began, "grew": (peak - before) / 1e3})


def read_table(url: str) -> int:
    rows = 0
    with http_connect(Large, url, external_location=ClientExternalConfig(url_validator=anything)) as proxy:
        for item in proxy.table():
            rows += item.batch.num_rows
    return rows


def send_argument(url: str, size: int) -> int:
    config = ClientExternalConfig(url_validator=anything)
    with http_connect(Large, url, external_location=config, compression_level=None) as proxy:
        return proxy.measure(b"x" * size)


def test_a_gigabyte_through_a_megabyte(service: str) -> None:
    found = peak_of(read_table, service)
    sys.stderr.write(f"\n1 GiB table, response cap 1 MiB: {found['seconds']:.1f} s, +{found['grew']:.0f} MB\n")
    assert found["value"] == BATCHES * BATCH_ROWS
    assert found["grew"] < 200  # some batches of 16 MiB, and what fetching imports


def test_an_argument_of_300_megabytes(service: str) -> None:
    found = peak_of(send_argument, service, 300_000_000)
    sys.stderr.write(f"\n300 MB argument: {found['seconds']:.1f} s, +{found['grew']:.0f} MB\n")
    assert found["value"] == 300_000_000
    assert found["grew"] < 1300  # the argument, its batch, its body, and one copy between


@contextlib.contextmanager
def nginx(folder: str) -> Iterator[str]:
    """A server that is faster than what is measured."""
    os.chmod(folder, 0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
    server = f"server {{ listen 127.0.0.1:{port}; root {folder}; }}"
    config = Path(folder, "nginx.conf")
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}}"
        f" http {{ access_log off; sendfile on; {paths} {server} }}"
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", folder])
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("parallel", [False, True])
def test_fetching_is_as_fast_as_httpx(parallel: bool) -> None:
    size = 200 << 20
    times: dict[str, list[float]] = {"httpx": [], "ours": []}
    threshold = 1 if parallel else size + 1
    with tempfile.TemporaryDirectory() as folder, nginx(folder) as base:
        Path(folder, "a").write_bytes(os.urandom(1 << 20) * 200)
        with httpx.Client() as client, FetchConfig(parallel_threshold_bytes=threshold) as config:
            for _ in range(7):
                began = time.perf_counter()
                assert len(client.get(f"{base}/a").content) == size
                times["httpx"].append(time.perf_counter() - began)
                began = time.perf_counter()
                assert len(fetch_url(f"{base}/a", config, url_validator=anything)) == size
                times["ours"].append(time.perf_counter() - began)
    ratio = min(times["httpx"]) / min(times["ours"])  # the least disturbed run of each
    rate = size / min(times["ours"]) / 1e6
    sys.stderr.write(f"\nfetch, parallel={parallel}: {rate:.0f} MB/s, {ratio:.2f} of httpx's speed\n")
    assert ratio > 0.8
