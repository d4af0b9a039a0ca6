"""The HTTP client against a scripted server: what it sends, what it makes of good and of hostile answers."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pytest

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

httpx = pytest.importorskip("httpx", reason="the http extra: pip install 'vgi-rpc-onefile[http]'")
client = core._extras_load("http.client", "http_connect", "http")
coding = core._extras_load("common.coding", "http_connect", "http")
refusals = core._extras_load("http.refusals", "http_connect", "http")
capabilities = core._extras_load("http.capabilities", "http_connect", "http")
http_connect = client.http_connect

CORE_FILE = str(core.__file__)
ARROW = "application/vnd.apache.arrow.stream"
CAPABLE = {
    "VGI-Accept-Max-Response-Bytes-Support": "true",
    "VGI-Externalization-Enabled": "false",
    "VGI-Supported-Encodings": "zstd, gzip",
}
OUT = pa.schema([("i", pa.int64())])


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def size(self, data: bytes) -> int: ...
    def fail(self) -> int: ...
    def count(self, n: int) -> core.Stream[core.ProducerState]: ...
    def scale(self, factor: float) -> core.Stream[core.ExchangeState]: ...


class Impl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def size(self, data: bytes) -> int:
        return len(data)

    def fail(self) -> int:
        raise ValueError("no luck")

    def count(self, n: int) -> Any:
        raise NotImplementedError

    def scale(self, factor: float) -> Any:
        raise NotImplementedError


SERVER = core.RpcServer(Calc, Impl(), enable_describe=True)


# ---- a server that follows a script


@dataclasses.dataclass
class Asked:
    """One request as it came."""

    verb: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def plain(self) -> bytes:
        return bytes(coding.decode_content_encoding(self.body, self.headers.get("content-encoding")))

    @property
    def metadata(self) -> dict[bytes, bytes]:
        _, metadata = pa.ipc.open_stream(self.plain).read_next_batch_with_custom_metadata()
        return dict(metadata or {})


@dataclasses.dataclass
class Last:
    """An answer that talks to the socket itself and ends the connection."""

    talk: Callable[[Asked, socket.socket], None]


Answer = bytes | Callable[[Asked], "bytes | Last"] | Last


def reply(
    body: bytes, status: str = "200 OK", kind: str = ARROW, headers: dict[str, str] | None = None, capable: bool = True
) -> bytes:
    lines = {**(CAPABLE if capable else {}), "Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
    return (
        f"HTTP/1.1 {status}\r\n{''.join(f'{k}: {v}{chr(13)}{chr(10)}' for k, v in lines.items())}\r\n".encode() + body
    )


def served(asked: Asked) -> bytes:
    """What a real RpcServer answers."""
    out = io.BytesIO()
    SERVER.serve_one(core.PipeTransport(io.BytesIO(asked.plain), out))
    return reply(out.getvalue())


HEALTHY = reply(b"", kind="application/json")


class Scripted:
    """Answers each request with the next of `script`, and with `served` when that is used up."""

    def __init__(self, *script: Answer, probe: Answer = HEALTHY, tls: ssl.SSLContext | None = None) -> None:
        self.script = list(script)
        self.probe = probe
        self.tls = tls
        self.asked: list[Asked] = []
        self.connections = 0
        self._socks: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def posts(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.verb == "POST"]

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def hang_up(self) -> None:
        """Close all connections, as a server does with idle ones."""
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._socks.append(sock)
            self.connections += 1
            self._threads.append(threading.Thread(target=self._talk, args=(sock, self.connections)))
            self._threads[-1].start()

    def _talk(self, sock: socket.socket, number: int) -> None:
        try:
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True)
            with sock, sock.makefile("rb") as lines:
                while (asked := self._read(lines, number)) is not None:
                    self.asked.append(asked)
                    if not self._answer(asked, sock):
                        return
        except OSError:
            pass
        finally:
            sock.close()

    @staticmethod
    def _read(lines: Any, number: int) -> Asked | None:
        first = lines.readline().split()
        if not first:
            return None
        headers: dict[str, str] = {}
        while (line := lines.readline().strip()) != b"":
            name, _, value = line.partition(b": ")
            headers[name.decode().lower()] = value.decode()
        return Asked(
            first[0].decode(), first[1].decode(), headers, lines.read(int(headers.get("content-length", 0))), number
        )

    def _answer(self, asked: Asked, sock: socket.socket) -> bool:
        """Whether the connection stays open."""
        usual: Answer = self.script.pop(0) if self.script and asked.verb != "OPTIONS" else served
        answer = self.probe if asked.verb == "OPTIONS" else usual
        if not isinstance(answer, bytes | Last):
            answer = answer(asked)
        if isinstance(answer, Last):
            answer.talk(asked, sock)
            return False
        sock.sendall(answer)
        return True


HANG_UP = Last(lambda asked, sock: None)


def then_close(data: bytes) -> Last:
    return Last(lambda asked, sock: sock.sendall(data))


def stream_of(schema: pa.Schema, *batches: tuple[pa.RecordBatch, dict[str, str] | None]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch, metadata in batches:
            writer.write_batch(batch, custom_metadata=None if metadata is None else pa.KeyValueMetadata(metadata))
    return bytes(sink.getvalue())


def row(i: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array([i], pa.int64())], schema=OUT)


NONE = pa.record_batch([pa.array([], pa.int64())], schema=OUT)
CUR, CALL = "vgi_rpc.stream_state#b64", "vgi_rpc.call_state#b64"


def token(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def failure(text: str) -> tuple[pa.RecordBatch, dict[str, str]]:
    message = {"vgi_rpc.log_level": "EXCEPTION", "vgi_rpc.log_message": f"ValueError: {text}"}
    extra = json.dumps({"exception_type": "ValueError", "exception_message": text})
    return NONE, {**message, "vgi_rpc.log_extra": extra}


# ---- calls


def test_calls_share_one_connection_and_say_what_they_are() -> None:
    with Scripted() as server, http_connect(Calc, server.url + "/base/", prefix="/rpc") as calc:
        assert [calc.add(a=1.0, b=float(b)) for b in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert server.connections == 1
        assert [asked.verb for asked in server.asked] == ["OPTIONS"] + ["POST"] * 5
        first = server.posts[0]
        assert server.asked[0].path == "/base/rpc/health"
        assert first.path == "/base/rpc/Calc/add"
        assert first.headers["content-type"] == ARROW
        assert first.headers["vgi-accept-max-response-bytes"] == "268435456"
        assert first.headers["accept-encoding"] == "zstd, gzip"
        assert first.headers["host"] == f"127.0.0.1:{server.port}"
        assert first.metadata[b"vgi_rpc.protocol"] == b"Calc"


def test_nothing_is_sent_before_the_first_call_and_wrong_arguments_never_are() -> None:
    with Scripted() as server, http_connect(Calc, server.url) as calc:
        with pytest.raises(core.RpcArgumentError):
            calc.add(a="x", b=1.0)
        with pytest.raises(AttributeError, match="no RPC method 'nope'"):
            calc.nope()
        assert server.asked == []


def test_an_error_of_the_far_side_leaves_the_connection_usable() -> None:
    with Scripted() as server, http_connect(Calc, server.url) as calc:
        with pytest.raises(core.RpcError, match="no luck") as caught:
            calc.fail()
        assert (caught.value.error_type, caught.value.sent) == ("ValueError", "answered")
        assert calc.add(1.0, 2.0) == 3.0
        assert server.connections == 1


def test_threads_share_a_proxy() -> None:
    with Scripted() as server, http_connect(Calc, server.url) as calc:
        wrong: list[object] = []

        def work(base: int) -> None:
            for i in range(20):
                got = calc.add(float(base), float(i))
                if got != base + i:
                    wrong.append((base, i, got))

        threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == []
        assert len(server.posts) == 160
        assert server.connections <= 9


def test_large_bodies_are_packed_and_small_ones_are_not() -> None:
    with Scripted() as server, http_connect(Calc, server.url) as calc:
        assert calc.size(b"x" * 100_000) == 100_000
        assert calc.add(1.0, 2.0) == 3.0
        large, small = server.posts
        assert large.headers["content-encoding"] == "zstd" and len(large.body) < 5_000
        assert "content-encoding" not in small.headers
        assert calc.size(os.urandom(300_000)) == 300_000
        assert "content-encoding" not in server.posts[-1].headers
    with Scripted() as server, http_connect(Calc, server.url, compression_level=None) as calc:
        assert calc.size(os.urandom(3_000_000)) == 3_000_000
        assert server.posts[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("header", ["Content-Encoding", "X-VGI-Content-Encoding"])
@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
def test_packed_responses(encoding: str, header: str) -> None:
    def packed(asked: Asked) -> bytes:
        body = served(asked).partition(b"\r\n\r\n")[2]
        return reply(coding.compress(coding.Encoding(encoding), body), headers={header: encoding})

    with Scripted(packed, packed) as server, http_connect(Calc, server.url) as calc:
        assert calc.add(1.0, 2.0) == 3.0
        with httpx.Client(base_url=server.url) as given, http_connect(Calc, client=given) as other:
            assert other.add(1.0, 2.0) == 3.0


def test_chunked_bodies_interim_responses_and_bodies_to_the_end() -> None:
    def chunked(asked: Asked) -> bytes:
        head, _, body = served(asked).partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
        chunks = b"".join(
            b"%x;x=y\r\n%s\r\n" % (len(body[i : i + 50]), body[i : i + 50]) for i in range(0, len(body), 50)
        )
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        return (
            interim
            + b"\r\n".join([*lines, b"Transfer-Encoding: chunked"])
            + b"\r\n\r\n"
            + chunks
            + b"0\r\nA: b\r\n\r\n"
        )

    def to_the_end(asked: Asked, sock: socket.socket) -> None:
        head, _, body = served(asked).partition(b"\r\n\r\n")
        sock.sendall(b"\r\n".join(line for line in head.split(b"\r\n") if b"Length" not in line) + b"\r\n\r\n" + body)

    with Scripted(chunked, served, Last(to_the_end), served) as server, http_connect(Calc, server.url) as calc:
        assert [calc.add(1.0, float(i)) for i in range(4)] == [1.0, 2.0, 3.0, 4.0]
        assert server.connections == 2


def test_how_many_connections_are_kept() -> None:
    together = threading.Barrier(40)

    def all_at_once(asked: Asked) -> bytes:
        together.wait(20)  # so that each call has a connection of its own
        return served(asked)

    with Scripted(*[all_at_once] * 80) as server, http_connect(Calc, server.url, timeout=30) as calc:
        for opened in (40, 48):  # 32 of 40 are kept, and used again
            threads = [threading.Thread(target=calc.add, args=(1.0, 2.0)) for _ in range(40)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert (server.connections, len(server.posts)) == (opened, opened // 48 * 40 + 40)


# ---- lost connections, and what was sent


def test_a_connection_that_was_closed_between_calls_is_replaced() -> None:
    with Scripted() as server, http_connect(Calc, server.url) as calc:
        assert calc.add(1.0, 2.0) == 3.0
        server.hang_up()
        time.sleep(0.05)
        assert calc.add(2.0, 2.0) == 4.0
        assert (server.connections, len(server.posts)) == (2, 2)


def test_a_request_that_got_no_answer_is_not_sent_twice() -> None:
    with Scripted(served, HANG_UP) as server, http_connect(Calc, server.url) as calc:
        assert calc.add(1.0, 2.0) == 3.0
        with pytest.raises(core.ConnectionLostError, match="unary call to 'add'") as caught:
            calc.add(2.0, 2.0)
        assert (caught.value.sent, caught.value.error_type) == ("maybe", "TransportError")
        assert len(server.posts) == 2
        assert calc.add(3.0, 2.0) == 5.0


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with httpx.Client() as one:
        for given in (None, one):
            with http_connect(Calc, f"http://user:secret@127.0.0.1:{port}", client=given) as calc:
                with pytest.raises(core.ConnectionLostError) as caught:
                    calc.add(1.0, 2.0)
                assert caught.value.sent == "no"
                assert "secret" not in f"{caught.value!r}{calc!r}"
                if given is None:
                    assert f"is the server running? start it with --http --port {port}" in str(caught.value)
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("through_httpx", [False, True])
def test_tiny_chunks_cost_their_bytes(through_httpx: bool) -> None:
    count = 30_000
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {ARROW}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    answer = then_close(head + b"2\r\nxy\r\n" * count + b"0\r\n\r\n")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Scripted(served, answer))
        given = stack.enter_context(httpx.Client()) if through_httpx else None
        calc = stack.enter_context(http_connect(Calc, server.url, client=given, timeout=30))
        assert calc.add(1.0, 2.0) == 3.0  # what is loaded and learned at the first call is not meant
        tracemalloc.start()
        try:
            with pytest.raises(core.RpcError):
                calc.add(1.0, 2.0)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 12 * count  # a list of the chunks: 40 bytes each, and more


BAD_ANSWERS: dict[str, tuple[Answer, Any, str]] = {
    "truncated": (then_close(reply(b"x" * 100)[:-50]), core.ConnectionLostError, "50 bytes early"),
    "not http": (then_close(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), core.ConnectionLostError, "not an HTTP/1.1"),
    "http 2": (then_close(b"HTTP/2 200\r\n\r\n"), core.ConnectionLostError, "not an HTTP/1.1"),
    "bad status": (then_close(b"HTTP/1.1 2x0 OK\r\n\r\n"), core.ConnectionLostError, "not an HTTP/1.1"),
    "half a head": (then_close(b"HTTP/1.1 200 OK\r\nA: b\r\n"), core.ConnectionLostError, "middle of a response"),
    "huge headers": (then_close(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 80_000), core.ConnectionLostError, "headers"),
    "bad header": (then_close(b"HTTP/1.1 200 OK\r\nA b\r\n\r\n"), core.ConnectionLostError, "header line"),
    "folded header": (then_close(b"HTTP/1.1 200 OK\r\nA: b\r\n c: d\r\n\r\n"), core.ConnectionLostError, "header line"),
    "bad length": (then_close(reply(b"", headers={"Content-Length": "+1"})), core.ConnectionLostError, "Length"),
    "two lengths": (then_close(reply(b"", headers={"content-length": "5"})), core.ConnectionLostError, "Length"),
    "smuggled": (then_close(reply(b"", headers={"Transfer-Encoding": "chunked"})), core.ConnectionLostError, "chunked"),
    "bad chunk": (
        then_close(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n"),
        core.ConnectionLostError,
        "chunk",
    ),
    "chunk of 1_0 bytes": (
        then_close(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1_0\r\n" + bytes(16) + b"\r\n0\r\n\r\n"),
        core.ConnectionLostError,
        "chunk begins with b'1_0'",
    ),
    "endless interim": (then_close(b"HTTP/1.1 100 Continue\r\n\r\n" * 50), core.ConnectionLostError, "interim"),
    "no arrow": (reply(b"hello"), core.ConnectionLostError, "not an Arrow IPC stream"),
    "empty arrow": (reply(b""), core.ConnectionLostError, "ends"),
    "half an arrow": (
        lambda asked: reply(served(asked).partition(b"\r\n\r\n")[2][:-9]),
        core.ConnectionLostError,
        "ends",
    ),
    "bad zstd": (reply(b"nonsense", headers={"Content-Encoding": "zstd"}), core.ConnectionLostError, "unpack"),
    "too long": (
        then_close(b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nContent-Length: 999999999999\r\n\r\n"),
        core.RpcError,
        "accepted_max_response_bytes=268435456",
    ),
    "bomb": (
        reply(coding.compress(coding.Encoding.ZSTD, bytes(300_000_000)), headers={"Content-Encoding": "zstd"}),
        core.RpcError,
        "accepted_max_response_bytes=268435456",
    ),
    "gateway": (
        reply(b"<html>Bad\x1b[31m Gateway</html>", "502 Bad Gateway", "text/html", capable=False),
        client.HttpTransientError,
        r"HTTP 502: <html>Bad \[31m Gateway</html>$",
    ),
    "html": (reply(b"<html>hi</html>", kind="text/html"), core.RpcError, r"HTTP 200 \(text/html\): <html>hi</html>"),
    "forbidden": (
        reply(b"token=abc", "403 Forbidden", "text/plain"),
        core.RpcError,
        r"HTTP 403 \(text/plain\): \(no text\)",
    ),
    "moved": (reply(b"", "302 Found", "x/y", {"Location": "/elsewhere"}), core.RpcError, "HTTP 302"),
    "moved away": (
        reply(b"", "307 Temporary Redirect", "x/y", {"Location": "http://127.0.0.2:1/x?secret"}),
        core.RpcError,
        "redirects to another server",
    ),
    "moved for good": (
        reply(
            b"", "301 Moved Permanently", "text/html", {"Location": "https://right.example/rpc?secret"}, capable=False
        ),
        core.RpcError,
        r"HTTP 301 redirects to another server, https://right\.example/rpc; connect",
    ),
    "web page": (reply(b"<html>hi</html>", kind="text/html", capable=False), core.RpcError, "web page, not a service"),
    "stacked": (
        reply(b"x", kind=ARROW, headers={"Content-Encoding": "gzip, zstd, gzip"}),
        core.ConnectionLostError,
        "3 codings; at most 2",
    ),
    "unconfirmed": (lambda asked: served(asked).replace(b"-Support: true", b"-Support: 1"), core.RpcError, "confirm"),
    "confirmed twice": (
        lambda asked: served(asked).replace(b"\r\n", b"\r\nVGI-Accept-Max-Response-Bytes-Support: true\r\n", 1),
        core.RpcError,
        "confirm",
    ),
    "too large": (reply(b"{}", "413 Content Too Large", "application/json"), core.RpcError, "RequestTooLarge"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_end_in_one_typed_error_and_cost_nothing_else(name: str) -> None:
    answer, expected, text = BAD_ANSWERS[name]
    with Scripted(answer) as server, http_connect(Calc, server.url, timeout=20) as calc:
        with pytest.raises(expected, match=text) as caught:
            calc.add(1.0, 2.0)
        assert caught.value.sent != "no"
        assert "secret" not in str(caught.value)
        assert len(server.posts) == 1
        assert calc.add(2.0, 2.0) == 4.0


@pytest.mark.parametrize("name", ["truncated", "not http", "no arrow", "gateway", "html", "too long", "moved away"])
def test_bad_answers_through_httpx_end_alike(name: str) -> None:
    answer, expected, _ = BAD_ANSWERS[name]
    with Scripted(answer) as server, httpx.Client(follow_redirects=True) as given:
        with http_connect(Calc, server.url, client=given, timeout=20) as calc:
            with pytest.raises(expected):
                calc.add(1.0, 2.0)
            assert calc.add(2.0, 2.0) == 4.0
        assert not given.is_closed


def until_taken(sock: socket.socket) -> None:
    """Wait until the peer's kernel has all that has been sent."""
    deadline = time.monotonic() + 10
    while struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what is under way")
def test_an_answer_before_the_request_has_been_read() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        for answer in (HEALTHY, reply(b"{}", "413 Content Too Large", "application/json")):
            sock, _ = listener.accept()
            sock.recv(1000)
            sock.sendall(answer.replace(b"Content-Type", b"Connection: close\r\nContent-Type"))
            until_taken(sock)  # a reset that comes after the answer does not take it away
            sock.close()

    thread = threading.Thread(target=refuse)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener, http_connect(Calc, url, compression_level=None, timeout=20) as calc:
        with pytest.raises(core.RpcError) as caught:
            calc.size(bytes(30_000_000))
        thread.join(10)
    assert (caught.value.error_type, caught.value.sent) == ("RequestTooLarge", "answered")


# ---- time


def drip(asked: Asked, sock: socket.socket) -> None:
    for byte in served(asked):
        sock.sendall(bytes([byte]))
        time.sleep(0.05)


def silence(asked: Asked, sock: socket.socket) -> None:
    sock.settimeout(10)
    sock.recv(1)  # until the client has had enough


DRIP, SILENCE = Last(drip), Last(silence)


@pytest.mark.parametrize(("slow", "own"), [(DRIP, True), (SILENCE, True), (SILENCE, False)])
def test_a_timeout_bounds_the_whole_call(slow: Answer, own: bool) -> None:
    with Scripted(slow) as server, httpx.Client() as given:  # noqa: SIM117
        with http_connect(Calc, server.url, client=None if own else given) as calc:
            hasty = core.with_options(calc, timeout=0.4)
            began = time.monotonic()
            with pytest.raises(core.DeadlineExceededError, match="unary call to 'add'") as caught:
                hasty.add(1.0, 2.0)
            assert time.monotonic() - began < 2.0
            assert caught.value.sent == "maybe"
            assert b"x-timeout-us" in server.posts[0].metadata
            assert calc.add(2.0, 2.0) == 4.0


def test_close_wakes_a_call_of_another_thread() -> None:
    with Scripted(SILENCE) as server:
        connection = http_connect(Calc, server.url)
        calc = connection.__enter__()
        failed: list[BaseException] = []

        def call() -> None:
            try:
                calc.add(1.0, 2.0)
            except BaseException as exc:
                failed.append(exc)

        thread = threading.Thread(target=call)
        thread.start()
        while not server.posts:
            time.sleep(0.01)
        connection.__exit__(None, None, None)
        thread.join(5)
        assert [type(exc) for exc in failed] == [core.ConnectionLostError]
        with pytest.raises(core.ConnectionLostError, match="closed; connect again") as caught:
            calc.add(1.0, 2.0)
        assert caught.value.sent == "no"


def test_an_interrupt_ends_the_connection_it_struck() -> None:
    with Scripted(SILENCE) as server, http_connect(Calc, server.url) as calc:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            calc.add(1.0, 2.0)
        assert calc.add(2.0, 2.0) == 4.0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_child_of_a_fork_has_to_connect_again() -> None:
    with Scripted() as server, http_connect(Calc, server.url) as calc:
        assert calc.add(1.0, 2.0) == 3.0
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                calc.add(1.0, 2.0)
            except core.WrongProcessError as exc:
                calc._transport.close()
                status = 0 if exc.sent == "no" else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert calc.add(2.0, 2.0) == 4.0
        assert server.connections == 1


# ---- what the status says


def test_unauthorized() -> None:
    body = {"error": "unauthorized", "reason": "expired_credential", "detail": "rejected", "proxy_hint": "use the door"}
    refusals = [
        reply(json.dumps(body).encode(), "401 Unauthorized", "application/json", capable=False),
        reply(b"<html>", "401 Unauthorized", "text/html", {"VGI-Auth-Reason": "proxy_required"}),
        reply(b"", "401 Unauthorized", "text/plain", {"VGI-Auth-Reason": "made_up"}),
    ]
    found = []
    with Scripted(*refusals) as server, http_connect(Calc, server.url, headers={"Authorization": "Bearer k"}) as calc:
        for _ in refusals:
            with pytest.raises(client.AuthenticationError) as caught:
                calc.add(1.0, 2.0)
            found.append((caught.value.reason, caught.value.proxy_hint, caught.value.code))
        assert server.posts[0].headers["authorization"] == "Bearer k"
    code = core.Code.UNAUTHENTICATED
    assert found == [
        ("expired_credential", "use the door", code),
        ("proxy_required", "", code),
        ("unauthorized", "", code),
    ]


@pytest.mark.parametrize(("status", "sent"), [(429, "answered"), (503, "answered"), (502, "maybe"), (504, "maybe")])
def test_try_later(status: int, sent: str) -> None:
    retry = client.HttpRetryConfig(backoff_base=0.0)
    answer = reply(b"{}", f"{status} Later", "application/json", {"Retry-After": "7"}, capable=False)
    with Scripted(answer) as server, http_connect(Calc, server.url, retry=retry) as calc:
        with pytest.raises(client.HttpTransientError) as caught:
            calc.add(1.0, 2.0)
        assert len(server.posts) == 1  # calls are never repeated
    error = caught.value
    assert (error.status_code, error.retry_after, error.sent) == (status, 7.0, sent)
    assert error.is_retryable() and error.retry_info().retry_delay_seconds == 7


def test_what_is_safe_to_repeat_is_repeated() -> None:
    down = reply(b"", "503 Down", "text/plain", {"Retry-After": "0"})
    script: list[Answer] = [down, HANG_UP, HEALTHY]

    def probe(asked: Asked) -> Any:
        return script.pop(0) if len(script) > 1 else script[0]

    retry = client.HttpRetryConfig(max_retries=3, backoff_base=0.01)
    with Scripted(down, down, probe=probe) as server:
        assert client.http_introspect(server.url, retry=retry).protocol_name == "Calc"
        assert [asked.verb for asked in server.asked].count("OPTIONS") >= 3
        assert len(server.posts) == 4  # two failures, list_protocols, describe
    with Scripted(probe=down) as server, http_connect(Calc, server.url) as calc:
        with pytest.raises(client.HttpTransientError):
            calc.add(1.0, 2.0)
        assert len(server.asked) == 1


def test_the_pauses_between_attempts() -> None:
    config = client.HttpRetryConfig(backoff_base=1.0, backoff_max=5.0)
    assert all(0 <= config.delay(2) <= 4 for _ in range(50))
    assert all(config.delay(1000) <= 5 for _ in range(50))
    assert config.delay(0, 3.0) >= 3.0 and config.delay(0, 100.0) == 5.0
    for bad in ({"max_retries": -1}, {"backoff_base": -0.1}, {"backoff_max": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            client.HttpRetryConfig(**bad)
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 95 < refusals.retry_after({"retry-after": later}) < 101
    assert refusals.retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0
    assert [refusals.retry_after({"retry-after": x}) for x in ("soon", "-1", "1.5", "")] == [None] * 4


def test_a_redirect_on_the_same_server_keeps_the_request() -> None:
    moved = reply(b"", "308 Permanent Redirect", "x/y", {"Location": "/new/Calc/add"})
    with Scripted(moved) as server, http_connect(Calc, server.url) as calc:
        assert calc.add(1.0, 2.0) == 3.0
        assert [asked.path for asked in server.posts] == ["/Calc/add", "/new/Calc/add"]
        assert server.posts[0].body == server.posts[1].body
    with Scripted(*[moved] * 9) as server, http_connect(Calc, server.url) as calc:  # noqa: SIM117
        with pytest.raises(core.RpcError, match="HTTP 308"):
            calc.add(1.0, 2.0)


def test_another_coding_when_the_first_is_refused() -> None:
    refused = reply(b"{}", "415 No", "application/json", {"VGI-Supported-Encodings": "gzip"})
    with Scripted(refused) as server, http_connect(Calc, server.url) as calc:
        assert calc.size(b"x" * 10_000) == 10_000
        assert calc.size(b"x" * 10_000) == 10_000
        assert [asked.headers["content-encoding"] for asked in server.posts] == ["zstd", "gzip", "gzip"]
    none = reply(b"", kind="x/y", headers={"VGI-Supported-Encodings": ""})
    with Scripted(probe=none) as server, http_connect(Calc, server.url) as calc:
        assert calc.size(b"x" * 10_000) == 10_000
        assert "content-encoding" not in server.posts[0].headers


def test_requests_over_the_limit() -> None:
    limited = reply(b"", kind="x/y", headers={"VGI-Max-Request-Bytes": "5000", "Cache-Control": "max-age=300"})
    with Scripted(probe=limited) as server, http_connect(Calc, server.url) as calc:
        with pytest.raises(core.RpcError, match="server takes 5000") as caught:
            calc.size(b"x" * 10_000)
        assert (caught.value.error_type, caught.value.sent) == ("RequestTooLarge", "no")
        assert server.posts == []

    class Store:
        def upload_request(self, transport: Any, body: bytes) -> bytes:
            stored.append(body)
            return stored[0].replace(b"x", b"y")

    stored: list[bytes] = []
    vends = reply(b"", kind="x/y", headers={"VGI-Max-Request-Bytes": "5000", "VGI-Upload-URL-Support": "true"})
    with Scripted(probe=vends) as server, http_connect(Calc, server.url, external_location=Store()) as calc:
        assert calc.size(b"x" * 10_000) == 10_000
        assert len(stored) == 1 and b"yyyy" in server.posts[0].plain
    late = reply(b"{}", "413 No", "application/json", {"VGI-Upload-URL-Support": "true"})
    with Scripted(late) as server, http_connect(Calc, server.url, external_location=Store()) as calc:
        assert calc.size(b"x" * 10_000) == 10_000
        assert len(stored) == 2 and len(server.posts) == 2


def test_a_server_that_does_not_confirm_the_limit_is_not_called() -> None:
    old = reply(b"", kind="application/json", capable=False)
    with Scripted(probe=old) as server, http_connect(Calc, server.url) as calc:
        for _ in range(2):
            with pytest.raises(core.RpcError, match="does not confirm") as caught:
                calc.add(1.0, 2.0)
            assert (caught.value.error_type, caught.value.sent) == ("ProtocolError", "no")
        assert server.posts == []
    with Scripted(probe=old) as server, http_connect(Calc, server.url, accepted_max_response_bytes=None) as calc:
        assert calc.add(1.0, 2.0) == 3.0
        assert [asked.verb for asked in server.asked] == ["POST"]
        assert "vgi-accept-max-response-bytes" not in server.posts[0].headers
    with (
        Scripted(probe=reply(b"gone", "404 Not Found", "text/plain")) as server,
        http_connect(Calc, server.url) as calc,
    ):
        with pytest.raises(core.RpcError, match="capability probe: HTTP 404") as caught:
            calc.add(1.0, 2.0)
        assert caught.value.error_type == "ProtocolError"


def test_capabilities() -> None:
    headers = {
        "VGI-Max-Request-Bytes": "1000",
        "VGI-Max-Response-Bytes": "١٢",
        "VGI-Upload-URL-Support": "true",
        "VGI-Sticky-Enabled": "true",
        "VGI-Sticky-Echo-Headers": "a, b",
        "Cache-Control": "public, max-age=300",
    }
    with Scripted(probe=reply(b"", kind="x/y", headers=headers)) as server:
        found = client.http_capabilities(server.url)
        assert "vgi-accept-max-response-bytes" not in server.asked[0].headers
    assert (found.max_request_bytes, found.max_response_bytes) == (1000, None)
    assert found.upload_url_support and found.sticky_enabled and found.accept_max_response_bytes_support
    assert found.sticky_echo_headers == ("a", "b")
    assert found.supported_encodings == (coding.Encoding.ZSTD, coding.Encoding.GZIP)
    assert 290 < found.cache_expires_at - time.monotonic() <= 300
    codings = {None: ("zstd",), "": (), "br": ("zstd",), "gzip, br": ("gzip",)}
    assert {value: capabilities._supported(value) for value in codings} == codings


def test_ping_asks_for_the_health() -> None:
    with Scripted() as server, http_connect(Calc, server.url) as calc:
        assert 0 < core.ping(calc) < 5
        assert [(asked.verb, asked.path) for asked in server.asked] == [("OPTIONS", "/health")]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "base_url or a client"),
        ({"base_url": "ftp://h"}, "http://"),
        ({"base_url": "127.0.0.1:80"}, "http://"),
        ({"base_url": "http://h?token=secret"}, "no query"),
        ({"base_url": "http://h/a b"}, "ASCII"),
        ({"base_url": "http://h:port"}, "URL"),
        ({"base_url": "http://h", "prefix": "x"}, "prefix"),
        ({"base_url": "http://h", "prefix": "/x\r\nA: b"}, "prefix"),
        ({"base_url": "http://h", "headers": {"A": "b\r\nC: d"}}, "control characters"),
        ({"base_url": "http://h", "accepted_max_response_bytes": 65_535}, "accepted_max_response_bytes"),
        ({"base_url": "http://h", "accepted_max_response_bytes": True}, "accepted_max_response_bytes"),
        ({"base_url": "http://h", "timeout": 0}, "timeout"),
        ({"client": object()}, "httpx.Client"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        http_connect(Calc, **options)
    assert "secret" not in str(caught.value)


def test_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subject = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run([openssl, *command.split(), *subject], check=True, capture_output=True, timeout=60)
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(cert, key)
    with Scripted(tls=inside) as server:
        with (
            http_connect(Calc, server.url) as calc,
            pytest.raises(core.ConnectionLostError, match="CERTIFICATE") as caught,
        ):
            calc.add(1.0, 2.0)
        assert caught.value.sent == "no"
        monkeypatch.setenv("SSL_CERT_FILE", cert)
        with http_connect(Calc, server.url, timeout=20) as calc:
            assert calc.add(1.0, 2.0) == 3.0
            assert calc.size(b"x" * 100_000) == 100_000
            assert server.connections == 2


# ---- streams


def opening(*batches: tuple[pa.RecordBatch, dict[str, str] | None]) -> bytes:
    return reply(stream_of(OUT, *batches))


def tokens(cur: str, call: str | None = "call") -> tuple[pa.RecordBatch, dict[str, str]]:
    return NONE, {CUR: token(cur), **({CALL: token(call)} if call else {})}


def test_a_producer_hands_its_tokens_back() -> None:
    script = [
        opening((row(0), {"app.k": "v"}), tokens("one")),
        opening((NONE, None), tokens("two", None)),  # no rows, but data: it has no token
        opening(tokens("three", None)),  # a turn that emitted nothing
        opening((row(1), None)),
    ]
    with Scripted(*script) as server, http_connect(Calc, server.url) as calc:
        with calc.count(3) as session:
            assert session.schema == OUT
            got = [(item.batch.num_rows, item.custom_metadata) for item in session]
            assert [rows for rows, _ in got] == [1, 0, 1]
            assert dict(got[0][1]) == {b"app.k": b"v"} and got[1][1] is None
        assert [asked.path for asked in server.posts] == ["/Calc/count/init"] + ["/Calc/count/exchange"] * 3
        sent = [asked.metadata for asked in server.posts[1:]]
        assert [m[CUR.encode()].decode() for m in sent] == [token("one"), token("two"), token("three")]
        assert {m[CALL.encode()].decode() for m in sent} == {token("call")}
        with pytest.raises(core.RpcError, match="closed or cancelled"):
            session.tick()


def test_several_batches_in_one_response_are_queued_when_iterating() -> None:
    script = [opening((row(0), None), (row(1), None), tokens("one")), opening((row(2), None))]
    with Scripted(*script, script[0]) as server, http_connect(Calc, server.url) as calc:
        assert calc.count(3).read_all().column("i").to_pylist() == [0, 1, 2]
        with pytest.raises(core.RpcError, match="several batches"):
            calc.count(3).next_with_token()


def test_a_resume_token_goes_on_elsewhere() -> None:
    script = [
        opening((row(0), None), tokens("one")),
        opening((row(1), None), tokens("two", None)),
        opening((row(2), None)),
    ]
    with Scripted(*script) as server:
        with http_connect(Calc, server.url) as calc:
            session = calc.count(3)
            item, first = session.next_with_token()
            assert item.batch.column(0).to_pylist() == [0]
            assert first == len(token("one")).to_bytes(4, "little") + f"{token('one')}{token('call')}".encode()
            _, second = session.next_with_token()
        with http_connect(Calc, server.url) as calc:
            resumed = calc.resume_stream("count", second)
            item, last = resumed.next_with_token()
            assert (item.batch.column(0).to_pylist(), last) == ([2], None)
            assert resumed.next_with_token() == (None, None)
            assert server.posts[-1].metadata[CUR.encode()].decode() == token("two")
            for bad in (b"", b"abc", b"\xff\xff\xff\xffabcdef", b"\0\0\0\0abc"):
                with pytest.raises(ValueError, match="resume token"):
                    calc.resume_stream("count", bad)
            with pytest.raises(TypeError, match="not a stream"):
                calc.resume_stream("add", second)


def test_an_exchange_keeps_the_token_it_has() -> None:
    script = [
        opening(tokens("zero")),
        opening((row(1), {CUR: token("one"), "app.k": "v"})),
        opening((row(2), None)),  # no new token: the old one stays
        opening((row(3), {CUR: token("three")})),
    ]
    with Scripted(*script) as server, http_connect(Calc, server.url) as calc:
        with calc.scale(2.0) as session:
            sent = core.AnnotatedBatch(row(9), pa.KeyValueMetadata({"app.x": "y"}))
            got = [session.exchange(sent) for _ in range(3)]
        assert [item.batch.column(0).to_pylist() for item in got] == [[1], [2], [3]]
        assert [None if item.custom_metadata is None else dict(item.custom_metadata) for item in got] == [
            {b"app.k": b"v"},
            None,
            None,
        ]
        turns = [asked.metadata for asked in server.posts[1:]]
        assert [m[CUR.encode()].decode() for m in turns] == [token("zero"), token("one"), token("one")]
        assert all(m[b"app.x"] == b"y" and m[CALL.encode()].decode() == token("call") for m in turns)


def test_errors_end_a_stream() -> None:
    script = [
        opening(failure("at once")),
        opening((row(0), None), tokens("one")),
        opening(failure("later")),
        opening((row(0), None), failure("after a batch")),
        opening(tokens("zero")),
        opening(),
    ]
    with Scripted(*script) as server, http_connect(Calc, server.url) as calc:
        with pytest.raises(core.RpcError, match="at once"):
            calc.count(1)
        for text in ("later", "after a batch"):
            session = calc.count(1)
            items = iter(session)
            assert next(items).batch.num_rows == 1
            with pytest.raises(core.RpcError, match=text):
                next(items)
            with pytest.raises(core.RpcError, match="closed or cancelled"):
                session.tick()
        with calc.scale(1.0) as session, pytest.raises(core.RpcError, match="answered with 0 batches"):
            session.exchange(core.AnnotatedBatch(row(1)))
        assert calc.add(1.0, 2.0) == 3.0


def test_a_refused_turn_can_be_asked_for_again() -> None:
    refused = reply(b"{}", "503 Down", "application/json", {"Retry-After": "1"})
    script = [
        opening(tokens("zero")),
        refused,
        opening((row(1), {CUR: token("one")})),
        opening((row(0), None), tokens("one")),
        refused,
        opening((row(1), None)),
    ]
    with Scripted(*script) as server, http_connect(Calc, server.url) as calc:
        session = calc.scale(1.0)
        with pytest.raises(client.HttpTransientError) as caught:
            session.exchange(core.AnnotatedBatch(row(1)))
        assert (caught.value.sent, caught.value.is_retryable()) == ("answered", True)
        assert session.exchange(core.AnnotatedBatch(row(1))).batch.num_rows == 1
        session = calc.count(2)
        items = iter(session)
        assert next(items).batch.num_rows == 1
        with pytest.raises(client.HttpTransientError):
            next(items)
        assert len(list(session)) == 1  # nothing twice, nothing left out
        sent = [asked.metadata[CUR.encode()].decode() for asked in server.posts if asked.path.endswith("exchange")]
        assert sent == [token("zero"), token("zero"), token("one"), token("one")]


def test_a_lost_turn_ends_the_session_and_nothing_else() -> None:
    script: list[Answer] = [opening(tokens("zero")), HANG_UP, opening(tokens("zero")), SILENCE]
    with Scripted(*script) as server, http_connect(Calc, server.url) as calc:
        session = calc.scale(1.0)
        with pytest.raises(core.RpcArgumentError):
            session.exchange(core.AnnotatedBatch(row(1), {b"\xff": 5}))
        with pytest.raises(core.ConnectionLostError, match="stream exchange") as caught:
            session.exchange(core.AnnotatedBatch(row(1)))
        assert caught.value.sent == "maybe"
        with pytest.raises(core.RpcError, match="closed or cancelled"):
            session.exchange(core.AnnotatedBatch(row(1)))
        other = calc.scale(1.0)
        with pytest.raises(core.DeadlineExceededError):
            other.exchange(core.AnnotatedBatch(row(1)), timeout=0.2)
        assert calc.add(1.0, 2.0) == 3.0


def test_cancel_tells_the_server_and_never_raises() -> None:
    script: list[Answer] = [opening((row(0), None), tokens("one")), opening(), opening(tokens("one")), HANG_UP]
    with Scripted(*script) as server, http_connect(Calc, server.url) as calc:
        session = calc.count(9)
        session.cancel()
        session.cancel()
        assert server.posts[-1].metadata == {
            b"vgi_rpc.cancel": b"1",
            CUR.encode(): token("one").encode(),
            CALL.encode(): token("call").encode(),
        }
        for use in (session.tick, session.read_all, lambda: list(session)):  # nothing that reads as an empty stream
            with pytest.raises(core.RpcError, match="closed or cancelled"):
                use()
        other = calc.count(9)
        other.cancel()
        assert len(server.posts) == 4


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "1"])
def test_the_timeout_of_a_turn_is_checked(timeout: Any) -> None:
    with Scripted(opening((row(0), None), tokens("one")), opening((row(1), None))) as server:  # noqa: SIM117
        with http_connect(Calc, server.url) as calc, calc.count(2) as session:
            for _ in range(2):  # whether a batch is waiting or has to be asked for
                with pytest.raises(ValueError, match="timeout must be"):
                    session.tick(timeout=timeout)
                session.tick(timeout=20.0)
            assert len(server.posts) == 2


def test_metadata_for_a_batch_that_is_here_already() -> None:
    with Scripted(opening((row(0), None), tokens("one"))) as server, http_connect(Calc, server.url) as calc:  # noqa: SIM117
        with calc.count(2) as session, pytest.raises(ValueError, match="take it first"):
            session.tick(pa.KeyValueMetadata({"a": "b"}))


def test_a_callback_that_raises_ends_the_stream_with_its_exception() -> None:
    log = {"vgi_rpc.log_level": "INFO", "vgi_rpc.log_message": "hello"}
    script = [opening((NONE, log), (row(0), None)), opening((NONE, log), (row(0), None), tokens("one"))]
    heard: list[str] = []

    def boom(message: Any) -> None:
        raise LookupError(message.message)

    with Scripted(*script) as server:  # noqa: SIM117
        with http_connect(Calc, server.url, on_log=lambda m: heard.append(m.message)) as calc:
            assert len(list(calc.count(1))) == 1
            assert heard == ["hello"]
            with pytest.raises(LookupError, match="hello"):
                core.with_options(calc, on_log=boom).count(1)


# ---- the other half


def test_the_real_server(tmp_path: Path) -> None:
    if importlib.util.find_spec(f"{client.__package__}.server") is None:
        pytest.skip("the server half of vgi_rpc_extras.http is not here")
    script = tmp_path / "service.py"
    script.write_text(REAL_SERVICE, encoding="utf-8")
    root = str(Path(CORE_FILE).parent)
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    worker = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=env, text=True)
    try:
        assert worker.stdout is not None
        url = f"http://127.0.0.1:{worker.stdout.readline().removeprefix('PORT:').strip()}"
        with http_connect(Real, url, timeout=30) as real:
            assert real.double(2) == 4
            assert [item.batch.column(0).to_pylist() for item in real.count(3)] == [[0], [1], [2]]
            assert core.list_protocols(real)[0].name == "Real"
            ran = subprocess.run(
                [sys.executable, CORE_FILE, "call", "double", "x=21", "--url", url],
                capture_output=True,
                text=True,
                timeout=60,
                env=env,
            )
            assert json.loads(ran.stdout) == {"result": 42}, ran.stderr
            worker.kill()
            worker.wait(10)
            with pytest.raises(core.ConnectionLostError):
                real.double(2)
    finally:
        worker.kill()
        worker.wait(10)
        if worker.stdout is not None:
            worker.stdout.close()


class Real(Protocol):
    def double(self, x: int) -> int: ...
    def count(self, n: int) -> core.Stream[core.ProducerState]: ...


REAL_SERVICE = """
import dataclasses, typing
import pyarrow as pa
import vgi_rpc
from vgi_rpc_extras.http import serve_http

@dataclasses.dataclass
class Count(vgi_rpc.ProducerState):
    n: int
    i: int = 0
    def produce(self, out, ctx):
        if self.i == self.n:
            return out.finish()
        out.emit_pydict({"i": [self.i]})
        self.i += 1

class Real(typing.Protocol):
    def double(self, x: int) -> int: ...
    def count(self, n: int) -> vgi_rpc.Stream[Count]: ...

class Impl:
    def double(self, x: int) -> int:
        return 2 * x
    def count(self, n: int) -> vgi_rpc.Stream[Count]:
        return vgi_rpc.Stream(pa.schema([("i", pa.int64())]), Count(n))

serve_http(vgi_rpc.RpcServer(Real, Impl(), enable_describe=True))
"""


def test_the_command_line_names_its_faults() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for args, status, text in (
        (("--url", "ftp://h"), 2, "--url: the URL must begin with"),
        (("--url", f"http://127.0.0.1:{port}"), 1, "Connection refused"),
        (("--unix", "/x", "--prefix", "/p"), 2, "--prefix goes with --url"),
    ):
        ran = subprocess.run([sys.executable, CORE_FILE, "describe", *args], capture_output=True, text=True, timeout=60)
        assert (ran.returncode, text in ran.stderr) == (status, True), ran.stderr


def test_the_command_line_calls_over_http() -> None:
    with Scripted() as server:
        ran = subprocess.run(
            [sys.executable, CORE_FILE, "call", "add", "a=1", "b=2", "--url", server.url, "--prefix", "/p"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert json.loads(ran.stdout) == {"result": 3.0}, ran.stderr
        assert server.posts[-1].path == "/p/Calc/add"


TEXTS = pa.schema([("s", pa.utf8())])
OFFSETS = pa.array([0, 2], pa.int32()).buffers()[1]
COLUMN = pa.Array.from_buffers(pa.utf8(), 1, [None, OFFSETS, pa.py_buffer(b"\xff\xfe")])
GARBLED = pa.RecordBatch.from_arrays([COLUMN], schema=TEXTS)


@dataclasses.dataclass
class EchoText(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit(GARBLED if input.batch.column("s").to_pylist() == ["garble"] else input.batch)


def test_metadata_that_a_caller_may_not_send_and_answers_that_make_no_sense() -> None:
    class Echoes(Protocol):
        def echo(self) -> core.Stream[EchoText]: ...

    class EchoesImpl:
        def echo(self) -> core.Stream[EchoText]:
            return core.Stream(TEXTS, EchoText(), input_schema=TEXTS)

    def item(text: str, metadata: Any = None) -> core.AnnotatedBatch:
        return core.AnnotatedBatch(pa.RecordBatch.from_pydict({"s": [text]}), metadata)

    echo_client = core.make_sync_client(core.RpcServer(Echoes, EchoesImpl()))
    with core.http_connect(Echoes, client=echo_client) as proxy:
        session = proxy.echo()
        for metadata in ({"vgi_rpc.cancel": "1"}, {core.STATE_KEY: b"forged"}, {"k": 1}):
            with pytest.raises(core.RpcArgumentError, match=r"echo\(\): metadata key"):
                session.exchange(item("x", metadata))
        assert session.exchange(item("x", {"mine": "1"})).batch.column("s").to_pylist() == ["x"]
        with pytest.raises(core.RpcError, match="UTF8") as caught:
            session.exchange(item("garble"))
        assert not isinstance(caught.value, core.ConnectionLostError) and caught.value.sent == "answered"
        with pytest.raises(core.RpcError, match="UTF8"):
            proxy.echo().exchange(core.AnnotatedBatch(GARBLED))
        assert proxy.echo().exchange(item("y")).batch.num_rows == 1


# ---- what headers= and a timeout may say


@pytest.mark.parametrize(
    "name", ["Transfer-Encoding", "content-length", "HOST", "Connection", "TE", "Expect", "Upgrade"]
)
def test_headers_do_not_frame_a_request(name: str) -> None:
    with pytest.raises(ValueError, match="framed"):
        http_connect(Calc, "http://127.0.0.1:1", headers={name: "1"})


def test_each_header_is_sent_once() -> None:
    given = {"content-type": "text/plain", "USER-AGENT": "x", "authorization": "Bearer k", "X-Own": "1", "x-own": "2"}
    with Scripted(served) as server:
        url = server.url.replace("http://", "http://user:word@")
        with http_connect(Calc, url, headers=given) as calc:
            assert calc.add(1.0, 2.0) == 3.0
        (asked,) = (one for one in server.asked if one.verb == "POST")
        sent = client.HttpTransport(url, headers=given)
    lines = sent._sender._head + "".join(f"{name}: x\r\n" for name in sent._headers)
    found = [line.partition(":")[0].lower() for line in lines.splitlines()]
    assert sorted(set(found)) == sorted(found)
    assert (asked.headers["content-type"], asked.headers["authorization"]) == (ARROW, "Bearer k")
    assert asked.headers["x-own"] == "2"


def test_without_a_bound_of_its_own_the_client_names_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "MAX_DECODED_BYTES", 1000)
    with (
        Scripted(reply(bytes(2000))) as server,
        http_connect(Calc, server.url, accepted_max_response_bytes=None) as calc,
        pytest.raises(core.RpcError, match="larger than 1000 bytes, the most that is read"),
    ):
        calc.add(1.0, 2.0)


def test_what_does_not_get_smaller_is_not_joined() -> None:
    transport = client.HttpTransport("http://127.0.0.1:1")
    noise = os.urandom(300_000)
    pieces = [noise[:100], memoryview(noise)[100:], b"end"]
    packed, encoding = transport._pack(pieces, None)
    assert (packed is pieces, encoding) == (True, None)
    assert client._part(pieces, 50, 150) == noise[50:150]
    assert client._part(pieces, 299_999, 400_000) == noise[-1:] + b"end"
    packed, encoding = transport._pack([bytes(1000), memoryview(bytes(300_000))], None)
    assert (encoding, len(packed[0]) < 1000) == (coding.Encoding.ZSTD, True)


def full(address: str, port: int, hold: list[socket.socket]) -> int:
    """A port whose backlog is full: who connects waits."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(0)
    hold.append(listener)
    for _ in range(3):
        waiting = socket.socket()
        waiting.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            waiting.connect(listener.getsockname())
        hold.append(waiting)
    return int(listener.getsockname()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 and so on")
def test_a_timeout_is_for_all_addresses_together(monkeypatch: pytest.MonkeyPatch) -> None:
    hold: list[socket.socket] = []
    try:
        port = full("127.0.0.2", 0, hold)
        for last in (3, 4):
            full(f"127.0.0.{last}", port, hold)
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in (2, 3, 4)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: addresses)
        with http_connect(Calc, f"http://many.test:{port}", timeout=0.6) as calc:
            call = calc.add
            began = time.monotonic()
            with pytest.raises(core.DeadlineExceededError) as caught:
                call(1.0, 2.0)
            assert 0.5 < time.monotonic() - began < 1.7  # three times 0.6 would be more
        assert caught.value.sent == "no"
        with Scripted(served) as server:  # an address that does not answer leaves time for the next one
            good = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))
            addresses[:] = [addresses[0], good]
            with http_connect(Calc, f"http://many.test:{port}", timeout=2.0) as calc:
                assert calc.add(1.0, 2.0) == 3.0
    finally:
        for sock in hold:
            sock.close()


def test_a_resolver_that_hangs_costs_no_more_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: ended.wait(30) and [])
    try:
        with http_connect(Calc, "http://slow.test:1", timeout=0.3) as calc:
            call = calc.add
            began = time.monotonic()
            with pytest.raises(core.DeadlineExceededError, match="not resolved in time"):
                call(1.0, 2.0)
            assert time.monotonic() - began < 5
    finally:
        ended.set()


def test_a_tls_handshake_that_hangs_costs_no_more_than_the_timeout() -> None:
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = silent.getsockname()[1]
        call = stack.enter_context(http_connect(Calc, f"https://127.0.0.1:{port}", timeout=0.3)).add
        began = time.monotonic()
        with pytest.raises(core.DeadlineExceededError):
            call(1.0, 2.0)
        assert time.monotonic() - began < 5


def test_authorities_are_read_once() -> None:
    transports = [client.HttpTransport("https://127.0.0.1:1") for _ in range(2)]
    assert transports[0]._sender._context is transports[1]._sender._context
